"""Announced requests on one shard: what a reader is about to ask for comes up from below, waited for or not.

Waiting is bounded thrice: by the caller's `wait_s`, by its deadline less the time an answer needs, and by
WAITING_MAX callers at one time. Whoever finds no place is answered at once, as if its time were over: an
announcement is worth what was done by then, and is never an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvstore.core.shard import ShardCore
from kvstore.mover import Mover
from kvstore.nouns import BlockKey, Snapshot
from kvstore.transport.base import Announced

WAITING_MAX: Final = 32  # half of what one client's stream may have waiting: the rest is for other calls
ANSWER_S: Final = 0.25  # of the caller's deadline, a quarter of it at most: kept for the answer's way


class Announcements:
    def __init__(self, core: ShardCore, mover: Mover | None) -> None:
        self._core = core
        self._mover = mover
        self._waiting = 0

    async def announce(
        self, snapshot: Snapshot, keys: Sequence[BlockKey], wait_s: float, timeout_s: float
    ) -> Announced:
        found, mover = self._core.announce(snapshot, keys), self._mover
        if mover is None or not found.coming:
            return Announced(found.tiers, 0, 0, 0.0 if mover is None else mover.promoted.a_second)
        mover.wake()
        wait_s = min(wait_s, timeout_s - min(ANSWER_S, timeout_s / 4))
        if wait_s > 0 and self._waiting < WAITING_MAX:
            self._waiting += 1
            try:
                await mover.wait_for([self._core.index.ref(slot) for slot in found.coming], wait_s)
            finally:
                self._waiting -= 1
            found = self._core.foreseen.standing(found.places)
        elif wait_s > 0:
            self._core.counters["announcements_not_waited"] += 1
        return Announced(found.tiers, len(found.coming), found.coming_nbytes, mover.promoted.a_second)
