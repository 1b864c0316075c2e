"""Versions on their way between tiers: who is to move, and what becomes of it. The bytes are the driver's.

    candidate (let go of, or next to go in a crowded host) --+
                                                             +--> start: pinned, room made --> done | failed
    wanted on the host (matched, announced, predicted) ------+

What moves is pinned by a lease of the shard's own, so that it is neither evicted nor reused meanwhile; should
that lease end (the disk stood still), the move fails. Candidates wait in queues bounded in bytes; what does
not fit stays where it is, and is counted. Cost: O(1) a candidate; a move O(those who give way to it), each of
which costs what a victim does (eviction.py). One call of `start` takes STEPS_A_CALL candidates and victims,
and beyond that only those who give way to its last move: some milliseconds of the caller's event loop,
but for versions that were pinned since, each of which is lifted once (10 us).

A tier with a codec gets another version: staged below, visible when it is there, of the codec's quality. It
lands only while what it was made of is live: KV that was purged, or of a dropped epoch, never comes back
under it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Final

from kvstore.core.holds import Holds
from kvstore.core.index import Index
from kvstore.core.retention import PRIORITY_DEFAULT
from kvstore.core.retiring import Retiring
from kvstore.core.rooms import Room
from kvstore.core.seams import AdmissionPolicy
from kvstore.core.state import DemoteWhen, Encoding, Offer, Tiering
from kvstore.core.uses import Use
from kvstore.core.versions import (
    FORBIDDEN,
    ON_HOST,
    ON_NVME,
    TO_HOST,
    TO_NVME,
    UNFIT,
    WRITTEN,
    State,
    Version,
)
from kvstore.core.wanted import Wanted
from kvstore.errors import OverLimit
from kvstore.nouns import BlockRef, ChangeKind, LeaseId, Quality, Tier

OWNER: Final = "tiering"
LEASE_S: Final = 60.0
STEPS_A_CALL: Final = 64
_LIVE: Final = int(State.LIVE)


@dataclass(frozen=True, slots=True)
class Move:
    """Read `source` where it lies, write it under `target`'s name to `to`: encoded, if they differ."""

    source: Version
    target: Version
    to: Tier
    lease: LeaseId

    @property
    def is_encoded(self) -> bool:
        return self.source.ref != self.target.ref


class Moves:
    def __init__(
        self,
        index: Index,
        holds: Holds,
        retiring: Retiring,
        tiering: Tiering,
        admission: AdmissionPolicy | None,
        counters: Counter[str],
    ) -> None:
        self._index = index
        self._holds = holds
        self._retiring = retiring
        self._tiering = tiering
        self._admission = admission
        self._counters = counters
        queue_nbytes_max = tiering.queue_nbytes_max or index.host.capacity_nbytes
        self._down = Wanted(queue_nbytes_max)
        index.kept.leaving = self._down  # what waits here is given up last
        self._up = Wanted(queue_nbytes_max)
        self._under_way: dict[BlockRef, Move] = {}  # by the target
        self._arriving: Counter[Tier] = Counter()  # bytes under way, by where they go: there,
        self._moving: Counter[Tier] = Counter()  # and as they are where they come from
        self._draining = False
        self._steps_left = STEPS_A_CALL
        if tiering.nvme_nbytes and tiering.when is not DemoteWhen.CROWDED:
            index.on_use = self._used

    def __len__(self) -> int:
        return len(self._under_way)

    def staged(self) -> Set[int]:
        """Slots of encoded versions that are not there yet."""
        return {target.slot for target, move in self._under_way.items() if move.is_encoded}

    @property
    def is_cut_short(self) -> bool:
        """Did the last `start` end only because it had done enough for one turn of the event loop?"""
        return self._steps_left <= 0

    def is_coming(self, slot: int) -> bool:
        """Is the version wanted on the host, or on its way there?"""
        return bool(self._index.versions.residences[slot] & TO_HOST) or slot in self._up

    def any_wanted(self) -> bool:
        """Is there anything to start?"""
        if self._tiering.when is DemoteWhen.CROWDED and self._tiering.nvme_nbytes:
            host = self._index.host
            if host.used_nbytes > self._tiering.watermarks[0] * host.capacity_nbytes:
                return True
        return self.is_cut_short or bool(len(self._up) or len(self._down))

    def want_on_host(self, slots: Iterable[int]) -> int:
        """Name live versions that are to come up. How many of them wait now or are under way."""
        table, coming = self._index.versions, 0
        for slot in slots:
            residences = table.residences[slot]
            if residences & ON_HOST or not residences & ON_NVME:
                continue
            if residences & TO_HOST or self._up.add(slot, table.generations[slot], table.nbytes[slot]):
                coming += 1
            else:
                self._counters["promotions_dropped"] += 1
        return coming

    def start(self, now: float, nbytes_max: int) -> list[Move]:
        """Moves to perform, about so many bytes of each direction under way at most.

        Ask again, after others had their turn, when it `is_cut_short`, though no move was started.
        """
        started: list[Move] = []
        self._steps_left = STEPS_A_CALL
        try:
            while self._may_start(Tier.HOST, nbytes_max) and (wanted := self._up.take()):
                self._steps_left -= 1
                started += self._promote(*wanted, now)
            while self._may_start(Tier.NVME, nbytes_max) and (wanted := self._down.take()):
                self._steps_left -= 1
                demoted = self._demote(*wanted, now)
                if not demoted:
                    self._index.host.evictables.may_go_again(wanted[0])
                started += demoted
            self._drain(started, now, nbytes_max)
        except OverLimit:  # every lease is taken: clients come first
            self._counters["moves_without_lease"] += 1
            self._steps_left = max(1, self._steps_left)  # it ends here, whatever is left to do
        return started

    def is_wanted(self, move: Move) -> bool:
        """Did its lease last, is what it was made of still to be seen? Ask before the bytes are written."""
        slot = move.source.ref.slot
        held = self._holds.by_lease.get(move.lease)
        return held is not None and slot in held and self._index.is_live(slot)

    def done(self, move: Move) -> bool:
        """The bytes stand (below the host: durably). False: nobody needs them any more, discard them."""
        stands = self.is_wanted(move)
        if stands and move.is_encoded:
            stands = self._land(move)
        elif stands:
            self._index.arrive(move.target.ref.slot, self._room(move.to))
            self._retiring.tell_moved(move.target.ref.slot)
        if not stands:
            self.failed(move)
            return False
        self._counters[f"moved_to:{move.to.name.lower()}"] += 1
        self._counters[f"moved_nbytes_to:{move.to.name.lower()}"] += move.target.nbytes
        self._end(move)
        self._leave_behind(move)
        return True

    def failed(self, move: Move) -> None:
        """Nothing stands: room that was made for it is free again."""
        self._counters[f"move_failed:{move.to.name.lower()}"] += 1
        target = move.target.ref
        if self._index.versions.is_current(target.slot, target.generation):
            if move.is_encoded:
                self._index.drop(target.slot)
            elif self._index.versions.residences[target.slot] & self._room(move.to).coming:
                self._index.leave(target.slot, self._room(move.to))
        self._end(move)

    def unfit(self, move: Move) -> None:
        """The tier below cannot keep this version at all: it is not named again. The move must still fail."""
        source = move.source.ref
        if self._index.versions.is_current(source.slot, source.generation):
            self._index.versions.written[source.slot] |= UNFIT

    # -- inside ------------------------------------------------------------------------------------

    def _room(self, tier: Tier) -> Room:
        return self._index.host if tier is Tier.HOST else self._index.nvme

    def _may_start(self, to: Tier, nbytes_max: int) -> bool:
        if to is Tier.NVME and self._index.nvme.is_over:
            return False  # it has to shrink first, a bounded part at a time
        return not self.is_cut_short and self._arriving[to] < nbytes_max

    def _give_way(self, room: Room, slot: int) -> None:
        self._steps_left -= 1
        self._retiring.evict_from(room, slot)

    def _used(self, use: Use) -> None:
        """Is what was let go of worth a place on the tier below?"""
        table = self._index.versions
        for slot in reversed(use.slots):  # the root first: a tail without its head is out of reach
            if not self._is_candidate(slot) or not self._admits(slot):
                continue
            if not self._down.add(slot, table.generations[slot], table.nbytes[slot]):
                self._counters["demotions_dropped"] += 1
                return

    def _admits(self, slot: int) -> bool:
        """Who is dearer than the default is, who is less dear is not, whatever the policy says."""
        index = self._index
        if index.retentions.kept:
            priority = index.retentions.priority(slot, index.uses.used_s[slot], index.now)
            if priority != PRIORITY_DEFAULT:
                return priority > PRIORITY_DEFAULT
        if self._tiering.when is DemoteWhen.COMMITTED or self._admission is None:
            return True
        return self._admission.admits(slot, index.now)

    def _is_candidate(self, slot: int) -> bool:
        table = self._index.versions
        on_host_alone = table.residences[slot] & (ON_HOST | ON_NVME | TO_NVME) == ON_HOST
        fit = table.states[slot] == _LIVE and not table.written[slot] & UNFIT
        return on_host_alone and fit and self._lesser_of(slot) is None

    def _drain(self, started: list[Move], now: float, nbytes_max: int) -> None:
        """Of a crowded host, who is next to go: below if it may, else for good, to the low watermark."""
        if self._tiering.when is not DemoteWhen.CROWDED or not self._tiering.nvme_nbytes:
            return
        index, host = self._index, self._index.host
        high, low = (share * host.capacity_nbytes for share in self._tiering.watermarks)
        self._draining = self._draining or host.used_nbytes > high
        while self._draining and self._may_start(Tier.NVME, nbytes_max):
            slot = host.evictables.victim(None, index.now)
            self._draining = slot is not None and host.used_nbytes - self._moving[Tier.NVME] > low
            if slot is None or not self._draining:
                break
            if not (index.is_live(slot) and self._is_candidate(slot) and self._admits(slot)):
                self._give_way(host, slot)
                continue
            self._steps_left -= 1
            moves = self._demote(slot, index.versions.generations[slot], now)
            if not moves:
                break  # no room below: it stays until its own room is needed
            started += moves

    def _promote(self, slot: int, generation: int, now: float) -> list[Move]:
        index, table = self._index, self._index.versions
        if not table.is_current(slot, generation) or not index.is_live(slot):
            return []
        if table.residences[slot] & (ON_HOST | ON_NVME | TO_HOST) != ON_NVME:
            return []
        space, nbytes = index.space_of(slot), table.nbytes[slot]
        account = space.account
        over_quota = account.used_nbytes - account.idle_nbytes + nbytes > account.quota_nbytes
        if over_quota or not index.rooms.can_hold(nbytes):
            self._counters["promotions_without_room"] += 1
            return []
        lease = self._holds.grant(OWNER, LEASE_S, space, (slot,), now)
        while (victim := index.rooms.next_victim(account, nbytes)) is not None:
            self._give_way(index.host, victim)
        index.occupy(slot, index.host, TO_HOST)
        return [self._begin(slot, slot, Tier.HOST, lease)]

    def _demote(self, slot: int, generation: int, now: float) -> list[Move]:
        index, table = self._index, self._index.versions
        if not table.is_current(slot, generation) or not self._is_candidate(slot) or not index.is_live(slot):
            return []
        space, encoding = index.space_of(slot), self._encoding_of(slot)
        nbytes = table.nbytes[slot] if encoding is None else encoding.nbytes
        if encoding is not None and not table.has_room():
            self._counters["demotions_without_room"] += 1
            return []
        lease = self._holds.grant(OWNER, LEASE_S, space, (slot,), now)
        if not self._make_room_below(nbytes):
            self._counters["demotions_without_room"] += 1
            self._index.unpin(self._holds.end(lease), used=False)
            return []
        if encoding is None:
            index.occupy(slot, index.nvme, TO_NVME)
            return [self._begin(slot, slot, Tier.NVME, lease)]
        offer = Offer(
            table.key(slot), table.parent(slot), table.chain_indexes[slot], table.placement(slot), nbytes,
            index.retentions.of(slot),
        )  # fmt: skip
        lesser = index.stage(space, table.epochs[slot], encoding.quality, offer, index.nvme)
        return [self._begin(slot, lesser, Tier.NVME, lease)]

    def _begin(self, slot: int, target: int, to: Tier, lease: LeaseId) -> Move:
        move = Move(self._index.row(slot), self._index.row(target), to, lease)
        self._under_way[move.target.ref] = move
        self._arriving[to] += move.target.nbytes
        self._moving[to] += move.source.nbytes
        return move

    def _make_room_below(self, nbytes: int) -> bool:
        nvme = self._index.nvme
        if nbytes > nvme.capacity_nbytes:
            return False
        while nvme.lacks(nbytes):
            victim = nvme.evictables.victim(None, self._index.now)
            if victim is None:
                return False
            self._give_way(nvme, victim)
        return True

    def _encoding_of(self, slot: int) -> Encoding | None:
        """What the tier below makes of it; None: it keeps it as it is, as it does what is not lossless."""
        encode = self._tiering.encode
        if encode is None or self._index.versions.qualities[slot] != Quality.LOSSLESS:
            return None
        return encode(self._index.space_of(slot).namespace.layout)

    def _lesser_of(self, slot: int) -> int | None:
        """The version that the tier below made of it, if that is there."""
        encoding, table, space = self._encoding_of(slot), self._index.versions, self._index.space_of(slot)
        if encoding is None:
            return None
        key, epoch = table.key(slot), table.epochs[slot]
        rivals = [*self._index.chain(space, space.heads[key]), *space.staged.get(key, ())]
        same = (s for s in rivals if table.epochs[s] == epoch and table.qualities[s] == encoding.quality)
        return next((s for s in same if table.states[s] in (State.LIVE, State.STAGED)), None)

    def _land(self, move: Move) -> bool:
        """Make an encoded version visible, unless it was purged meanwhile or another one took its place."""
        index, slot = self._index, move.target.ref.slot
        table, space = index.versions, index.space_of(slot)
        if table.written[slot] & FORBIDDEN:
            return False
        chain = index.chain(space, space.heads[table.key(slot)])
        mine = table.epochs[slot], table.qualities[slot]
        if any((table.epochs[s], table.qualities[s]) == mine and index.is_live(s) for s in chain):
            return False
        table.written[slot] |= WRITTEN
        self._holds.hold(move.lease, space, slot)
        index.publish(slot, self._retiring.advance())
        index.uses.used_s[slot] = index.uses.used_s[move.source.ref.slot]  # its retention goes on, not anew
        self._retiring.tell(ChangeKind.COMMITTED, slot)
        return True

    def _end(self, move: Move) -> None:
        del self._under_way[move.target.ref]
        self._arriving[move.to] -= move.target.nbytes
        self._moving[move.to] -= move.source.nbytes
        self._index.unpin(self._holds.end(move.lease), used=False)

    def _leave_behind(self, move: Move) -> None:
        """What the tier that a version was copied from keeps of it: nothing, if it is to hold no copies."""
        index, source = self._index, move.source.ref
        if move.to is Tier.HOST:
            if self._tiering.exclusive and index.versions.residences[source.slot] & ON_NVME:
                self._retiring.leave(index.nvme, source.slot)
            return
        leaves = self._tiering.exclusive or self._tiering.when is DemoteWhen.CROWDED
        current = index.versions.is_current(source.slot, source.generation)
        if leaves and current and not index.versions.pins[source.slot] and index.is_live(source.slot):
            if move.is_encoded:
                self._retiring.evict(source.slot)
            else:
                self._retiring.leave(index.host, source.slot)
