"""Promise: moving between tiers changes where bytes lie, never what is seen, and loses no room.

`Shard.start` and `Shard.move` check conservation of both tiers after every step.
"""

from __future__ import annotations

import pytest

from kvstore.core.moves import LEASE_S
from kvstore.core.state import DemoteWhen, Encoding, Tiering
from kvstore.core.uses import Uses
from kvstore.core.versions import ON_HOST, ON_NVME
from kvstore.nouns import DROP, KVLayout, Refusal, Tier
from tests.kvstore.core.conftest import (
    INT8,
    LOSSLESS,
    MODEL,
    NAMESPACE,
    NBYTES,
    Shard,
    key,
)

BOTH = ON_HOST | ON_NVME
SMALL = 40  # bytes of what the codec below makes of NBYTES
CHAIN = [0, 1, 2, 3]


def made_small(_layout: KVLayout) -> Encoding:
    return Encoding(INT8, SMALL)


def tiered(host: int = 8, below: int = 16, limits: dict[str, int] | None = None, **tiering: object) -> Shard:
    options = {"when": DemoteWhen.COMMITTED} | tiering
    made = Tiering(nvme_nbytes=below * NBYTES, **options)  # type: ignore[arg-type]
    return Shard(host, tiering=made, **(limits or {}))  # type: ignore[arg-type]


def fill_host(shard: Shard, blocks: int, first: int = 500) -> None:
    """Push out what is idle on the host, with blocks that are held."""
    txn = shard.begin(list(range(first, first + blocks)), lease_s=100.0)
    assert txn.refusals == [None] * blocks
    shard.core.check_integrity()
    shard.core.abort(txn.id)


# -- when ----------------------------------------------------------------------------------------------


def test_write_through_copies_what_was_committed() -> None:
    shard = tiered()
    shard.put(CHAIN)
    assert shard.move() == 4
    assert [shard.residences(n) for n in CHAIN] == [BOTH] * 4
    assert not shard.start()
    assert shard.core.leases == 0


class OnlyEven:
    """An admission policy that writes down who asked."""

    asked: list[int] = []  # noqa: RUF012

    def __init__(self, uses: Uses, _predictor: object) -> None:
        self.uses = uses
        self.asked.clear()

    def admits(self, slot: int, now: float) -> bool:
        self.asked.append(slot)
        return self.uses.chain_indexes[slot] % 2 == 0


def test_write_through_selective_asks_the_admission_policy_at_each_use() -> None:
    tiering = Tiering(nvme_nbytes=16 * NBYTES, when=DemoteWhen.USED_AGAIN)
    shard = Shard(8, tiering=tiering, make_admission=OnlyEven)
    shard.put(CHAIN)
    assert len(OnlyEven.asked) == 4
    assert shard.move() == 2
    assert [shard.residences(n) for n in CHAIN] == [BOTH, ON_HOST, BOTH, ON_HOST]
    shard.hits(CHAIN)
    assert len(OnlyEven.asked) == 6  # of those that are not there yet
    assert shard.move() == 0


def test_write_back_waits_for_the_high_watermark_and_goes_on_to_the_low_one() -> None:
    shard = tiered(10, 20, when=DemoteWhen.CROWDED, watermarks=(0.8, 0.5))
    for n in range(8):
        shard.put([100 * n])
    assert not shard.core.moves.any_wanted()
    assert not shard.start()
    shard.put([800])
    assert shard.core.moves.any_wanted()
    assert shard.move() == 4
    assert shard.core.index.host.used_nbytes == 5 * NBYTES
    assert shard.tiers([100 * n for n in range(9)]) == [Tier.NVME] * 4 + [Tier.HOST] * 5


def test_write_back_gives_up_what_is_not_admitted() -> None:
    tiering = Tiering(nvme_nbytes=16 * NBYTES, when=DemoteWhen.CROWDED, watermarks=(0.8, 0.5))
    shard = Shard(10, tiering=tiering, make_admission=OnlyEven)
    shard.put([100, 101, 102, 103, 104, 105, 106, 107, 108])
    shard.move()
    assert shard.tiers([105, 106, 107, 108]) == [None, Tier.NVME, None, Tier.NVME]


@pytest.mark.parametrize("why", ["all is pinned below", "too large", "purged and not swept", "unfit"])
def test_write_back_ends_when_nothing_can_move(why: str) -> None:
    """Who cannot go is not named for ever."""
    below = 0.5 if why == "too large" else 4
    tiering = Tiering(nvme_nbytes=int(below * NBYTES), when=DemoteWhen.CROWDED, watermarks=(0.5, 0.2))
    shard = Shard(10, tiering=tiering)
    if why == "all is pinned below":
        shard.put([700, 701, 702, 703, 704, 705])
        assert shard.move() == 4
        held = shard.match([700, 701, 702, 703, 704, 705])
        assert held.versions
    for n in range(4):
        shard.put([100 * n])
        shard.put([1000 + 100 * n])
    if why == "purged and not swept":
        shard.core.purge(NAMESPACE, None, None)
    for move in shard.start():
        shard.core.moves.unfit(move)
        shard.core.moves.failed(move)
    for _ in range(20):
        if not shard.start():
            break
        shard.move()
    assert not shard.start()
    if why == "unfit":
        assert shard.core.index.host.used_nbytes <= 5 * NBYTES


def test_exclusive_leaves_the_tier_it_was_copied_from() -> None:
    shard = tiered(exclusive=True)
    (ref,) = shard.put([0])
    assert shard.move() == 1
    assert shard.residences(0) == ON_NVME
    held = shard.match([0])
    assert held.versions[0].ref == ref
    assert shard.move() == 1
    assert shard.residences(0) == ON_HOST
    shard.release(held.lease)  # a use: it goes down again
    assert shard.move() == 1
    assert shard.residences(0) == ON_NVME


def test_what_a_reader_holds_stays_on_the_host_when_its_copy_lands() -> None:
    shard = tiered(exclusive=True)
    shard.put([0])
    (move,) = shard.start()
    held = shard.match([0])
    assert shard.core.moves.done(move)
    assert shard.residences(0) == BOTH
    shard.release(held.lease)


# -- host and nvme -------------------------------------------------------------------------------------


def test_leaving_the_host_keeps_a_version_visible_under_its_reference() -> None:
    shard = tiered(host=4)
    refs = shard.put(CHAIN)
    shard.move()
    fill_host(shard, 4)
    assert shard.tiers(CHAIN) == [Tier.NVME] * 4
    matched = shard.match(CHAIN)
    assert tuple(v.ref for v in matched.versions) == refs
    assert shard.core.counters["evicted"] == 0
    assert shard.core.counters["evicted:host"] == 4
    shard.release(matched.lease)


def test_what_lies_nowhere_else_is_gone_when_its_tier_needs_room() -> None:
    shard = tiered(host=4, below=2)
    shard.put(CHAIN)
    shard.move()
    fill_host(shard, 4)
    assert shard.present(CHAIN) <= {0, 1, 2, 3}
    assert shard.core.index.nvme.used_nbytes <= 2 * NBYTES
    assert shard.tiers(CHAIN).count(Tier.NVME) == 2


def test_a_match_brings_up_what_lies_below() -> None:
    shard = tiered(host=4)
    shard.put(CHAIN)
    shard.move()
    fill_host(shard, 4)
    held = shard.match(CHAIN)
    assert shard.move() == 4
    assert [shard.residences(n) for n in CHAIN] == [BOTH] * 4
    shard.release(held.lease)
    shard.core.check_integrity()


def test_an_announcement_brings_up_without_a_match() -> None:
    shard = tiered(host=4)
    refs = shard.put(CHAIN)
    shard.move()
    fill_host(shard, 4)
    slots = [ref.slot for ref in refs if not isinstance(ref, Refusal)]
    assert shard.core.moves.want_on_host(slots) == 4
    assert shard.core.moves.want_on_host(slots) == 4  # they wait once
    assert len(shard.start()) == 4
    assert shard.core.moves.want_on_host(slots) == 4
    assert all(map(shard.core.moves.is_coming, slots))


def test_a_promotion_without_room_leaves_all_as_it_was() -> None:
    shard = tiered(host=4)
    shard.put(CHAIN)
    shard.move()
    txn = shard.begin([500, 501, 502, 503], lease_s=100.0)
    held = shard.match(CHAIN)
    assert not shard.start()
    assert shard.core.counters["promotions_without_room"] == 4
    shard.release(held.lease)
    shard.core.abort(txn.id)
    assert shard.tiers(CHAIN) == [Tier.NVME] * 4


def test_a_quota_holds_for_what_is_promoted() -> None:
    shard = Shard(8, {"default": 2 * NBYTES}, tiering=Tiering(16 * NBYTES, DemoteWhen.COMMITTED))
    for n in range(4):
        shard.put([100 * n])
        shard.move()
    assert shard.tiers([0, 100, 200, 300]) == [Tier.NVME] * 2 + [Tier.HOST] * 2
    held = [shard.match([n]) for n in (200, 300)]
    shard.match([0])
    assert not shard.start()
    assert shard.core.counters["promotions_without_room"] >= 1
    shard.release(*(h.lease for h in held))
    shard.match([100])
    assert shard.move() == 1
    account = shard.core.index.accounts["default"]
    assert account.used_nbytes <= 2 * NBYTES


def test_queues_are_bounded_in_bytes_and_what_is_dropped_is_counted() -> None:
    shard = tiered(queue_nbytes_max=2 * NBYTES)
    shard.put(CHAIN)
    assert shard.core.counters["demotions_dropped"] == 1, (
        "behind the first that does not fit nothing is asked"
    )
    assert shard.move() == 2
    shard.hits(CHAIN)
    assert shard.move() == 2
    fill_host(shard, 8)
    shard.match(CHAIN)
    assert shard.core.counters["promotions_dropped"] == 2
    assert shard.move() == 2


def test_under_way_is_bounded_in_bytes() -> None:
    shard = tiered()
    shard.put(CHAIN)
    moves = shard.start(2 * NBYTES)
    assert len(moves) == 2
    assert not shard.start(2 * NBYTES)
    shard.core.moves.done(moves[0])
    assert len(shard.start(2 * NBYTES)) == 1


def test_leases_that_are_all_taken_cost_a_move_nothing() -> None:
    shard = tiered(limits={"leases_max": 2})
    shard.put([0])
    shard.match([0], lease_s=100.0)
    shard.match([0], lease_s=100.0)
    assert not shard.start()
    assert shard.core.counters["moves_without_lease"] == 1
    assert shard.residences(0) == ON_HOST


@pytest.mark.parametrize("encode", [None, made_small], ids=["as it is", "encoded"])
def test_slots_that_are_all_in_use(encode: object) -> None:
    shard = tiered(4, 16, limits={"slots_max": 4}, encode=encode)
    shard.put(CHAIN)
    moved = shard.move()
    assert moved == (4 if encode is None else 0)
    assert shard.core.counters["demotions_without_room"] == (0 if encode is None else 4)
    assert shard.put([500, 501]) != (Refusal.NO_SPACE, Refusal.NO_SPACE)
    assert len(shard.core.index) == 4


# -- what happens meanwhile ----------------------------------------------------------------------------


def kill(shard: Shard, how: str) -> None:
    if how == "purge":
        shard.core.purge(NAMESPACE, None, None)
    elif how == "purge of its key":
        shard.core.purge(NAMESPACE, (key(0),), None)
    elif how == "drop":
        shard.core.advance_epoch(MODEL, 2, DROP)
    elif how == "report":
        row = next(r for r in shard.core.index.rows() if r.key == key(0) and r.quality is LOSSLESS)
        shard.core.report(row)
    else:
        shard.later(LEASE_S + 1)


DEATHS = ["purge", "purge of its key", "drop", "report", "expiry of the move's lease"]


@pytest.mark.parametrize("encode", [None, made_small], ids=["as it is", "encoded"])
@pytest.mark.parametrize("how", DEATHS)
def test_a_demotion_does_not_land_after(how: str, encode: object) -> None:
    shard = tiered(encode=encode)
    shard.put([0])
    (move,) = shard.start()
    kill(shard, how)
    assert not shard.core.moves.is_wanted(move)
    assert not shard.core.moves.done(move)
    shard.core.check_integrity()
    assert shard.tiers([0], least=INT8) == [Tier.HOST if "lease" in how else None]
    while shard.core.sweep(10):
        pass
    assert shard.core.index.nvme.used_nbytes == 0
    assert shard.core.leases == len(shard.core.moves) == 0
    assert any(freed.tier is Tier.NVME for freed in shard.core.index.freed)


@pytest.mark.parametrize("how", DEATHS)
def test_a_promotion_does_not_land_after(how: str) -> None:
    shard = tiered(host=1)
    shard.put([0])
    shard.move()
    fill_host(shard, 1)
    shard.core.moves.want_on_host([r.ref.slot for r in shard.core.index.rows()])
    (move,) = shard.start()
    kill(shard, how)
    assert not shard.core.moves.done(move)
    shard.core.check_integrity()
    assert shard.core.index.host.used_nbytes == 0
    assert shard.tiers([0]) == [Tier.NVME if "lease" in how else None]


@pytest.mark.parametrize("encode", [None, made_small], ids=["as it is", "encoded"])
def test_a_move_that_fails_frees_everything(encode: object) -> None:
    shard = tiered(host=4, encode=encode)
    shard.put(CHAIN)
    for move in shard.start():
        shard.core.moves.failed(move)
        shard.core.check_integrity()
    assert shard.core.index.nvme.used_nbytes == shard.core.leases == 0
    assert shard.core.counters["move_failed:nvme"] == 4
    shard.hits(CHAIN)
    assert shard.move() == 4  # the next use names them again


def test_the_lease_of_a_move_may_end_and_the_slot_be_used_again_before_it_fails() -> None:
    shard = tiered(host=1, below=2)
    shard.put([0])
    (stuck,) = shard.start()
    shard.later(LEASE_S + 1)
    shard.put([500])
    (second,) = shard.start()
    assert second.target.ref.slot == stuck.target.ref.slot
    shard.core.moves.failed(stuck)
    shard.core.check_integrity()
    assert shard.core.moves.done(second)
    shard.core.check_integrity()
    assert shard.residences(500) == BOTH


def test_what_moves_is_neither_evicted_nor_reused() -> None:
    shard = tiered(host=2)
    shard.put([0])
    shard.put([100])
    assert len(shard.start()) == 2
    assert shard.put([200]) == (Refusal.NO_SPACE,)


def test_readers_pin_what_moves_and_let_go_of_it_at_any_time() -> None:
    shard = tiered(host=4)
    shard.put(CHAIN)
    first = shard.match(CHAIN)
    moves = shard.start()
    shard.release(first.lease)
    second = shard.match(CHAIN)
    assert all(shard.core.moves.done(move) for move in moves)
    shard.core.check_integrity()
    shard.release(second.lease)
    fill_host(shard, 4)
    third = shard.match(CHAIN)
    moves = shard.start()
    shard.release(third.lease)
    assert all(shard.core.moves.done(move) for move in moves)
    assert [shard.residences(n) for n in CHAIN] == [BOTH] * 4
    shard.core.check_integrity()


def test_a_queue_that_is_full_keeps_the_head_of_a_chain_not_its_tail() -> None:
    """A tail that lies below without its head is out of reach."""
    shard = tiered(queue_nbytes_max=3 * NBYTES)
    shard.put(CHAIN)
    assert [move.source.chain_index for move in shard.start()] == [0, 1, 2]
