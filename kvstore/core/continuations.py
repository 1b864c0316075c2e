"""Sessions that will likely go on: their chains come up from below before the next turn asks for them.

A session is known by the slot its last use ended with. While the disk has nothing else to do, the likeliest
of those that lie below are wanted on the host, each as a whole or not at all: a run with a gap serves no
one. What was brought up and is not used yet never holds more than a share of the host. The account of bytes
used in time and bytes wasted is kept with a half life; while too large a part was wasted nothing is brought
up, until so much of the account has faded that it is worth another try.

Cost: O(1) a use; a tick looks at TAILS_A_TICK sessions and walks the chains it brings up.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

from kvstore.core.foreseen import Foreseen, Why
from kvstore.core.index import Index
from kvstore.core.moves import Moves
from kvstore.core.seams import ContinuationPredictor
from kvstore.core.state import Foresight
from kvstore.core.uses import Use
from kvstore.core.versions import NONE, ON_HOST, ON_NVME

SESSIONS_MAX: Final = 4_096
TAILS_A_TICK: Final = 256
_TRIAL: Final = 0.25  # of the budget: judged less than this, nothing is held against the predictor


class Continuations:
    def __init__(
        self,
        index: Index,
        moves: Moves,
        foreseen: Foreseen,
        predictor: ContinuationPredictor,
        foresight: Foresight,
    ) -> None:
        self._index = index
        self._moves = moves
        self._foreseen = foreseen
        self._predictor = predictor
        self._foresight = foresight
        self._budget_nbytes = int(foresight.share * index.host.capacity_nbytes)
        self._tails: dict[int, int] = {}  # last slot of a session's chain -> its generation
        self._spent = self._wasted = 0.0  # bytes judged, and those of them that were wasted; both fade
        self._seen = 0, 0  # the same, of all time
        self._faded_at = 0.0
        if index.nvme.capacity_nbytes and self._budget_nbytes:
            index.uses.observers.append(self._used)

    def bring_likely(self) -> int:
        """Want the likeliest sessions on the host. How many of their blocks."""
        self._account()
        if not self._budget_nbytes or len(self._moves) or self._moves.any_wanted() or self.is_wasteful:
            return 0
        likely: list[tuple[float, int]] = []
        for slot in list(islice(self._tails, TAILS_A_TICK)):
            if not self._index.versions.is_current(slot, generation := self._tails.pop(slot)):
                continue
            self._tails[slot] = generation  # whoever was looked at comes last next time
            chance = self._probability(slot)
            if chance >= self._foresight.probability_min:
                likely.append((chance, slot))
        likely.sort(reverse=True)
        return sum(self._bring(slot) for _, slot in likely)

    @property
    def is_wasteful(self) -> bool:
        judged = self._spent > _TRIAL * self._budget_nbytes
        return judged and self._wasted > self._foresight.waste_max * self._spent

    # -- inside ------------------------------------------------------------------------------------

    def _used(self, use: Use) -> None:
        tail = use.slots[0]
        self._tails.pop(use.base, None)  # the turn before ended there
        self._tails.pop(tail, None)
        if len(self._tails) >= SESSIONS_MAX:
            del self._tails[next(iter(self._tails))]
        self._tails[tail] = self._index.versions.generations[tail]

    def _probability(self, slot: int) -> float:
        index = self._index
        if index.versions.residences[slot] & (ON_HOST | ON_NVME) != ON_NVME or not index.is_live(slot):
            return 0.0
        return self._predictor.probability(slot, self._foresight.within_s, index.now)

    def _bring(self, tail: int) -> int:
        """The session's chain, as much of it as this shard is to hold, if it is whole and fits the budget."""
        table, chain = self._index.versions, [tail]
        while (parent := self._index.uses.parent(chain[-1])) != NONE and self._index.is_live(parent):
            chain.append(parent)
        root = chain[-1]
        if table.chain_indexes[root] and table.key(root) != table.placement(root):
            return 0  # a gap: only a stripe's first block may have its parent on another shard
        nbytes = sum(table.nbytes[slot] for slot in chain if not table.residences[slot] & ON_HOST)
        if self._foreseen.open_nbytes[Why.PREDICTED] + nbytes > self._budget_nbytes:
            return 0
        return len(self._foreseen.bring(chain[::-1], Why.PREDICTED))

    def _account(self) -> None:
        """Take over what was judged since, and let the past fade."""
        now = self._index.now
        fading = 0.5 ** (max(0.0, now - self._faded_at) / self._foresight.forgets_s)
        self._faded_at = now
        spent, wasted = self._foreseen.judged_nbytes(Why.PREDICTED)
        self._spent = self._spent * fading + spent - self._seen[0]
        self._wasted = self._wasted * fading + wasted - self._seen[1]
        self._seen = spent, wasted
