"""The user's cache of models: folders that are whole or not there, whatever stops their making.

    ROOT/models/NAME/             a complete folder: it holds MARKER, which lists every file's size
    ROOT/models/.NAME.XXXXXXXX/   one being made; removed on failure, or by the next maker after a kill
    ROOT/locks/NAME.lock          flock: one maker a name; the kernel frees it with the process

ROOT is $KVSTRATA_CACHE, else $XDG_CACHE_HOME/kvstrata, else ~/.cache/kvstrata. A folder is made beside
its place, synced, given its marker last, and renamed: readers need no lock. Asking whether one is complete
costs a stat a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import DiskFull, ModelBusy, ModelError
from engine.folder import read_json_object
from engine.progress import Progress

__all__ = ["MARKER", "ModelCache", "cache_root", "needs_disk"]

MARKER: Final = ".kvstrata.json"
LOCK_WAIT_S_MAX: Final = 900.0
"""How long to wait for another process that makes the same model: longer than a slow download takes."""
_POLL_S: Final = 0.2
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


def cache_root() -> Path:
    """Where models are kept. Not made yet."""
    own, shared = os.environ.get("KVSTRATA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "kvstrata"


@dataclass(frozen=True, slots=True)
class ModelCache:
    """The models under one root. `monotonic` and `sleep` serve the bounded wait for a lock."""

    root: Path
    lock_wait_s_max: float = LOCK_WAIT_S_MAX
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def path(self, name: str) -> Path:
        return self.root / "models" / name

    def is_complete(self, name: str) -> bool:
        """Is every file there with the size it was made with?"""
        folder = self.path(name)
        try:
            sizes = read_json_object(folder / MARKER).get("files")
            return isinstance(sizes, dict) and all(
                (folder / file).stat().st_size == size for file, size in sizes.items()
            )
        except (ModelError, OSError):
            return False  # no marker, a damaged one, or a file that is gone: not complete, make it again

    def complete_names(self) -> list[str]:
        models = self.root / "models"
        if not models.is_dir():
            return []
        names = sorted(path.name for path in models.iterdir() if not path.name.startswith("."))
        return [name for name in names if self.is_complete(name)]

    def make(self, name: str, build: Callable[[Path, Path], dict[str, Any]], progress: Progress) -> Path:
        """The complete folder of `name`, made by `build` if it is not there yet.

        `build(folder, scratch)` fills an empty folder and may use another for what it needs on the way; it
        returns what the marker shall tell of the source. Raises what it raises (an OSError as DiskFull or
        ModelError); then nothing is left behind. Raises ModelBusy if another maker does not end in time.
        """
        if self.is_complete(name):
            return self.path(name)
        try:
            with self._locked(name, progress):
                if not self.is_complete(name):  # another maker may have ended while we waited
                    self._make(name, build)
        except OSError as error:
            raise _from_os_error(error, self.root) from error
        return self.path(name)

    def _make(self, name: str, build: Callable[[Path, Path], dict[str, Any]]) -> None:
        models = self.path(name).parent
        for dead in models.glob(f".{name}.*"):  # we hold the lock: whoever made these was killed
            shutil.rmtree(dead, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=models, ignore_cleanup_errors=True) as top:
            folder, scratch = Path(top, "folder"), Path(top, "scratch")
            folder.mkdir()
            scratch.mkdir()
            source = build(folder, scratch)
            _seal(folder, source)
            if self.path(name).exists():
                self.path(name).rename(Path(top, "incomplete"))
            folder.rename(self.path(name))
            _sync(models)

    @contextlib.contextmanager
    def _locked(self, name: str, progress: Progress) -> Iterator[None]:
        (self.root / "models").mkdir(parents=True, exist_ok=True)
        (self.root / "locks").mkdir(parents=True, exist_ok=True)
        with (self.root / "locks" / f"{name}.lock").open("ab") as lock:
            self._wait_for(lock.fileno(), name, progress)
            yield  # closing the file frees the lock

    def _wait_for(self, lock: int, name: str, progress: Progress) -> None:
        deadline = self.monotonic() + self.lock_wait_s_max
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if self.monotonic() >= deadline:
                    raise ModelBusy(
                        f"another process has been making {name} for more than {self.lock_wait_s_max:.0f} s",
                        "Wait for it or end it, then try again",
                    ) from None
                progress("waiting for another process that makes this model", 0, 0)
                self.sleep(_POLL_S)
            else:
                return


def needs_disk(folder: Path, nbytes: int) -> None:
    """Raise DiskFull, before anything is written, if `folder`'s disk has less than `nbytes` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DiskFull(
            f"{folder} has {free / 1e6:.0f} MB free, the model needs {nbytes / 1e6:.0f} MB to be made",
            "Free some space, or set KVSTRATA_CACHE to a folder on a larger disk",
        )


def _from_os_error(error: OSError, root: Path) -> ModelError:
    if error.errno in _NO_SPACE:
        return DiskFull(
            f"the disk of {root} is full ({error})",
            "Free some space, or set KVSTRATA_CACHE to a folder on a larger disk",
        )
    return ModelError(
        f"cannot write to {root} ({error})", "Make it writable, or set KVSTRATA_CACHE to a folder that is"
    )


def _seal(folder: Path, source: dict[str, Any]) -> None:
    """Sync every file, then write the marker, then sync the folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        _sync(path)
    sizes = {path.name: path.stat().st_size for path in files}
    marker = folder / MARKER
    marker.write_text(json.dumps({"format": 1, "source": source, "files": sizes}, indent=2) + "\n")
    _sync(marker)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
