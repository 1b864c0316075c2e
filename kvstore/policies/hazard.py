"""The least likely to be used again within the next moment goes first: the default.

Blocks fall into ten categories by what is known of them at their last use: how often they were used, and
whether the request's prefix went on behind them. Of each category is learnt online how many of its blocks are
used again, p = R / N, and after how long in the mean, tau = S / R (N uses that put a block there, R uses that
found one there, S the sum of their gaps, blocks that were given up and came back included). With exponential
gaps, a block whose last use is `a` seconds ago is used again in the next moment at the rate

    h(a) = (p / tau) e^(-a / tau) / (1 - p + p e^(-a / tau))

which falls with a. So each category is a list in order of last use, and only the heads are compared: O(1)
a use, O(categories) a victim. Counts are halved every 20,000 uses, so it follows its workload; until it has
seen some, priors speak (p 0.3, tau 300 s, worth 20 uses), under which it is least recently used.

After the workload-aware policy of Wang et al., "KVCache Cache in the Wild" (ATC 2025, arXiv 2506.02634),
which knows types of requests; a store knows none. What was measured and which other categories were tried:
docs/benchmarks.md, docs/devlog.md.
"""

from __future__ import annotations

from math import exp
from typing import Final

from kvstore.core.links import SlotList
from kvstore.core.seams import MakeQueue, Seen
from kvstore.core.uses import Use
from kvstore.policies.ghosts import Ghost, Ghosts

_PRIOR_P: Final = 0.3
_PRIOR_TAU_S: Final = 300.0
_PRIOR_USES: Final = 20.0
_USES_BETWEEN_HALVINGS: Final = 20_000
_P_MAX: Final = 0.999
_GHOSTS: Final = 8
"""Blocks remembered of those given up, for each that is held. With 1 the hit rate of 5,860 blocks in
docs/benchmarks.md is 1.5 points less, with 4 it is 0.2 less."""
_COUNT_BINS: Final = bytes((0, 0, 1, 2, 2, 3, 3, 3, 3)).ljust(256, b"\4")
"""Of used once, twice, 3 or 4, 5 to 8, more."""
_COUNTS: Final = 5
_CATEGORIES: Final = 2 * _COUNTS


class Learnt:
    """What all queues of a tier know of the categories. Place c + 1 is category c."""

    __slots__ = ("_after", "_expected", "_gaps_s", "_placed", "_returned", "_tau_s", "ghosts")

    def __init__(self) -> None:
        self._placed, self._returned, self._gaps_s = ([0.0] * (_CATEGORIES + 1) for _ in range(3))
        self._after = _USES_BETWEEN_HALVINGS
        self.ghosts = Ghosts()

    def place(self, count: int, is_last: bool) -> int:
        """Of a block used so often, at the end of its request's chain or before."""
        return 1 + is_last * _COUNTS + _COUNT_BINS[count]

    def put(self, place: int) -> None:
        self._placed[place] += 1

    def came_back(self, place: int, gap_s: float) -> None:
        self._returned[place] += 1
        self._gaps_s[place] += gap_s

    def forget_slowly(self, uses: int) -> None:
        self._after -= uses
        if self._after <= 0:
            self._after = _USES_BETWEEN_HALVINGS
            for sums in (self._placed, self._returned, self._gaps_s):
                sums[:] = (total / 2 for total in sums)

    def hazard(self, place: int, age_s: float) -> float:
        """The rate, a second, at which a block of this place and age is used again."""
        returned = self._returned[place] + _PRIOR_USES * _PRIOR_P
        p = min(_P_MAX, returned / (self._placed[place] + _PRIOR_USES))
        tau_s = (self._gaps_s[place] + _PRIOR_USES * _PRIOR_P * _PRIOR_TAU_S) / returned
        still = p * exp(-age_s / tau_s)
        return still / tau_s / (1 - p + still)


class Hazard:
    """One queue."""

    __slots__ = ("_at_s", "_learnt", "_length", "_orders", "_rates", "_seen")

    def __init__(self, seen: Seen, learnt: Learnt) -> None:
        self._seen = seen
        self._learnt = learnt
        self._orders: dict[int, SlotList] = {}
        self._length = 0
        self._at_s: float | None = None
        self._rates: dict[int, float] = {}  # of each list's head, at `_at_s`

    def use(self, use: Use) -> None:
        uses, places, learnt = self._seen.uses, self._seen.places, self._learnt
        counts, used_s, indexes, last = uses.counts, uses.used_s, uses.chain_indexes, use.span - 1
        self._at_s = None
        for slot in use.slots:
            count, before = counts[slot], places[slot]
            if before:
                self._orders[before].remove(slot)
                self._length -= 1
                learnt.came_back(before, use.now - used_s[slot])
            elif not count and (ghost := learnt.ghosts.take(uses.fingerprint(slot))) is not None:
                learnt.came_back(ghost.place, use.now - ghost.used_s)
                count = ghost.uses
                uses.known_again(slot, count)
            place = learnt.place(min(count + 1, 255), indexes[slot] == last)
            learnt.put(place)
            self._append(place, slot)
        learnt.forget_slowly(len(use.slots))

    def lift(self, slot: int) -> None:
        place = self._seen.places[slot]
        self._orders[place].remove(slot)
        self._length -= 1
        self._rate(place)

    def put_back(self, slot: int) -> None:
        place = self._seen.places[slot]
        self._orders[place].prepend(slot)
        self._length += 1
        self._rate(place)

    def remove(self, slot: int, evicted: bool) -> None:
        self.lift(slot)
        uses, places = self._seen.uses, self._seen.places
        if evicted:
            ghost = Ghost(places[slot], uses.counts[slot], uses.used_s[slot])
            self._learnt.ghosts.add(uses.fingerprint(slot), ghost, _GHOSTS * self._length)
        places[slot] = 0

    def victim(self, now: float) -> int | None:
        if self._at_s != now:  # else a transaction goes on to make room: only the heads it took have changed
            self._at_s = now
            for place in self._orders:
                self._rate(place)
        if not self._rates:
            return None
        return self._orders[min(self._rates, key=self._rates.__getitem__)].first()

    def __len__(self) -> int:
        return self._length

    def _rate(self, place: int) -> None:
        """Its list may have another head."""
        head = self._orders[place].first()
        if head is None:
            self._rates.pop(place, None)
        elif self._at_s is not None:
            self._rates[place] = self._learnt.hazard(place, self._at_s - self._seen.uses.used_s[head])

    def _append(self, place: int, slot: int) -> None:
        order = self._orders.get(place)
        if order is None:
            order = self._orders[place] = SlotList(self._seen.links)
        order.append(slot)
        self._length += 1
        self._seen.places[slot] = place


def hazard(seen: Seen) -> MakeQueue:
    learnt = Learnt()
    return lambda: Hazard(seen, learnt)
