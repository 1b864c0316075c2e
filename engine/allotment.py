"""Which slots of the pool a sequence has: taken as it computes, taken over from others, copied on write.

    settle(name, room)   a place to grow in: a free run that nobody else means to grow into
    take(chunk)          the slots its rows go to; a block that others read is copied first
    take_over(all)       blocks that another has computed since, one more user of each
    victims(all, plan)   who must leave so that those who found no slot do

A place to grow in is a wish, not a reservation: it keeps a sequence's blocks adjacent, which attention reads
in place, and gives way where slots are scarce. Nothing here computes; what is copied is the part of one block
that a fork has in common with its source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from engine.batch import Chunk
from engine.pool import KVPool
from engine.scheduler import Plan, choose_victims
from engine.sequence import Sequence
from engine.sharing import ready_part
from kvstore.errors import OverLimit
from kvstore.tiers.pool_slots import PoolSlots

__all__ = ["Allotment"]


class Allotment:
    """One engine's, over its pool and the slots of it."""

    def __init__(self, pool: KVPool, slots: PoolSlots, block_tokens: int) -> None:
        self._pool = pool
        self._slots = slots
        self._block_tokens = block_tokens
        self._places: dict[str, range] = {}

    def settle(self, name: str, room: int, after: int | None) -> int | None:
        """Find a sequence room for so many blocks, behind slot `after` if it may be; the slot behind which
        its own begin. `leave` forgets it."""
        start = self._slots.free_run(room, self._places.values(), after) if room > 0 else None
        if start is None:
            return after
        self._places[name] = range(start, start + room)
        return start - 1

    def leave(self, sequence: Sequence) -> None:
        """Its own slots are free, unless others read them or the edge shard keeps them."""
        self._places.pop(sequence.request.request_id, None)
        self._slots.give_back(sequence.own_slots)

    def forget(self, name: str) -> None:
        """It did not come in."""
        self._places.pop(name, None)

    def take(self, chunk: Chunk) -> bool:
        """Its own alone, adjacent to the last one where that is free. False: a peer's blocks have come into
        the slots that were free when the step was planned; the chunk waits for the next one."""
        try:
            self._take(chunk.sequence, chunk.rows)
        except OverLimit:
            return False
        return True

    def take_over(self, sequences: Collection[Sequence]) -> list[tuple[Sequence, int]]:
        """Each sequence and full block that came to be its own by this, in the order of its chain."""
        taken = []
        for sequence in sequences:
            while (ready := ready_part(sequence, sequences, self._block_tokens)) is not None:
                self._slots.lend((ready.slot,))
                sequence.take_over(*ready)
                if ready.tokens == self._block_tokens:
                    taken.append((sequence, len(sequence.slots) - 1))
        return taken

    def victims(self, sequences: Collection[Sequence], plan: Plan) -> list[Sequence]:
        """Slots of blocks that the edge shard keeps come free when its owner has heard who left."""
        size, slots = self._block_tokens, self._slots
        gone: Counter[int] = Counter()  # users of slots who leave

        def is_shared(slot: int) -> bool:
            return slots.is_shared(slot, gone[slot])

        def needs(sequence: Sequence) -> int:
            return max(0, sequence.slots_for(1, size)) + sequence.writes_to_shared(size, is_shared)

        def leave(sequence: Sequence) -> int:
            freed = sum(slots.users(slot) - gone[slot] == 1 for slot in sequence.slots)
            gone.update(sequence.slots)
            return freed

        return choose_victims(sequences, plan.left_out, needs, slots.n_free - plan.taken, leave)

    def _take(self, sequence: Sequence, rows: int) -> None:
        name, size = sequence.request.request_id, self._block_tokens
        if sequence.writes_to_shared(size, self._slots.is_shared):
            index, tokens = divmod(sequence.computed, size)
            shared, (own,) = sequence.slots[index], self._slots.allocate(1, name)
            self._pool.copy_block(shared, own, tokens)
            sequence.slots = (*sequence.slots[:index], own, *sequence.slots[index + 1 :])
            self._slots.give_back((shared,))
        wanted = sequence.slots_for(rows, size)
        if wanted > 0:
            after = sequence.slots[-1] if sequence.slots else None
            place = self._places.get(name)
            if place is not None and place.start not in sequence.slots:
                after = place.start - 1
            sequence.slots += tuple(self._slots.allocate(wanted, name, after=after))
