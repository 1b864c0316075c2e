"""Puts the peers into a folder of their own: a virtual environment, and what Debian calls for beside it.

Nothing is installed into the system, nor into the environment kvstrata runs in. A step that fails is a
reason, told in the table; the other peers go on.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

PACKAGES: Final = ("mooncake-transfer-engine-non-cuda", "numpy", "redis[hiredis]")
DEBIAN: Final = (
    "libibverbs1", "libnl-3-200", "libnl-route-3-200", "libnuma1",  # what Mooncake's wheel links against
    "redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1",
)  # fmt: skip
_STEP_S: Final = 600.0


def install(folder: Path, note: Callable[[str], None]) -> list[str]:
    """Make `folder` hold the peers; what failed, in words. Steps that were done before are done again."""
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    for what, step in (("Python packages", _install_packages), ("Debian packages", _install_debian)):
        note(f"installing the peers' {what} into {folder}")
        try:
            step(folder)
        except (OSError, subprocess.SubprocessError) as error:
            failures.append(f"{what}: {_reason(error)}")
            note(f"  failed: {failures[-1]}")
    return failures


def _install_packages(folder: Path) -> None:
    _run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    _run([str(folder / "venv/bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES], folder)


def _install_debian(folder: Path) -> None:
    packages = folder / "debian"
    packages.mkdir(exist_ok=True)
    try:
        _run(["apt-get", "download", *DEBIAN], packages)
    except subprocess.SubprocessError:
        _run(["apt-get", "update"], packages)  # a new machine has no package lists yet
        _run(["apt-get", "download", *DEBIAN], packages)
    for package in sorted(packages.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(folder / "root")], packages)


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(
        list(command), cwd=folder, check=True, capture_output=True, text=True, timeout=_STEP_S,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = (error.stderr or error.stdout or "").strip().splitlines()
        return f"{error.cmd[0]} failed: {said[-1] if said else error.returncode}"
    return str(error)
