"""A file system in memory that forgets: what was not synced survives a crash torn, reordered, or not at all.

Every change is an operation in a log. A `World` to which log[:k] was applied is the machine just before
operation k; its `survivor` is one of the disks that power loss may leave then, drawn by a seeded generator:

  data       of each file: none, all, the first of the unsynced writes, or any of their sectors, in any order
  names      made, renamed, unlinked without a sync of their directory: none, all, the first, or any of them
  sync       makes durable what the file held, and not its name; a directory's sync its names, not their data

which are the rules of ALICE (Pillai et al., OSDI 2014). Faults: `fails` is asked before each operation and
each read; a write that fails was half done, a sync that fails loses what it was to keep for good
(Rebello et al., ATC 2020).
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from kvstore.tiers.nvme.threads import Result, Threads

SECTORS: Final = (512, 4096)
Kind = Literal["create", "write", "size", "sync", "names", "rename", "unlink", "read"]


@dataclass(frozen=True, slots=True)
class Operation:
    kind: Kind
    file: int = -1  # inode
    path: str = ""
    new: str = ""
    offset: int = 0
    data: bytes = b""
    nbytes: int = 0


@dataclass(slots=True)
class Inode:
    durable: bytearray = field(default_factory=bytearray)
    live: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)


def put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def resize(content: bytearray, nbytes: int) -> None:
    del content[nbytes:]
    content.extend(bytes(nbytes - len(content)))


def change_content(content: bytearray, operation: Operation) -> None:
    if operation.kind == "write":
        put(content, operation.offset, operation.data)
    else:
        resize(content, operation.nbytes)


def change_names(names: dict[str, int], operation: Operation) -> None:
    if operation.kind == "create":
        names[operation.path] = operation.file
    elif operation.kind == "unlink":
        names.pop(operation.path, None)
    else:
        names.pop(operation.path, None)
        names[operation.new] = operation.file


def some_of(operations: Sequence[Operation], rng: random.Random) -> list[Operation]:
    how = rng.choice(("none", "all", "first", "any"))
    if how == "any":
        return [operation for operation in operations if rng.random() < 0.5]
    return list(operations[: {"none": 0, "all": len(operations)}.get(how, rng.randint(0, len(operations)))])


class World:
    """The disks: what is on them, and what a crash would leave."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {}
        self.names: dict[str, int] = {}
        self.durable_names: dict[str, int] = {}
        self.pending_names: list[Operation] = []

    def apply(self, operation: Operation) -> None:
        inode = self.inodes.setdefault(operation.file, Inode()) if operation.file >= 0 else Inode()
        if operation.kind in ("create", "rename", "unlink"):
            change_names(self.names, operation)
            self.pending_names.append(operation)
        elif operation.kind == "names":
            mine = [o for o in self.pending_names if str(Path(o.path).parent) == operation.path]
            for one in mine:
                change_names(self.durable_names, one)
                self.pending_names.remove(one)
        elif operation.kind == "sync":
            for one in inode.pending:
                change_content(inode.durable, one)
            inode.pending.clear()
        else:
            inode.pending.append(operation)
            change_content(inode.live, operation)

    def lose(self, file: int) -> None:
        """A sync failed: what was to be written is clean and readable, and never gets to the disk."""
        inode = self.inodes[file]
        inode.pending = [one for one in inode.pending if one.kind != "write"]

    def survivor(self, rng: random.Random) -> World:
        """One of the states a crash may leave now. Nothing in it is pending."""
        after = World()
        names = dict(self.durable_names)
        for operation in some_of(self.pending_names, rng):
            change_names(names, operation)
        after.names, after.durable_names = names, dict(names)
        for file in set(names.values()):
            content = torn(self.inodes[file], rng)
            after.inodes[file] = Inode(content, bytearray(content))
        return after

    def as_it_is(self) -> World:
        """What a killed process leaves: everything it handed to the system, synced or not."""
        after = World()
        after.names, after.durable_names = dict(self.names), dict(self.durable_names)
        after.pending_names = list(self.pending_names)
        for file, inode in self.inodes.items():
            after.inodes[file] = Inode(bytearray(inode.durable), bytearray(inode.live), list(inode.pending))
        return after


def torn(inode: Inode, rng: random.Random) -> bytearray:
    content = bytearray(inode.durable)
    sector = rng.choice(SECTORS)
    operations = list(inode.pending)
    if rng.random() < 0.5:
        operations = some_of(operations, rng)
        share = 1.0
    else:
        share = rng.choice((0.1, 0.5, 0.9))
        if rng.random() < 0.3:
            rng.shuffle(operations)
    for operation in operations:
        if operation.kind == "size":
            if rng.random() < share:
                resize(content, operation.nbytes)
            continue
        at, end = operation.offset, operation.offset + len(operation.data)
        while at < end:
            until = min(end, (at // sector + 1) * sector)
            if rng.random() < share:
                put(content, at, operation.data[at - operation.offset : until - operation.offset])
            at = until
    return content


class CrashFiles:
    """The seam over a `World`. Handles are counted from 1; directories exist."""

    def __init__(self, world: World | None = None, capacity_nbytes: int | None = None) -> None:
        self.world = world or World()
        self.log: list[Operation] = []
        self.counters: Counter[str] = Counter()
        self.fails: Callable[[Operation], OSError | None] = lambda _: None
        self.capacity_nbytes = capacity_nbytes
        self._handles: dict[int, int] = {}
        self._locked: dict[int, Path] = {}
        self._next = 1 + max(self.world.inodes, default=0)

    def make_directory(self, path: Path) -> None:
        pass

    def lock(self, path: Path) -> int:
        if path in self._locked.values():
            raise BlockingIOError(errno.EAGAIN, "locked")
        self._next += 1
        self._locked[self._next] = path
        return self._next

    def names(self, directory: Path) -> list[str]:
        return sorted(Path(path).name for path in self.world.names if Path(path).parent == directory)

    def create(self, path: Path, *, direct: bool) -> int:
        if str(path) in self.world.names:
            raise FileExistsError(errno.EEXIST, str(path))
        self._next += 1
        self._do(Operation("create", self._next, str(path)))
        return self._handle(self._next)

    def open(self, path: Path, *, direct: bool, write: bool = False) -> int:
        file = self.world.names.get(str(path))
        if file is None:
            raise FileNotFoundError(errno.ENOENT, str(path))
        return self._handle(file)

    def close(self, handle: int) -> None:
        if self._locked.pop(handle, None) is None:
            del self._handles[handle]

    def size(self, handle: int) -> int:
        return len(self._inode(handle).live)

    def allocate(self, handle: int, nbytes: int) -> None:
        self._take(max(0, nbytes - self.size(handle)))
        self._do(Operation("size", self._handles[handle], nbytes=nbytes))

    def truncate(self, handle: int, nbytes: int) -> None:
        self._do(Operation("size", self._handles[handle], nbytes=nbytes))

    def write(self, handle: int, pieces: Sequence[memoryview], offset: int) -> None:
        data = b"".join(bytes(piece) for piece in pieces)
        self._take(max(0, offset + len(data) - self.size(handle)))
        self._do(Operation("write", self._handles[handle], offset=offset, data=data))

    def read(self, handle: int, room: memoryview, offset: int) -> int:
        self._check(Operation("read", self._handles[handle], offset=offset, nbytes=room.nbytes))
        found = self._inode(handle).live[offset : offset + room.nbytes]
        room[: len(found)] = found
        return len(found)

    def sync(self, handle: int) -> None:
        self._do(Operation("sync", self._handles[handle]))

    def sync_directory(self, path: Path) -> None:
        self._do(Operation("names", path=str(path)))

    def rename(self, old: Path, new: Path) -> None:
        self._do(Operation("rename", self.world.names[str(old)], str(old), str(new)))

    def unlink(self, path: Path) -> None:
        file = self.world.names.get(str(path))
        if file is not None:
            self._do(Operation("unlink", file, str(path)))

    @property
    def used_nbytes(self) -> int:
        return sum(len(self.world.inodes[file].live) for file in set(self.world.names.values()))

    @property
    def open_handles(self) -> int:
        return len(self._handles)

    def _take(self, nbytes: int) -> None:
        if self.capacity_nbytes is not None and self.used_nbytes + nbytes > self.capacity_nbytes:
            raise OSError(errno.ENOSPC, "no space left")

    def _do(self, operation: Operation) -> None:
        self._check(operation)
        self.log.append(operation)
        self.world.apply(operation)

    def _check(self, operation: Operation) -> None:
        error = self.fails(operation)
        if error is not None:
            if operation.kind == "write":  # half of it got there
                half = operation.data[: len(operation.data) // 2]
                self.world.apply(Operation("write", operation.file, offset=operation.offset, data=half))
            elif operation.kind == "sync":
                self.world.lose(operation.file)
            raise error

    def _handle(self, file: int) -> int:
        self._next += 1
        self._handles[self._next] = file
        return self._next

    def _inode(self, handle: int) -> Inode:
        return self.world.inodes[self._handles[handle]]


class Inline(Threads):
    """Does the work at once, in the caller's thread: the order of operations is the same in every run."""

    def __init__(self) -> None:
        pass

    async def run(self, work: Callable[[], Result]) -> Result:
        await asyncio.sleep(0)  # let others go on, as a thread would
        return work()

    def close(self) -> None:
        pass
