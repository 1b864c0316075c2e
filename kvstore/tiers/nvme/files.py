"""The I/O seam below the tier: what it asks of a file system. Synchronous; called in threads.

The tests' crashing file system obeys it too, so every write and sync of the tier goes through here. Anything
may raise OSError. Buffers given to a direct file are page aligned, and so are offsets and sizes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

_IOV_MAX: Final = 1024


class Files(Protocol):
    counters: Counter[str]

    def make_directory(self, path: Path) -> None:
        """With its parents, for its owner alone; nothing where it is there."""
        ...

    def lock(self, path: Path) -> int:
        """Hold the file's lock until the handle is closed. Raises BlockingIOError when somebody has it."""
        ...

    def names(self, directory: Path) -> list[str]: ...

    def create(self, path: Path, *, direct: bool) -> int:
        """A new file, 0600, for reading and writing. Raises FileExistsError."""
        ...

    def open(self, path: Path, *, direct: bool, write: bool = False) -> int: ...

    def close(self, handle: int) -> None: ...

    def size(self, handle: int) -> int: ...

    def allocate(self, handle: int, nbytes: int) -> None:
        """Make the file that long, its room taken: ENOSPC comes here rather than in a later write."""
        ...

    def truncate(self, handle: int, nbytes: int) -> None: ...

    def write(self, handle: int, pieces: Sequence[memoryview], offset: int) -> None:
        """All the pieces, end to end."""
        ...

    def read(self, handle: int, room: memoryview, offset: int) -> int:
        """Bytes read: fewer than there is room for only where the file ends."""
        ...

    def sync(self, handle: int) -> None:
        """What was written to the file survives from here on. After an error nobody knows what does."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Files made, renamed and unlinked there stay so."""
        ...

    def rename(self, old: Path, new: Path) -> None: ...

    def unlink(self, path: Path) -> None: ...


class DiskFiles:
    """The real ones. Where the file system refuses O_DIRECT, through the page cache, counted (`buffered`)."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._counting = threading.Lock()

    def make_directory(self, path: Path) -> None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def lock(self, path: Path) -> int:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise
        return handle

    def names(self, directory: Path) -> list[str]:
        return sorted(os.listdir(directory))

    def create(self, path: Path, *, direct: bool) -> int:
        return self._open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, direct)

    def open(self, path: Path, *, direct: bool, write: bool = False) -> int:
        return self._open(path, os.O_RDWR if write else os.O_RDONLY, direct)

    def close(self, handle: int) -> None:
        os.close(handle)

    def size(self, handle: int) -> int:
        return os.fstat(handle).st_size

    def allocate(self, handle: int, nbytes: int) -> None:
        try:
            os.posix_fallocate(handle, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(handle, nbytes)

    def truncate(self, handle: int, nbytes: int) -> None:
        os.ftruncate(handle, nbytes)

    def write(self, handle: int, pieces: Sequence[memoryview], offset: int) -> None:
        for first in range(0, len(pieces), _IOV_MAX):
            offset = self._write_some(handle, list(pieces[first : first + _IOV_MAX]), offset)

    def _write_some(self, handle: int, pieces: list[memoryview], offset: int) -> int:
        while pieces:
            try:
                written = os.pwritev(handle, pieces, offset)
            except OSError as error:
                self._give_up_direct(handle, error)
                continue
            offset += written
            while pieces and written >= pieces[0].nbytes:
                written -= pieces.pop(0).nbytes
            if written:
                pieces[0] = pieces[0][written:]
        return offset

    def read(self, handle: int, room: memoryview, offset: int) -> int:
        done = 0
        while done < room.nbytes:
            try:
                got = os.preadv(handle, [room[done:]], offset + done)
            except OSError as error:
                self._give_up_direct(handle, error)
                continue
            if not got:
                break
            done += got
            if got % 512:
                break  # a direct read that ends inside a sector ends at the end of the file
        return done

    def sync(self, handle: int) -> None:
        os.fdatasync(handle)

    def sync_directory(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def unlink(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def _open(self, path: Path, flags: int, direct: bool) -> int:
        if direct:
            try:
                return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                flags &= ~os.O_EXCL  # some file systems refuse the flag after they made the file
                self._count_buffered()
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def _give_up_direct(self, handle: int, error: OSError) -> None:
        """Some file systems take O_DIRECT at open and refuse the first transfer. Raises any other error."""
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise error
        fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._count_buffered()

    def _count_buffered(self) -> None:
        with self._counting:
            self.counters["buffered"] += 1
