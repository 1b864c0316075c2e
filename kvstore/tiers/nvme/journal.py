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
the note may then be there after a crash or not. Nothing is written that a start could not read: what would
outgrow the bounds below is refused before (ENOSPC), and was not noted. Rewriting is packed in a thread.
"""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from kvstore.tiers.durable import Note, PurgeNote
from kvstore.tiers.nvme.files import Files
from kvstore.tiers.nvme.layout import READABLE_VERSIONS, Seal
from kvstore.tiers.nvme.notes import NOTES_MAX, NoteState, encode_note, pack, pack_one, packed_list, unpack
from kvstore.tiers.nvme.oldest import Oldest
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
_LIST_HEAD_NBYTES_MAX: Final = 5  # msgpack's array 32
GROWTH_NBYTES = 256 << 10
JOURNAL_NBYTES_MAX = 1 << 30
"""What a start reads. A journal is rewritten long before, unless that much still matters."""
ENTRY_NBYTES_MAX = 1 << 26
"""Of what is appended at once. A first entry holds the whole state, and may be as large as the journal."""
PURGED_KEYS_MAX = 1 << 18
"""Keys of purges that are remembered: 9 MiB of journal, 40 MiB of memory. A whole scope counts for none."""


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


@dataclass(slots=True, eq=False)
class _Waiting:
    note: Note
    before: int
    document: bytes
    done: asyncio.Future[None]

    def fail(self, error: OSError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever was cancelled meanwhile does not ask


class Journal:
    """Appends and rewrites. What was read at start is `state`; `number` is the last entry that is durable."""

    def __init__(self, directory: Path, files: Files, threads: Threads, store: bytes) -> None:
        self.state = NoteState()
        self.number = 0
        self.find_oldest: Callable[[], Awaitable[Oldest]] | None = None  # None: every purge is needed
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
        self._waiting: list[_Waiting] = []

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
        """Durable when this returns. Raises OSError; ENOSPC: there is no room for it, nothing was noted."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(note, before, pack_one(encode_note(note, before)), done))
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
            elif self._refused(batch):
                await self._make_room(batch)
            for one, why in (refused := self._refused(batch)).items():
                one.fail(OSError(errno.ENOSPC, why))
            batch = [one for one in batch if one not in refused]
            if batch:
                await self._write(packed_list([one.document for one in batch]))
        except BaseException as error:
            await self._drop_handle()
            for one in batch:
                one.fail(error if isinstance(error, OSError) else OSError(str(error)))
            if not isinstance(error, OSError):
                raise
            return
        for one in batch:
            self.state.add(one.note, one.before)
            if not one.done.done():
                one.done.set_result(None)

    def _refused(self, batch: list[_Waiting]) -> dict[_Waiting, str]:
        """Which of them there is no room for, and why. The others may be written together."""
        refused: dict[_Waiting, str] = {}
        keys = self.state.purges.key_count()
        notes = self.state.note_count() + keys  # at most: each key its own note
        room = min(ENTRY_NBYTES_MAX, JOURNAL_NBYTES_MAX - self._nbytes - _ENTRY.size)
        nbytes = _LIST_HEAD_NBYTES_MAX
        for one in batch:
            added = self.state.purges.added_by(one.note) if isinstance(one.note, PurgeNote) else 0
            if added and keys + added > PURGED_KEYS_MAX:
                refused[one] = (
                    f"{keys} purged keys are remembered, at most {PURGED_KEYS_MAX} can be until their "
                    "segments are reclaimed: purge whole epochs or namespaces"
                )
            elif notes + 1 + added > NOTES_MAX:
                refused[one] = f"the journal holds {notes} notes, at most {NOTES_MAX} can be read back"
            elif nbytes + len(one.document) > room:
                refused[one] = f"a note of {len(one.document)} bytes outgrows what a start reads back"
            else:
                keys, notes, nbytes = keys + added, notes + 1 + added, nbytes + len(one.document)
        return refused

    async def _make_room(self, batch: list[_Waiting]) -> None:
        """Forget what is needless; rewrite only where bytes are short: a refusal stays cheap."""
        oldest = await self._find_oldest()
        await self._threads.run(lambda: self.state.purges.forget(oldest.is_needless))
        wanted = min(ENTRY_NBYTES_MAX, sum(len(one.document) for one in batch))
        if self._nbytes + _ENTRY.size + _LIST_HEAD_NBYTES_MAX + wanted > JOURNAL_NBYTES_MAX:
            await self._rewrite()

    async def _find_oldest(self) -> Oldest:
        if self.find_oldest is not None:
            return await self.find_oldest()
        every = Oldest()
        every.add_unknown(0)
        return every

    async def _write(self, body: bytes) -> None:
        assert self._handle is not None
        handle, at = self._handle, self._nbytes
        self._given += 1
        entry = encode_entry(self._given, body, self._seal)
        assert at + len(entry) <= JOURNAL_NBYTES_MAX, "refused before"

        def write() -> None:
            self._files.write(handle, [memoryview(entry)], at)
            self._files.sync(handle)

        await self._threads.run(write)
        self._nbytes += len(entry)
        self.number = self._given

    async def _rewrite(self) -> None:
        """A new file with all that still matters, in place of the old one. Raises OSError.

        Who calls it holds the turn, so nobody changes the state while a thread packs it.
        """
        oldest = await self._find_oldest()
        await self._drop_handle()
        self._given += 1
        number = self._given
        new = self._directory / JOURNAL_NEW

        def write() -> tuple[int, int]:
            self.state.purges.forget(oldest.is_needless)
            data = self._encode_state(number)
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
            return handle, len(data)

        self._handle, self._nbytes = await self._threads.run(write)
        self._rewritten_nbytes = self._nbytes
        self.number = number

    def _encode_state(self, number: int) -> bytes:
        """Header and first entry. Raises OSError (ENOSPC) for more than a start reads."""
        documents = self.state.documents()
        body = pack(documents)
        nbytes = _HEADER_NBYTES + _ENTRY.size + len(body)
        if len(documents) > NOTES_MAX or nbytes > JOURNAL_NBYTES_MAX:
            raise OSError(
                errno.ENOSPC,
                f"{len(documents)} notes of {nbytes} bytes still matter: a start reads at most "
                f"{NOTES_MAX} of {JOURNAL_NBYTES_MAX} bytes",
            )
        return encode_journal_header(self._store) + encode_entry(number, body, self._seal)

    async def _drop_handle(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            await self._threads.run(lambda: self._files.close(handle))


def load_journal(path: Path, files: Files) -> tuple[bytes, NoteState, int]:
    """Reads the whole file. Raises ConfigError, OSError."""
    handle = files.open(path, direct=False)
    try:
        nbytes = files.size(handle)
        if nbytes > JOURNAL_NBYTES_MAX:
            raise ConfigError(f"{path} has {nbytes} bytes: no journal of ours grows so large")
        data = memoryview(bytearray(nbytes))
        got = files.read(handle, data, 0)
    finally:
        files.close(handle)
    return read_journal(data[:got], str(path))
