"""Which peers there are, and one that runs: started in its own environment, or absent with a reason."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import cli
from cli.bench.figures import Moved
from cli.bench.jsonlines import Child, ChildFailed
from cli.bench.plan import SIZES, TIMEOUT_S, Plan

PEERS: Final = ("mooncake_tcp", "redis", "ray")
_START_S: Final = 60.0


def default_folder() -> Path:
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "kvstrata" / "bench-peers"


class Peer:
    """One peer's reading process. Raises ChildFailed wherever the peer does not do its part."""

    def __init__(self, name: str, folder: Path, plan: Plan) -> None:
        self._source = tempfile.TemporaryDirectory(prefix="kvstrata-bench-")
        command, env = _command(name, folder, Path(self._source.name))
        self._plan = plan
        self._child = Child(name, command, env)
        try:
            asked = {"working_nbytes": plan.working_nbytes, "sizes": len(SIZES)}
            self.what = str(self._child.ask("start", _START_S, **asked)["what"])
        except ChildFailed:
            self.close()
            raise

    def load(self, nbytes: int, keys: Sequence[bytes]) -> None:
        self._child.ask("load", TIMEOUT_S, nbytes=nbytes, keys=[key.hex() for key in keys])

    def read(self, nbytes: int, order: Sequence[int], verify: bool) -> Moved:
        got = self._child.ask(
            "read", TIMEOUT_S, nbytes=nbytes, order=list(order), verify=verify,
            at_once=self._plan.request_blocks(nbytes),
        )  # fmt: skip
        return Moved(nbytes * len(order), got["wall_s"], got["cpu_s"])

    def close(self) -> None:
        self._child.close()
        self._source.cleanup()


def _command(name: str, folder: Path, source: Path) -> tuple[list[str], dict[str, str]]:
    """How to start a peer's reader. Raises ChildFailed, with the reason, when it is not installed."""
    if name == "ray":
        if importlib.util.find_spec("ray") is None:
            raise ChildFailed("not installed: pip install 'kvstrata[serve]'")
        paths = os.pathsep.join(path for path in sys.path if path)
        env = {"PYTHONPATH": paths, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        return [sys.executable, "-m", "cli.bench.peers.ray_store"], env
    python, binary = folder / "venv/bin/python", folder / "root/usr/bin/redis-server"
    if not python.exists() or not binary.exists():
        raise ChildFailed(f"not installed in {folder}: add --install-peers")
    # The peers' Python sees this one package of ours and none of our dependencies.
    (source / "cli").symlink_to(Path(cli.__path__[0]), target_is_directory=True)
    libraries = [folder / "root" / lib / f"{platform.machine()}-linux-gnu" for lib in ("usr/lib", "lib")]
    env = {"PYTHONPATH": str(source), "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries))}
    if name == "redis":
        return [str(python), "-m", "cli.bench.peers.redis_server", str(binary)], env
    return [str(python), "-m", "cli.bench.peers.mooncake"], env
