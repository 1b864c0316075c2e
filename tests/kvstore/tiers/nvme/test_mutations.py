"""The proof of the proof: each rule of durability broken on purpose is found by a test named here.

python -m tests.kvstore.tiers.nvme.test_mutations                     the table: what is broken, where it dies
python -m tests.kvstore.tiers.nvme.test_mutations no_sync rot          some of it
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.tiers.base import Place
from kvstore.tiers.nvme import journal, recovery, scan
from kvstore.tiers.nvme.appender import Appender, Pending
from kvstore.tiers.nvme.disk import Disk
from kvstore.tiers.nvme.files import Files
from kvstore.tiers.nvme.index import Index
from kvstore.tiers.nvme.journal import Journal
from kvstore.tiers.nvme.notes import pack
from kvstore.tiers.nvme.oldest import Oldest, find_oldest
from kvstore.tiers.nvme.segment import Segment
from kvstore.tiers.nvme.segment_files import SegmentFiles
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme import test_crash, test_faults, test_purges, test_reclaiming, test_tier

Patch = pytest.MonkeyPatch
Proof = Callable[..., Awaitable[None]]
COPIES_BEGIN: Final = 1 << 39


class Without:
    """Files, but for one method that does nothing."""

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: None) if name == self._name else getattr(self._files, name)


def no_sync(patch: Patch) -> None:
    """Frames count as kept when they are written."""

    async def sync(appender: Appender) -> None:
        if appender.segment is not None:
            _all_kept(appender, appender.segment)

    patch.setattr(Appender, "_sync", sync)


def _all_kept(appender: Appender, segment: Segment) -> None:
    segment.synced, segment.kept = segment.end, len(segment)
    kept, appender._submitted = appender._submitted, []
    appender._kept([pending for pending in kept if pending.alive])


def sync_retried(patch: Patch) -> None:
    """A sync that fails is tried once more at once, and believed."""

    async def sync(appender: Appender) -> None:
        segment, handle = appender.segment, appender._handle
        if segment is None or segment.synced == segment.end:
            return
        files = appender.disk.files.files
        try:
            await appender.disk.threads.run(lambda: files.sync(handle))
        except OSError:
            try:
                await appender.disk.threads.run(lambda: files.sync(handle))
            except BaseException:
                await appender._fail(segment)
                raise
        _all_kept(appender, segment)

    patch.setattr(Appender, "_sync", sync)


def writes_go_on_behind_an_error(patch: Patch) -> None:
    """A segment whose sync failed is synced again by the next one."""

    async def fail(appender: Appender, segment: Segment) -> None:
        appender.disk.counters["segments_failed"] += 1

    patch.setattr(Appender, "_fail", fail)


def losses_untold(patch: Patch) -> None:
    """What a failed sync lost stays believed."""
    patch.setattr(NvmeTier, "_forget", lambda tier: tier._unconfirmed.clear())


def _journal_without(method: str) -> Callable[[Patch], None]:
    def mutation(patch: Patch) -> None:
        begin = Journal.__init__

        def careless(of: Journal, directory: Path, files: Files, *rest: Any) -> None:
            begin(of, directory, Without(files, method), *rest)

        patch.setattr(Journal, "__init__", careless)

    mutation.__name__ = f"journal_without_{method}"
    mutation.__doc__ = f"Notes and rewrites of the journal count without `{method}`."
    return mutation


def note_unsynced(patch: Patch) -> None:
    """A note counts when it is written."""

    async def write(of: Journal, documents: list[list[object]]) -> None:
        assert of._handle is not None
        of._given += 1
        entry = journal.encode_entry(of._given, pack(documents), of._seal)
        of._files.write(of._handle, [memoryview(entry)], of._nbytes)
        of._nbytes += len(entry)
        of.number = of._given

    patch.setattr(Journal, "_write", write)


def life_unnoted(patch: Patch) -> None:
    """Segments are written before the life they are of is noted."""

    async def begin(of: Journal) -> None:
        return None

    patch.setattr(Journal, "begin", begin)


def scan_unsynced(patch: Patch) -> None:
    """What a scan finds in the page cache is believed to stay."""
    patch.setattr(scan, "_settled", lambda *_: True)


def unlink_unsynced(patch: Patch) -> None:
    """A removed segment counts as gone before its directory is synced."""
    patch.setattr(SegmentFiles, "remove", lambda of, path: of.files.unlink(path))


def segment_name_unsynced(patch: Patch) -> None:
    """A new segment is written to before its name is durable."""
    make = SegmentFiles.make

    def careless(of: SegmentFiles, *rest: Any) -> int:
        files: Any = Without(of.files, "sync_directory")
        return make(SegmentFiles(files, of.store, of.seal, of.direct), *rest)

    patch.setattr(SegmentFiles, "make", careless)


def unlink_before_copies(patch: Patch) -> None:
    """A victim goes when its copies are written, not when they are durable."""
    begin, sync = Appender.__init__, Appender.sync

    def careless(
        of: Appender, disk: Any, notes: Any, written: Any, kept: Any, *rest: Any, **more: Any
    ) -> None:
        begin(of, disk, notes, kept if more.get("copies") else written, kept, *rest, **more)

    patch.setattr(Appender, "__init__", careless)
    patch.setattr(Appender, "sync", lambda of: of.drain() if of._copies else sync(of))


def copies_anew(patch: Patch) -> None:
    """A copy has a sequence number of its own."""
    put = Appender.put

    def renumbered(of: Appender, pending: Pending) -> None:
        if of._copies:
            pending.sequence += COPIES_BEGIN
        put(of, pending)

    patch.setattr(Appender, "put", renumbered)


def _forgets_in_spite_of(reason: str) -> Callable[[Patch], None]:
    def mutation(patch: Patch) -> None:
        async def careless(tier: NvmeTier) -> Oldest:
            assert tier._opened is not None
            unsure = reason != "unsure" and any(disk.unsure for disk in tier._opened.disks)
            beginning = [] if reason == "beginning" else list(tier._beginning)
            every = [] if reason == "segments" else tier._opened.every.by_number.values()
            queued = [] if reason == "queued" else [p for fresh in tier._fresh for p in fresh.unkept()]
            return await find_oldest(every, queued, [0] if unsure else beginning)

        patch.setattr(NvmeTier, "_find_oldest", careless)

    mutation.__name__ = f"forgets_in_spite_of_{reason}"
    mutation.__doc__ = f"A purge is forgotten whatever may still come: {reason}."
    return mutation


def opaque_ignored(patch: Patch) -> None:
    """A purge is forgotten though a file may hold records that nobody knows of."""

    async def careless(segments: Any, *rest: Any) -> Oldest:
        known = list(segments)
        for segment in known:
            segment.opaque = False
        return await find_oldest(known, *rest)

    patch.setattr("kvstore.tiers.nvme.tier.find_oldest", careless)


def footer_first(patch: Patch) -> None:
    """A footer is written before what it proves was synced."""

    async def seal(appender: Appender, segment: Segment) -> None:
        handle, disk, heads, end = appender._handle, appender.disk, segment.heads, segment.end
        finish = disk.files.finish
        segment.nbytes = await disk.threads.run(lambda: finish(handle, segment.id, heads, end))
        appender.segment = None
        _all_kept(appender, segment)
        await appender._end(segment, handle)

    patch.setattr(Appender, "_seal", seal)


def torn_believed(patch: Patch) -> None:
    """Frames above the synced mark are handed out unread."""
    patch.setattr(scan, "_is_intact", lambda *_: True)


def synced_too_far(patch: Patch) -> None:
    """A prefix names what was written as what was synced."""
    place = Appender._place

    def boastful(of: Appender, segment: Segment, pending: Pending) -> None:
        synced, segment.synced = segment.synced, segment.end
        place(of, segment, pending)
        segment.synced = synced

    patch.setattr(Appender, "_place", boastful)


def old_journal(patch: Patch) -> None:
    """A journal that lost entries is good enough."""
    patch.setattr(recovery, "_check_journal", lambda *_: None)


def names_unsettled(patch: Patch) -> None:
    """A start does not sync the directories it finds."""
    patch.setattr(Disk, "settle_names", lambda _: None)


def generation(patch: Patch) -> None:
    """A discard is of whatever the slot holds now."""
    discard = Index.discard
    patch.setattr(Index, "discard", lambda of, at: discard(of, Place(at.slot, of.generation(at.slot))))


def readers(patch: Patch) -> None:
    """A file goes from under who reads it."""
    patch.setattr(Segment, "is_reclaimable", property(lambda s: not s.is_open and not s.live_nbytes))


_CRASH: Final = test_crash.test_power_may_fail_at_every_operation
_FAULT: Final = test_faults.test_any_operation_may_fail
MUTATIONS: dict[Callable[[Patch], None], Proof] = {
    no_sync: _CRASH,
    sync_retried: _FAULT,
    writes_go_on_behind_an_error: test_faults.test_a_failed_sync_is_never_tried_again,
    losses_untold: test_faults.test_a_failed_sync_is_never_tried_again,
    _journal_without("sync_directory"): test_purges.test_a_note_that_is_kept_is_in_the_file_that_is_found,
    _journal_without("sync"): _CRASH,
    note_unsynced: _CRASH,
    life_unnoted: _CRASH,
    scan_unsynced: test_crash.test_a_scan_makes_durable_what_it_found_before_it_says_so_in_a_footer,
    unlink_unsynced: test_purges.test_a_purge_is_forgotten_when_its_files_are_gone_for_good_on_every_disk,
    segment_name_unsynced: _CRASH,
    unlink_before_copies: _CRASH,
    copies_anew: test_purges.test_a_copy_is_as_old_as_its_original,
    _forgets_in_spite_of("queued"): test_purges.test_a_purge_outlives_frames_that_were_still_queued,
    _forgets_in_spite_of("beginning"): test_purges.test_a_purge_counts_for_writes_that_began_before_it,
    _forgets_in_spite_of("segments"): _CRASH,
    _forgets_in_spite_of("unsure"): test_purges.test_a_purge_is_kept_while_a_removed_file_may_come_back,
    opaque_ignored: test_purges.test_a_purge_is_kept_while_a_file_may_hold_records_that_nobody_knows_of,
    footer_first: _CRASH,
    torn_believed: _CRASH,
    synced_too_far: _CRASH,
    old_journal: test_purges.test_a_journal_that_knows_less_than_a_record_did_is_refused,
    names_unsettled: test_purges.test_a_file_that_a_killed_process_unlinked_stays_gone,
    generation: test_tier.test_generations_keep_slots_apart,
    readers: test_reclaiming.test_a_file_stays_until_its_last_reader_is_done,
}
"""What is broken -> the test that finds it."""

_GROWTH: Final = {test_purges.__name__: 0, test_crash.__name__: 1_000, test_faults.__name__: 1_000}
"""How early those tests have the journal rewritten."""
_GIVEN: Final[dict[str, Callable[[], object]]] = {
    "tmp_path": lambda: Path(tempfile.mkdtemp(prefix="mutations-")),
    "code": lambda: 5,
}


def died_as(mutation: Callable[[Patch], None], patch: Patch) -> str | None:
    """How the test failed; None when it passed."""
    proof = MUTATIONS[mutation]
    if (growth := _GROWTH.get(proof.__module__)) is not None:
        patch.setattr(journal, "GROWTH_NBYTES", growth)
    mutation(patch)
    given = {name: _GIVEN[name]() for name in inspect.signature(proof).parameters}
    try:
        asyncio.run(asyncio.wait_for(proof(**given), 120))
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.fixture
def patched() -> Iterator[Patch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_dies(mutation: Callable[[Patch], None], patched: Patch) -> None:
    if died_as(mutation, patched) is None:
        pytest.fail(f"lives through {MUTATIONS[mutation].__name__}: {mutation.__doc__}")


def main(chosen: list[str]) -> int:
    """Print the table. How many mutations live."""
    alive = 0
    for mutation, proof in MUTATIONS.items():
        if chosen and mutation.__name__ not in chosen:
            continue
        with pytest.MonkeyPatch.context() as patch:
            found = died_as(mutation, patch)
        alive += found is None
        what = "LIVES" if found is None else (found.splitlines() or [""])[0][:70]
        print(f"{mutation.__name__:34}{proof.__name__:72}{what}", flush=True)
    return alive


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
