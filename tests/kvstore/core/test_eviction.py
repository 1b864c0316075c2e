"""Who goes first: past epochs, then the least recently used, the leaf of a chain before its parent."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from kvstore.core.seams import Seen
from kvstore.core.state import Offer
from kvstore.core.uses import Use
from kvstore.errors import EpochConflict, EpochUnknown, OverLimit
from kvstore.nouns import Epoch, NamespaceId, Refusal, WeightsDigest
from tests.kvstore.core.conftest import E1, E2, E3, LOSSLESS, MODEL, NAMESPACE, NBYTES, Shard, key
from tests.kvstore.core.test_moves import CHAIN, tiered

OTHER = NamespaceId(bytes([1] * 16))


def test_the_least_recently_used_goes_first() -> None:
    shard = Shard(blocks=3)
    for chain in (0, 100, 200):
        shard.put([chain])
    shard.hits([0])
    shard.put([300])
    assert shard.present([0, 100, 200, 300]) == {0, 200, 300}


def test_the_leaf_goes_before_its_parent_however_the_chain_was_written() -> None:
    for writes in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 3], [0, 1]]):
        shard = Shard(blocks=4)
        for keys in writes:
            shard.put(keys)
        shard.put([100])
        shard.put([200])
        assert shard.hits([0, 1, 2, 3]) == 2, writes


def test_the_leaf_goes_before_its_parent_in_whatever_order_leases_end() -> None:
    shard = Shard(blocks=4)
    shard.put([0, 1, 2, 3])
    leases = [shard.match(range(n)).lease for n in (1, 2, 3, 4)]
    shard.release(*reversed(leases))
    shard.put([100])
    assert shard.hits([0, 1, 2, 3]) == 3


def test_every_block_built_on_a_chain_goes_before_the_chain_does() -> None:
    above, siblings = 50, 40
    shard = Shard(blocks=above + siblings)
    shard.put(range(above))
    fan = [Offer(key(1000 + n), key(above - 1), above, key(0), NBYTES) for n in range(siblings)]
    txn = shard.core.begin(NAMESPACE, E1, LOSSLESS, fan, "writer", 10.0, b"fan", shard.now)
    shard.write(txn)
    shard.commit(txn)
    for n in range(siblings):
        shard.put([2000 + 100 * n])
    assert shard.hits(range(above)) == above


def test_what_is_built_upon_goes_when_nothing_else_can() -> None:
    """A reader holds the leaf alone: what is promised as room is there all the same."""
    shard = Shard(blocks=4)
    shard.put([0, 1, 2, 3])
    shard.match([3])
    assert shard.begin([100, 101, 102]).refusals == [None, None, None]
    shard.core.check_integrity()


def test_a_hole_in_a_use_does_not_let_a_parent_go_first() -> None:
    """Blocks 3 and 1 are let go together; 2 was idle all the while: 3, then 2, then 1, then 0."""
    shard = Shard(blocks=4)
    shard.put([0, 1, 2, 3])
    shard.release(shard.match([3]).lease, shard.match([1]).lease)
    for left, n in ((3, 100), (2, 200), (1, 300), (0, 400)):
        shard.put([n])
        there = [n for n in range(4) if key(n) in shard.core.index.spaces[NAMESPACE].heads]
        assert there == list(range(left))


def test_past_epochs_go_first_the_oldest_of_them_first() -> None:
    shard = Shard(blocks=6)
    for of, chain in ((E3, 0), (E2, 100), (E1, 200)):
        shard.put([chain, chain + 1], of)
    shard.core.advance_epoch(MODEL, 3)
    shard.put([300, 301, 302], E3)
    assert (shard.hits([200, 201], E1), shard.hits([100, 101], E2), shard.hits([0, 1], E3)) == (0, 1, 2)


def test_epochs_to_come_are_as_good_as_the_current_one() -> None:
    shard = Shard(blocks=2)
    shard.put([0], E2)
    shard.put([100], E1)
    shard.put([200], E1)
    assert shard.present([0], E2) == set()
    assert shard.present([100, 200], E1) == {100, 200}


def test_models_compete_by_recency_not_by_the_height_of_their_numbers() -> None:
    shard = Shard(blocks=2)
    shard.open(OTHER, "other model")
    shard.core.advance_epoch("other model", 3)
    shard.put([0], E3, namespace=OTHER)
    shard.put([100], E1)
    shard.put([200], E1)
    assert shard.match([0], E3, namespace=OTHER).versions == ()
    assert shard.present([100, 200]) == {100, 200}


def test_pinned_and_staged_blocks_never_go() -> None:
    shard = Shard(blocks=3)
    shard.put([0])
    shard.match([0])
    shard.begin([1])
    shard.put([2])
    assert shard.begin([3, 4]).refusals == [None, Refusal.NO_SPACE]
    assert shard.hits([0]) == 1


def test_what_cannot_fit_evicts_nothing() -> None:
    shard = Shard(blocks=4)
    shard.put([0, 1])
    shard.put([100, 101])
    shard.match([100])
    assert shard.begin([200], nbytes=4 * NBYTES).refusals == [Refusal.NO_SPACE]
    assert shard.hits([0, 1]) == 2
    assert shard.begin([200], nbytes=3 * NBYTES).refusals == [None]


def test_making_room_for_one_offer_spares_the_others() -> None:
    shard = Shard(blocks=2)
    shard.put([1])
    shard.put([100])
    assert shard.begin([0, 1]).refusals == [None, Refusal.EXISTS]


def test_slots_run_out_before_bytes_as_an_explicit_refusal() -> None:
    shard = Shard(blocks=8, slots_max=2)
    shard.put([0, 1])
    shard.put([100])
    assert shard.hits([0, 1]) == 1
    assert shard.begin([200, 201, 202]).refusals == [None, None, Refusal.NO_SPACE]


def test_a_chain_that_bites_its_tail_harms_nobody(shard: Shard) -> None:
    """Keys and parents are the writer's word: a forged cycle must not trap the walk up a chain."""
    cycle = [Offer(key(n), key(1 - n), n, key(0), NBYTES) for n in (0, 1)]
    txn = shard.core.begin(NAMESPACE, E1, LOSSLESS, cycle, "forger", 10.0, b"r", shard.now)
    shard.write(txn)
    shard.commit(txn)
    assert shard.hits([0, 1]) == 2


def test_an_epochs_number_is_bound_to_its_weights(shard: Shard) -> None:
    with pytest.raises(EpochConflict, match="take the next number"):
        shard.core.register_epoch(MODEL, Epoch(1, WeightsDigest(bytes(16))))
    with pytest.raises(EpochUnknown, match="register it"):
        shard.core.advance_epoch(MODEL, 9)
    with pytest.raises(EpochUnknown, match="register it"):
        shard.core.advance_epoch("unheard of", 1)


def test_epochs_never_go_back(shard: Shard) -> None:
    after = shard.core.advance_epoch(MODEL, 3)
    assert shard.core.advance_epoch(MODEL, 2) == after
    assert shard.core.epochs.show(MODEL).current == 3


def test_epochs_and_models_are_bounded() -> None:
    shard = Shard(epochs_max=3, models_max=1)
    with pytest.raises(OverLimit, match="epochs_max"):
        shard.core.register_epoch(MODEL, Epoch(4, WeightsDigest(bytes(16))))
    with pytest.raises(OverLimit, match="models_max"):
        shard.core.register_epoch("another", E1)


def test_below_too_a_block_goes_only_after_what_was_built_on_it() -> None:
    """Whatever order they came down in."""
    shard = tiered(host=4, below=4)
    refs = [ref for ref in shard.put(CHAIN) if not isinstance(ref, Refusal)]
    shard.move()
    evictables = shard.core.index.nvme.evictables
    for ref in refs:  # the root was used longest ago, and the leaf last
        evictables.use("default", shard.core.index.uses.last(ref.slot))
    assert evictables.victim(None, shard.now) == refs[3].slot


class Counted(array):  # type: ignore[type-arg]
    """A column that counts how often it was looked into."""

    looks = 0

    def __getitem__(self, at: object) -> Any:
        Counted.looks += 1
        return super().__getitem__(at)  # type: ignore[call-overload]


def _depths_of_victims(shard: Shard) -> list[int]:
    """Give up all that is idle on the host. How deep each was in its chain."""
    index, depths = shard.core.index, []
    while (victim := index.host.evictables.victim(None, index.now)) is not None:
        depths.append(index.versions.chain_indexes[victim])
        shard.core.retiring.evict(victim)
    return depths


def test_the_deepest_of_many_that_wait_costs_no_look_at_all_of_them() -> None:
    chains = 600
    shard = Shard(blocks=2 * chains)
    for chain in range(chains):
        shard.put([100 * chain, 100 * chain + 1])
        shard.match([100 * chain + 1])  # held: its root waits for it
    table = shard.core.index.versions
    table.pins = Counted(table.pins.typecode, table.pins)
    before = Counted.looks
    assert _depths_of_victims(shard) == [0] * chains
    assert Counted.looks - before < 20 * chains
    shard.core.check_integrity()


def test_who_was_held_while_all_waited_is_among_the_deepest_again_when_let_go() -> None:
    """In whatever order, and however often: each goes once, the deepest that waits first."""
    shard = Shard(blocks=8)
    shard.put(range(4))
    shard.put(range(100, 104))
    leaves = [shard.match([3]).lease, shard.match([103]).lease]
    evictables = shard.core.index.host.evictables
    assert evictables.victim(None, shard.now) is not None  # all that is idle was lifted now
    for _ in range(100):
        held = shard.match([2])
        assert evictables.victim(None, shard.now) is not None
        assert held.lease is not None
        shard.core.index.unpin(shard.core._holds.end(held.lease), used=False)
        shard.core.check_integrity()
    assert _depths_of_victims(shard) == [2, 1, 0, 2, 1, 0]
    shard.release(*leaves)
    assert sorted(_depths_of_victims(shard)) == [3, 3]
    shard.core.check_integrity()


def test_each_tenant_has_its_own_deepest() -> None:
    shard = Shard(blocks=8)
    shard.open(OTHER, MODEL, "another")
    shard.put([0, 1, 2, 3])
    shard.put([100, 101], namespace=OTHER)
    shard.match([3])
    shard.match([101], namespace=OTHER)
    index = shard.core.index
    for tenant, depth in (("another", 0), ("default", 2), (None, 2), ("nobody", None)):
        victim = index.host.evictables.victim(tenant, shard.now)
        assert (None if victim is None else index.versions.chain_indexes[victim]) == depth, tenant


class InsideFirst:
    """A policy that names what others are built on first, as one may that rates ends of chains apart."""

    def __init__(self, seen: Seen) -> None:
        self._seen, self._slots = seen, dict[int, None]()
        self.lifts, self.away = 0, set[int]()

    def use(self, use: Use) -> None:
        for slot in reversed(use.slots):  # they come tail first
            self._seen.places[slot] = 1
            self._slots.pop(slot, None)
            self._slots[slot] = None

    def lift(self, slot: int) -> None:
        del self._slots[slot]
        self.lifts += 1
        self.away.add(slot)

    def put_back(self, slot: int) -> None:
        self.away.remove(slot)
        self._slots = {slot: None, **self._slots}

    def remove(self, slot: int, evicted: bool) -> None:
        del self._slots[slot]
        self._seen.places[slot] = 0

    def victim(self, now: float) -> int | None:
        return next(iter(self._slots), None)

    def __len__(self) -> int:
        return len(self._slots)


def test_a_policy_that_names_the_inside_first_has_no_more_lifted_than_the_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore.core.eviction._LIFTS_A_CALL", 4)
    monkeypatch.setattr("kvstore.core.eviction._LIFTED_MAX", 12)
    queues: list[InsideFirst] = []

    def make(seen: Seen) -> InsideFirst:
        queues.append(InsideFirst(seen))
        return queues[-1]

    shard = Shard(blocks=60, policy=lambda seen: lambda: make(seen))
    for chain in (0, 100, 200):
        shard.put(range(chain, chain + 20))
    most = 0
    for n in range(40):
        before = queues[0].lifts
        shard.put([1000 + 10 * n])
        assert queues[0].lifts - before <= 4, "one call lifts without end"
        most = max(most, len(queues[0].away))
        for chain in (0, 100, 200):  # what is left is a chain's beginning, without a hole
            there = [i for i in range(20) if key(chain + i) in shard.core.index.spaces[NAMESPACE].heads]
            assert there == list(range(len(there)))
        shard.core.check_integrity()
    assert 4 < most <= 12
