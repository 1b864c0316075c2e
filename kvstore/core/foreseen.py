"""Versions brought to the host before anybody asked for them: what for, and what came of it.

    brought up --> matched on the host: in time
               --> matched while it was still below: late
               --> gone from the host, or never let in, or not asked for within `within_s`: wasted

Announced requests and predicted sessions keep separate accounts, in blocks and in bytes. What was wasted is
found out a bounded number at a time, in `settle`: the accounts lag by a few ticks, and nothing else pays.
Cost: O(1) a block brought up, O(run) a match while anything is on the books, nothing otherwise.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Final, NamedTuple

from kvstore.core.index import Index
from kvstore.core.moves import Moves
from kvstore.core.state import Announcement, Foresight
from kvstore.core.versions import ON_HOST, ON_NVME, gather

LOOKED_AT_A_TICK: Final = 1_024


class Why(enum.Enum):
    ANNOUNCED = "announced"
    PREDICTED = "predicted"


class _Expected(NamedTuple):
    generation: int
    why: Why
    since: float
    nbytes: int


class Foreseen:
    def __init__(self, index: Index, moves: Moves, foresight: Foresight, counters: Counter[str]) -> None:
        self._index = index
        self._moves = moves
        self._within_s = foresight.within_s
        self._keeps_s = {Why.ANNOUNCED: foresight.keeps_s, Why.PREDICTED: foresight.within_s}
        self._counters = counters
        self._expected: dict[int, _Expected] = {}  # by slot: never more than there are
        self.open_nbytes: Counter[Why] = Counter()  # of what is not judged yet

    def __len__(self) -> int:
        return len(self._expected)

    def judged_nbytes(self, why: Why) -> tuple[int, int]:
        """Bytes whose end is known, and those of them that were wasted."""
        used = (self._counters[f"prefetch:{why.value}_{outcome}_nbytes"] for outcome in ("in_time", "late"))
        wasted = self._counters[f"prefetch:{why.value}_wasted_nbytes"]
        return sum(used) + wasted, wasted

    def bring(self, run: Sequence[int], why: Why) -> list[int]:
        """Those of the run that come up now or were coming already, first blocks first.

        What would not fit the host beside the blocks before it is left where it is: it would only push them
        out again.
        """
        table, moves = self._index.versions, self._moves
        kept, until = self._index.kept, self._index.now + self._keeps_s[why]
        room, coming = self._index.host.capacity_nbytes, []
        for slot in run:
            room -= table.nbytes[slot]
            if room < 0:
                self._counters["prefetch:beyond_host"] += 1
                break
            if not self._index.is_live(slot):
                continue
            if not kept.keep(slot, until):
                self._counters[f"prefetch:{why.value}_not_kept"] += 1
            if table.residences[slot] & (ON_HOST | ON_NVME) != ON_NVME:
                continue
            was_coming = moves.is_coming(slot)
            if not was_coming and not moves.want_on_host((slot,)):
                continue
            coming.append(slot)
            if not was_coming:
                self._expect(slot, why)
        return coming

    def standing(self, places: Sequence[tuple[int, int]]) -> Announcement:
        """Where a run lies now: as much of it as is still what it was."""
        table = self._index.versions
        gone = next((i for i, place in enumerate(places) if not table.is_current(*place)), len(places))
        run = [slot for slot, _ in places[:gone]]
        coming = [slot for slot in run if self._moves.is_coming(slot)]
        nbytes = sum(gather(table.nbytes, coming))
        return Announcement(places[:gone], gather(table.tiers, run), coming, nbytes)

    def asked_for(self, run: Sequence[int]) -> None:
        """A reader matched these: what was brought up for it was worth it, if it is here by now."""
        table = self._index.versions
        for slot in run:
            expected = self._expected.get(slot)
            if expected is not None and expected.generation == table.generations[slot]:
                self._judge(slot, "in_time" if table.residences[slot] & ON_HOST else "late")

    def settle(self, looked_at_max: int = LOOKED_AT_A_TICK) -> None:
        """Find what left the host unused, or stayed too long; whom it looked at comes last next time."""
        table, now = self._index.versions, self._index.now
        for slot in self._index.kept.past(now, looked_at_max):
            for room in self._index.rooms:
                room.evictables.may_go_again(slot)
        for slot in list(islice(self._expected, looked_at_max)):
            expected = self._expected[slot]
            here = table.generations[slot] == expected.generation and (
                table.residences[slot] & ON_HOST or self._moves.is_coming(slot)
            )
            if not here or now - expected.since > self._within_s:
                self._judge(slot, "wasted")
            else:
                self._expected[slot] = self._expected.pop(slot)

    # -- inside ------------------------------------------------------------------------------------

    def _expect(self, slot: int, why: Why) -> None:
        if slot in self._expected:  # it left the host since, or its slot holds another version
            self._judge(slot, "wasted")
        table = self._index.versions
        nbytes = table.nbytes[slot]
        self._expected[slot] = _Expected(table.generations[slot], why, self._index.now, nbytes)
        self.open_nbytes[why] += nbytes
        self._counters[f"prefetch:{why.value}_blocks"] += 1

    def _judge(self, slot: int, outcome: str) -> None:
        expected = self._expected.pop(slot)
        self.open_nbytes[expected.why] -= expected.nbytes
        self._counters[f"prefetch:{expected.why.value}_{outcome}"] += 1
        self._counters[f"prefetch:{expected.why.value}_{outcome}_nbytes"] += expected.nbytes
