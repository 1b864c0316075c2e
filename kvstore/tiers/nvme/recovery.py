"""Opening a store's directories: whose they are, what the journal says, which blocks are there.

Nothing is believed that does not prove itself ours: a directory with any other file in it is refused, and so
is a segment of another store, a format we do not read, a journal that lost entries. Of several records of
one block (key, epoch, quality) the last one written counts; what a purge killed is dead. 100,000 blocks take
about a second.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from kvstore.errors import ConfigError
from kvstore.frame import decode_header
from kvstore.nouns import BlockKey, NamespaceId
from kvstore.tiers.durable import RecoveredBlock
from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.disk import Disk
from kvstore.tiers.nvme.files import Files
from kvstore.tiers.nvme.journal import (
    JOURNAL,
    JOURNAL_NEW,
    STORE_ID_NBYTES,
    Journal,
    damaged,
    load_journal,
)
from kvstore.tiers.nvme.layout import (
    BLOCK_NBYTES,
    HEAD_NBYTES,
    PREFIX_NBYTES,
    Heads,
    Seal,
    columns,
)
from kvstore.tiers.nvme.notes import Purges
from kvstore.tiers.nvme.scan import Scanned, scan
from kvstore.tiers.nvme.segment import DEAD, UNADOPTED, Segment, Segments
from kvstore.tiers.nvme.segment_files import SEGMENT_NAME, UNFINISHED_NAME, SegmentFiles
from kvstore.tiers.nvme.threads import Threads

LOCK: Final = "lock"
_OURS: Final = frozenset({LOCK, JOURNAL, JOURNAL_NEW})
_LEFT_ALONE: Final = frozenset({"lost+found"})  # stands in the root of every ext4 file system
_IDENTITY: Final = ("namespace", "key", "epoch", "digest", "quality")

Indexes = npt.NDArray[np.int64]


class RecoveredBlocks(Sequence[RecoveredBlock]):
    """The heads of what survived, oldest first; each is decoded when it is asked for (10 us)."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads

    def __len__(self) -> int:
        return len(self._heads)

    @overload
    def __getitem__(self, index: int) -> RecoveredBlock: ...

    @overload
    def __getitem__(self, index: slice) -> list[RecoveredBlock]: ...

    def __getitem__(self, index: int | slice) -> RecoveredBlock | list[RecoveredBlock]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        record = index % len(self)
        head = self._heads[record].data
        nbytes = int.from_bytes(head[48:52], "little")
        return RecoveredBlock(record, decode_header(head[PREFIX_NBYTES:]), nbytes)


@dataclass(slots=True)
class Found:
    """The recovered records by number: which row of which segment each is."""

    blocks: RecoveredBlocks
    segments: list[Segment]  # of each record
    rows: Indexes


@dataclass(slots=True)
class Opened:
    disks: list[Disk]
    every: Segments
    journal: Journal
    found: Found
    locks: list[int]


async def open_directories(
    config: NvmeConfig, files: Files, threads: Threads, counters: Counter[str], draw: Callable[[int], int]
) -> Opened:
    """Raises ConfigError, OSError. Holds the directories' locks if it returns."""
    locks: list[int] = []
    try:
        names = await threads.run(lambda: _lock_and_list(config, files, locks))
        return await _open(config, files, threads, counters, draw, names, locks)
    except BaseException:
        for lock in locks:
            files.close(lock)
        raise


async def _open(
    config: NvmeConfig,
    files: Files,
    threads: Threads,
    counters: Counter[str],
    draw: Callable[[int], int],
    names: dict[Path, list[str]],
    locks: list[int],
) -> Opened:
    home = _journals_home(names)
    if home is None:
        journal = Journal(config.directories[0], files, threads, store := _new_id(draw))
    else:
        store, state, number = await threads.run(lambda: load_journal(home / JOURNAL, files))
        journal = Journal(home, files, threads, store)
        _check_owner(home, state.owner, config.owner)
        journal.inherit(state, number)
    journal.state.owner = config.owner or journal.state.owner
    of_segments = SegmentFiles(files, store, Seal(store), config.direct)
    every = Segments()
    disks = [Disk(at, config, of_segments, threads, counters, every, draw) for at in config.directories]
    scans = [
        threads.run(lambda disk=disk: _scan_directory(disk, names[disk.directory]))  # type: ignore[misc]
        for disk in disks
    ]
    scanned = await _all(scans)
    for one in (one for of_disk in scanned for one in of_disk):
        counters.update(one.counters)
        _check_journal(one, journal)
    counters["directory_sync_error"] += sum(disk.unsure for disk in disks)
    found = await threads.run(lambda: _index(disks, scanned, journal.state.purges, counters))
    return Opened(disks, every, journal, found, locks)


async def _all(scans: Sequence[Awaitable[list[Scanned]]]) -> list[list[Scanned]]:
    """All of them to their end, then the first error: no thread may go on in directories we unlock."""
    done = await asyncio.gather(*scans, return_exceptions=True)
    found: list[list[Scanned]] = []
    for one in done:
        if isinstance(one, BaseException):
            raise one
        found.append(one)
    return found


def _new_id(draw: Callable[[int], int]) -> bytes:
    return draw(8 * STORE_ID_NBYTES).to_bytes(STORE_ID_NBYTES, "little")


def _lock_and_list(config: NvmeConfig, files: Files, locks: list[int]) -> dict[Path, list[str]]:
    names: dict[Path, list[str]] = {}
    for directory in config.directories:
        files.make_directory(directory)
        found = files.names(directory)
        strangers = [name for name in found if not _is_ours(name)]
        if strangers:
            raise ConfigError(
                f"{directory} holds {strangers[0]!r}, which is not ours: give the nvme tier a directory of "
                "its own"
            )
        try:
            locks.append(files.lock(directory / LOCK))
        except BlockingIOError:
            raise ConfigError(
                f"{directory} is in use by another process: end it, or give this one another directory"
            ) from None
        names[directory] = files.names(directory)  # again: whoever held the lock may have changed it
    return names


def _is_ours(name: str) -> bool:
    known = name in _OURS or name in _LEFT_ALONE
    return known or bool(SEGMENT_NAME.fullmatch(name) or UNFINISHED_NAME.fullmatch(name))


def _journals_home(names: dict[Path, list[str]]) -> Path | None:
    """The directory with the journal; None for a new store."""
    homes = [directory for directory, found in names.items() if JOURNAL in found]
    if len(homes) > 1:
        raise ConfigError(f"{homes[0]} and {homes[1]} belong to two stores: name the directories of one")
    if not homes and any(SEGMENT_NAME.fullmatch(name) for found in names.values() for name in found):
        raise ConfigError(
            f"no {JOURNAL} in {', '.join(map(str, names))}, but segments: without it nobody knows what was "
            "purged. Name the directory that has it too, or empty these"
        )
    return homes[0] if homes else None


def _scan_directory(disk: Disk, names: Sequence[str]) -> list[Scanned]:
    disk.settle_names()
    found: list[Scanned] = []
    for name in names:
        if UNFINISHED_NAME.fullmatch(name):
            with suppress(OSError):  # it takes room until the next start
                disk.files.files.unlink(disk.directory / name)
        elif match := SEGMENT_NAME.fullmatch(name):
            found.append(scan(disk.files, disk.directory / name, int(match[1], 16)))
    return found


def _check_owner(home: Path, found: str, wanted: str) -> None:
    """Raises ConfigError for what another shard kept: clients look for none of its blocks here."""
    if found and wanted and found != wanted:
        raise ConfigError(
            f"{home} holds the blocks of {found}, this is {wanted}: give each shard the directory it had, or "
            "empty this one"
        )


def _check_journal(one: Scanned, journal: Journal) -> None:
    """Raises ConfigError when a record knew of a note that the journal does not have."""
    known = int(columns(one.heads)["notes"].max()) if len(one.heads) else 0
    if known > journal.number:
        raise damaged(JOURNAL, f"it ends at entry {journal.number}, and {known} were durable")


def _index(
    disks: Sequence[Disk], scanned: Sequence[Sequence[Scanned]], purges: Purges, counters: Counter[str]
) -> Found:
    """Segments with their columns; who is alive, oldest first."""
    segments: list[Segment] = []
    heads: list[Heads] = []
    for disk, found in zip(disks, scanned, strict=True):
        for one in found:
            segment = disk.add(one.segment_id, one.path, max(one.nbytes, BLOCK_NBYTES))
            segment.opaque = one.opaque
            _fill(segment, one.heads)
            segments.append(segment)
            heads.append(one.heads)
    every = np.concatenate(heads) if heads else np.empty((0, HEAD_NBYTES), dtype=np.uint8)
    alive = _alive(every, purges, counters)
    counts = [len(rows) for rows in heads]
    owner = np.repeat(np.arange(len(segments)), counts)[alive]
    first = np.cumsum([0, *counts])[:-1] if counts else np.empty(0, dtype=np.int64)
    rows = alive - first[owner] if len(alive) else alive
    of_record = [segments[i] for i in owner.tolist()]
    for segment, row in zip(of_record, rows.tolist(), strict=True):
        segment.give(row, UNADOPTED, 0)
    return Found(RecoveredBlocks(every[alive]), of_record, rows)


def _fill(segment: Segment, heads: Heads) -> None:
    rows = columns(heads)
    segment.offsets.frombytes(rows["offset"].astype("<u8").tobytes())
    segment.sizes.frombytes(rows["nbytes"].astype("<u4").tobytes())
    segment.sequences.frombytes(rows["sequence"].astype("<u8").tobytes())
    segment.slots.frombytes(np.full(len(rows), DEAD, dtype="<i8").tobytes())
    segment.generations.frombytes(np.zeros(len(rows), dtype="<u8").tobytes())
    segment.end = segment.synced = segment.nbytes
    segment.kept = len(rows)
    scopes = np.concatenate((rows["namespace"], _bytes_of(rows["epoch"])), axis=1)
    distinct, which = np.unique(scopes, axis=0, return_inverse=True)
    for i, scope in enumerate(distinct):
        namespace = NamespaceId(scope[:16].tobytes())
        epoch = int.from_bytes(scope[16:].tobytes(), "little")
        segment.oldest[namespace, epoch] = int(rows["sequence"][which.reshape(-1) == i].min())


def _bytes_of(column: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """(N,) of an integer as (N, its bytes)."""
    return np.ascontiguousarray(column).view(np.uint8).reshape(len(column), column.itemsize)


def _alive(heads: Heads, purges: Purges, counters: Counter[str]) -> Indexes:
    """Which rows count, by sequence: the last one of each block, if no purge killed it."""
    rows = columns(heads)
    parts = [column if (column := rows[name]).ndim == 2 else _bytes_of(column) for name in _IDENTITY]
    identities = np.concatenate(parts, axis=1)
    flat, width = identities.tobytes(), identities.shape[1]
    last: dict[bytes, int] = {}
    order = np.argsort(rows["sequence"], kind="stable")
    for row in order.tolist():
        last[flat[row * width : (row + 1) * width]] = row
    counters["superseded"] += len(heads) - len(last)
    alive = np.zeros(len(heads), dtype=np.bool_)
    alive[list(last.values())] = True
    for namespace in purges.namespaces():
        suspects = (rows["namespace"] == np.frombuffer(namespace, dtype=np.uint8)).all(axis=1) & alive
        for row in np.flatnonzero(suspects).tolist():
            one = rows[row]
            key, sequence = BlockKey(one["key"].tobytes()), int(one["sequence"])
            if purges.kills(namespace, int(one["epoch"]), key, sequence):
                alive[row] = False
                counters["purged"] += 1
    return order[alive[order]]
