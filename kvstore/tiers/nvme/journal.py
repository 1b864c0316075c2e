"""The journal of notes: one small file, appended to and synced before a note counts, rewritten when it grew.

    header  magic 8, version u32, zero u32, store id 16, xxh3 of bytes 0..31
    entry   magic "KVSN", nbytes u32, number u64, xxh3 of number and body, body: a msgpack list of notes

An entry is what was synced at once; numbers rise by one, also over a rewrite. Every record on the disks tells
the number that was durable when it was written, so a journal that lost entries is found out: it is refused,
for a purge might be among them. Only a last entry may be torn: it was never acknowledged. A life of the
store never appends to a file it inherited: its first note, or its first segment, rewrites the state into a
new one (write, sync, rename, sync of the directory). Nor does it go on after an error: the file may hold
anything behind what was synced, so the next note rewrites.

A note costs one write and one sync, shared by all that wait meanwhile: 0.1 to 1 ms. Fails with OSError;
the note may then be there after a crash or not.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from kvstore.nouns import NamespaceId
from kvstore.tiers.durable import Note
from kvstore.tiers.nvme.files import Files
from kvstore.tiers.nvme.layout import READABLE_VERSIONS, Seal
from kvstore.tiers.nvme.notes import NoteState, encode_note, pack, unpack
from kvstore.tiers.nvme.threads import Threads

JOURNAL: Final = "journal"
JOURNAL_NEW: Final = "journal.new"
FORMAT_VERSION: Final = 1
STORE_ID_NBYTES: Final = 16
LIFE_SHIFT: Final = 40
"""Sequence numbers of one life: none is given out twice, whatever was lost."""
_MAGIC: Final = b"KVSTJRN\n"
_HEADER: Final = struct.Struct("<8sII16s")
_ENTRY: Final = struct.Struct("<4sIQQ")
_ENTRY_MAGIC: Final = b"KVSN"
_NUMBER: Final = struct.Struct("<Q")
_CHECK: Final = struct.Struct("<Q")
_HEADER_NBYTES: Final = _HEADER.size + _CHECK.size
GROWTH_NBYTES = 256 << 10
_JOURNAL_NBYTES_MAX: Final = 1 << 30


def encode_journal_header(store: bytes) -> bytes:
    body = _HEADER.pack(_MAGIC, FORMAT_VERSION, 0, store)
    return body + _CHECK.pack(Seal(store)(body))


def encode_entry(number: int, body: bytes, seal: Seal) -> bytes:
    check = seal(_NUMBER.pack(number) + body)
    return _ENTRY.pack(_ENTRY_MAGIC, len(body), number, check) + body


def decode_entry(data: memoryview, at: int, seal: Seal) -> tuple[int, memoryview] | None:
    """Number and body of the entry that begins at `at`; None where no whole one does."""
    if data.nbytes - at < _ENTRY.size:
        return None
    magic, nbytes, number, check = _ENTRY.unpack(data[at : at + _ENTRY.size])
    body = data[at + _ENTRY.size : at + _ENTRY.size + nbytes]
    if magic != _ENTRY_MAGIC or body.nbytes != nbytes:
        return None
    return (number, body) if seal(_NUMBER.pack(number) + bytes(body)) == check else None


def read_journal(data: memoryview, name: str) -> tuple[bytes, NoteState, int]:
    """The store's id, what its notes say, the last entry's number. Raises ConfigError."""
    head = bytes(data[: _HEADER.size])
    if len(head) < _HEADER.size or head[:8] != _MAGIC:
        raise ConfigError(f"{name} is no journal of ours: give the nvme tier a directory of its own")
    _, version, _, store = _HEADER.unpack(head)
    if version not in READABLE_VERSIONS:
        raise ConfigError(
            f"{name} has format {version}, this version reads {sorted(READABLE_VERSIONS)}: start the version "
            "that wrote it, or empty the tier's directories"
        )
    seal = Seal(store)
    if data.nbytes < _HEADER_NBYTES or _CHECK.unpack(data[_HEADER.size : _HEADER_NBYTES])[0] != seal(head):
        raise damaged(name, "its header's checksum does not match")
    state, at, last = NoteState(), _HEADER_NBYTES, 0
    while (entry := decode_entry(data, at, seal)) is not None:
        number, body = entry
        if last and number != last + 1:
            raise damaged(name, f"entry {last + 1} is missing")
        state.apply(unpack(body, name), name)
        last, at = number, at + _ENTRY.size + body.nbytes
    if not last:
        raise damaged(name, "its first entry is not whole")
    rest = bytes(data[at:])
    found = rest.find(_ENTRY_MAGIC, 1)
    while found >= 0:
        if decode_entry(data, at + found, seal) is not None:
            raise damaged(name, f"entry {last + 1} is broken, later ones are not")
        found = rest.find(_ENTRY_MAGIC, found + 1)
    return store, state, last


def damaged(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"{name} is damaged: {what}. A purge may be lost with it, so nothing is served from these disks: "
        "restore the file, or empty the tier's directories to start anew"
    )


class Journal:
    """Appends and rewrites. What was read at start is `state`; `number` is the last entry that is durable."""

    def __init__(self, directory: Path, files: Files, threads: Threads, store: bytes) -> None:
        self.state = NoteState()
        self.number = 0
        self.needless: Callable[[NamespaceId, int | None, int], bool] = lambda *_: False
        self._given = 0  # numbers given out, those of entries that failed included
        self._path = directory / JOURNAL
        self._directory = directory
        self._files = files
        self._threads = threads
        self._store = store
        self._seal = Seal(store)
        self._handle: int | None = None  # None: the next entry rewrites
        self._nbytes = 0
        self._rewritten_nbytes = 0
        self._turn = asyncio.Lock()
        self._waiting: list[tuple[Note, int, asyncio.Future[None]]] = []

    def inherit(self, state: NoteState, number: int) -> None:
        """What an earlier life left, which this one adds itself to as soon as it writes."""
        self.state, self.number, self._given = state, number, number
        state.lives += 1

    @property
    def first_sequence(self) -> int:
        return self.state.lives << LIFE_SHIFT

    async def begin(self) -> None:
        """This life is noted: without it no segment may be written."""
        if self._handle is None:
            async with self._turn:
                if self._handle is None:
                    await self._rewrite()

    async def append(self, note: Note, before: int) -> None:
        """Durable when this returns. Raises OSError."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((note, before, done))
        async with self._turn:
            if not done.done():
                await self._flush()
        await done

    async def close(self) -> None:
        async with self._turn:
            await self._drop_handle()

    async def _flush(self) -> None:
        batch, self._waiting = self._waiting, []
        try:
            # Replayed in this order, so the state is what a rewrite in the middle of a batch would keep.
            if self._handle is None or self._nbytes > 2 * self._rewritten_nbytes + GROWTH_NBYTES:
                await self._rewrite()
            await self._write([encode_note(note, before) for note, before, _ in batch])
        except BaseException as error:
            await self._drop_handle()
            for _, _, done in batch:
                if not done.done():
                    done.set_exception(error if isinstance(error, OSError) else OSError(str(error)))
                    done.exception()  # whoever was cancelled meanwhile does not ask
            if not isinstance(error, OSError):
                raise
            return
        for note, before, done in batch:
            self.state.add(note, before)
            if not done.done():
                done.set_result(None)

    async def _write(self, documents: list[list[object]]) -> None:
        assert self._handle is not None
        handle, at = self._handle, self._nbytes
        self._given += 1
        entry = encode_entry(self._given, pack(documents), self._seal)

        def write() -> None:
            self._files.write(handle, [memoryview(entry)], at)
            self._files.sync(handle)

        await self._threads.run(write)
        self._nbytes += len(entry)
        self.number = self._given

    async def _rewrite(self) -> None:
        """A new file with all that still matters, in place of the old one."""
        await self._drop_handle()
        self.state.purges.forget(self.needless)
        self._given += 1
        number = self._given
        entry = encode_entry(number, pack(self.state.documents()), self._seal)
        data = encode_journal_header(self._store) + entry
        new = self._directory / JOURNAL_NEW

        def write() -> int:
            self._files.unlink(new)
            handle = self._files.create(new, direct=False)
            try:
                self._files.write(handle, [memoryview(data)], 0)
                self._files.sync(handle)
                self._files.rename(new, self._path)
                self._files.sync_directory(self._directory)
            except BaseException:
                self._files.close(handle)
                raise
            return handle

        self._handle = await self._threads.run(write)
        self._nbytes = self._rewritten_nbytes = len(data)
        self.number = number

    async def _drop_handle(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            await self._threads.run(lambda: self._files.close(handle))


def load_journal(path: Path, files: Files) -> tuple[bytes, NoteState, int]:
    """Reads the whole file. Raises ConfigError, OSError."""
    handle = files.open(path, direct=False)
    try:
        nbytes = files.size(handle)
        if nbytes > _JOURNAL_NBYTES_MAX:
            raise ConfigError(f"{path} has {nbytes} bytes: no journal of ours grows so large")
        data = memoryview(bytearray(nbytes))
        got = files.read(handle, data, 0)
    finally:
        files.close(handle)
    return read_journal(data[:got], str(path))
