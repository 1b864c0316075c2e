"""Loads: pinned blocks of the store into blocks of vLLM's pool that nobody reads until they are reported.

    loop       read a few blocks -> verified in staging -> a thread scatters them -> the next few
    report()   takes what ended; ends what is overdue itself

What is not verified, late or missing ends the load there: its vLLM block and all behind it are failed blocks,
in the same report as the end. A load has one end, whoever comes first: its task, its request's abort, or the
deadline (`load_timeout_s`, with `_GRACE_S` for the loop). From then on it writes no more, since vLLM may give
the blocks to others: a write holds the load's lock, and looks first.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import structlog

from kvstore.answers import BlockMiss, VerifiedBlock
from kvstore.errors import KVStrataError
from kvstore.integrations.vllm.conversion import Pool
from kvstore.integrations.vllm.copies import Copies
from kvstore.integrations.vllm.floor import Floor
from kvstore.integrations.vllm.plans import Load
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.staging import Staging
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.integrations.vllm.tallies import Tallies
from kvstore.nouns import PinnedBlock
from kvstore.session import StoreSession
from kvstore.tiers.copying import all_done

__all__ = ["Loader"]

log = structlog.get_logger(__name__)

_CHUNK_NBYTES: Final = 32 << 20
_AT_ONCE: Final = 2  # loads that hold memory; the others wait for their turn
_GRACE_S: Final = 1.0


class _UnderWay:
    """One load. `good`: tokens up to here are in vLLM's blocks, verified."""

    def __init__(self, load: Load, began: float, deadline: float, after: Callable[[], None] | None) -> None:
        self.load, self.after = load, after
        self.began, self.deadline = began, deadline
        self.good = load.begin
        self._is_over = False
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        return self._is_over

    def write(self, scatter: Callable[[], None], good: int) -> bool:
        """Unless it is over. No end comes in between."""
        with self._lock:
            if self._is_over:
                return False
            scatter()
            self.good = good
            return True

    def end(self, *, may_wait: bool) -> bool:
        """True for one caller alone: the load is over, and the report is his. Without waiting False also
        while something is written."""
        if not self._lock.acquire(blocking=may_wait):
            return False
        try:
            ended, self._is_over = not self._is_over, True
            return ended
        finally:
            self._lock.release()


class Loader:
    """One worker's. `counters` of the tallies: loaded_blocks, loaded_bytes, and missed_blocks by reason."""

    def __init__(
        self, setup: Setup, store: StoreSide, pool: Pool, copies: Copies, floor: Floor, tallies: Tallies,
        *, pinned: bool,
    ) -> None:  # fmt: skip
        self._setup, self._store = setup, store
        self._pool, self._copies = pool, copies
        self._floor, self._tallies = floor, tallies
        self._chunk = max(1, _CHUNK_NBYTES // setup.layout.block_nbytes)
        self._staging = Staging(
            _AT_ONCE * self._chunk * setup.layout.block_nbytes, setup.layout, pinned=pinned
        )
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._under_way: list[_UnderWay] = []

    @property
    def held_slots(self) -> int:
        return self._staging.held

    # -- vLLM's thread -----------------------------------------------------------------------------

    def start(self, load: Load) -> None:
        self._floor.lower(load.epoch, ((block.epoch, block.quality) for run in load.runs for block in run))
        now = self._store.clock.now()
        under_way = _UnderWay(load, now, now + self._setup.config.load_timeout_s, self._copies.mark())
        self._under_way.append(under_way)
        self._store.begin(self._load(under_way))

    def abort(self, request_id: str) -> None:
        """Its blocks are for nobody any more. If some are being written now, it ends right after."""
        for under_way in self._under_way:
            if under_way.load.request_id == request_id:
                under_way.deadline = self._store.clock.now() - _GRACE_S
                self._end(under_way, "aborted", may_wait=False)

    def end_overdue(self) -> None:
        """To be called before a report is taken: the loop may stand still, vLLM must not."""
        late = self._store.clock.now() - _GRACE_S
        for under_way in self._under_way:
            if under_way.deadline <= late and not under_way.is_over:
                self._end(under_way, "deadline", may_wait=False)
        self._under_way = [under_way for under_way in self._under_way if not under_way.is_over]

    @property
    def is_loading(self) -> bool:
        return any(not under_way.is_over for under_way in self._under_way)

    def close(self) -> None:
        """No load writes after this."""
        for under_way in self._under_way:
            self._end(under_way, "closed", may_wait=True)
        self._under_way.clear()

    # -- the loop ----------------------------------------------------------------------------------

    async def _load(self, under_way: _UnderWay) -> None:
        reason = "unexpected"
        try:
            async with asyncio.timeout(under_way.deadline - self._store.clock.now()):
                reason = await self._filled(under_way)
        except TimeoutError:
            reason = "deadline"
        except KVStrataError as error:
            log.warning("a load broke off", request=under_way.load.request_id, error=str(error))
            reason = "store"
        finally:
            self._end(under_way, reason, may_wait=True)

    async def _filled(self, under_way: _UnderWay) -> str:
        """Until all is there, or why it is not. Bounded by whoever calls."""
        load, setup = under_way.load, self._setup
        session = await self._store.session(setup.spec_of(setup.rank, load.adapter), load.epoch)
        if session is None:
            return "store"
        async with self._turns:
            size = setup.layout.block_tokens
            first, blocks = load.begin // size, load.runs[setup.rank]
            for start in range(0, len(blocks), self._chunk):
                with self._slots(min(self._chunk, len(blocks) - start)) as slots:
                    some = blocks[start : start + len(slots)]
                    reason = await self._fill_some(under_way, session, first + start, some, slots)
                if reason or under_way.is_over:
                    return reason
        return "absent"

    async def _fill_some(
        self, under_way: _UnderWay, session: StoreSession, first: int, blocks: Sequence[PinnedBlock],
        slots: list[int],
    ) -> str:  # fmt: skip
        """Read and scatter chain blocks from `first` on. Why it ends here; empty: it goes on."""
        load, size, theirs = under_way.load, self._setup.layout.block_tokens, self._setup.vllm_block_tokens
        timeout_s = max(0.0, under_way.deadline - self._store.clock.now())
        buffers = [self._staging.payload(slot) for slot in slots]
        answers = await session.read_into(blocks, buffers, timeout_s=timeout_s)
        good: list[VerifiedBlock] = []
        reason = ""
        for answer in answers:
            if isinstance(answer, BlockMiss):
                reason = answer.reason.value
                break
            good.append(answer)
        self._floor.lower(load.epoch, ((answer.epoch, answer.quality) for answer in good))
        begin, end = max(load.begin, first * size), min(load.end, (first + len(good)) * size)
        if end > begin:
            pieces = self._pool.pieces(load.block_ids[begin // theirs :], begin, end, slots)
            into = functools.partial(self._copies.into, pieces, self._staging.memory, under_way.after)
            loop = asyncio.get_running_loop()
            writing = loop.run_in_executor(None, under_way.write, into, end)
            await all_done([writing])
            if writing.result():
                self._tallies.count("loaded_blocks", len(good))
                self._tallies.count("loaded_bytes", len(good) * self._setup.layout.block_nbytes)
        return reason

    @contextlib.contextmanager
    def _slots(self, count: int) -> Iterator[list[int]]:
        slots = self._staging.take(count)
        assert len(slots) == count, "there is a chunk for each turn"
        try:
            yield slots
        finally:
            self._staging.give_back(slots)

    # -- both --------------------------------------------------------------------------------------

    def _end(self, under_way: _UnderWay, reason: str, *, may_wait: bool) -> None:
        if not under_way.end(may_wait=may_wait):
            return
        load, size, theirs = under_way.load, self._setup.layout.block_tokens, self._setup.vllm_block_tokens
        failed = set(load.block_ids[under_way.good // theirs : load.end // theirs])
        if failed:
            missed = -(-(load.end - under_way.good) // size)
            self._tallies.count(f"missed_blocks:{reason}", missed)
        self._tallies.took("load", self._store.clock.now() - under_way.began)
        self._tallies.loaded(load.request_id, failed)
