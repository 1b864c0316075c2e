"""Blocks that became full, on their way out of the pool while steps go on.

    step n     begin(its full blocks)                 a copy is issued, and not waited for
    step n+1   take() -> blocks of step n             if it is done

A block is handed on with the step it became full in or, at the latest, with the one in which its sequence
ends, parks or leaves: by then it is waited for. On a CPU copies are done at once. Order is kept, within a
sequence and over all. Bounded: of more than `UNDER_WAY_NBYTES_MAX` the oldest are waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from engine.pool import BlockRead, KVPool
from engine.types import CompletedBlock

__all__ = ["BlockCopies", "FullBlock"]

UNDER_WAY_NBYTES_MAX: Final = 256 << 20


class FullBlock(NamedTuple):
    """Who filled the slot, and which block of its chain that is."""

    request_id: str
    attempt: int
    chain_index: int
    slot: int


class _UnderWay(NamedTuple):
    blocks: list[FullBlock | None]  # None: nobody waits for it any more
    read: BlockRead

    def concerns(self, goes_on: Callable[[str], bool]) -> bool:
        """Does one of them belong to a request that does not go on?"""
        return any(block is not None and not goes_on(block.request_id) for block in self.blocks)


class BlockCopies:
    """One engine's, of its thread."""

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._under_way: deque[_UnderWay] = deque()
        self._late = 0

    @property
    def late(self) -> bool:
        """Are there some that the last `take` left behind?"""
        return self._late > 0

    def begin(self, blocks: Sequence[FullBlock]) -> None:
        """Copy out what the work issued so far leaves there. The slots must be their sequences' when it is
        asked, and may change hands from here on."""
        if blocks:
            read = self._pool.begin_read([block.slot for block in blocks])
            self._under_way.append(_UnderWay([*blocks], read))

    def take(self, goes_on: Callable[[str], bool]) -> list[CompletedBlock]:
        """Those that are here, and all up to the last one of a request that does not go on."""
        due, behind = 0, sum(len(copied.blocks) for copied in self._under_way)
        for number, copied in enumerate(self._under_way, 1):
            too_many = behind * self._pool.block_nbytes > UNDER_WAY_NBYTES_MAX
            if too_many or copied.read.done() or copied.concerns(goes_on):
                due = number
            behind -= len(copied.blocks)
        self._late = len(self._under_way) - due
        return [block for _ in range(due) for block in _completed(self._under_way.popleft())]

    def forget(self, request_id: str) -> None:
        """Nobody waits for its blocks any more."""
        for blocks, _ in self._under_way:
            for index, block in enumerate(blocks):
                if block is not None and block.request_id == request_id:
                    blocks[index] = None

    def forget_all(self) -> None:
        """Of other weights than what comes: nobody may take them for those."""
        self._under_way.clear()
        self._late = 0


def _completed(copied: _UnderWay) -> list[CompletedBlock]:
    return [
        CompletedBlock(block.request_id, block.attempt, block.chain_index, payload, block.slot)
        for block, payload in zip(copied.blocks, copied.read.take(), strict=True)
        if block is not None
    ]
