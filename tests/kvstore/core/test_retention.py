"""Promise: what its tenant says is dear goes last, for as long as it was said, at no other tenant's cost."""

from __future__ import annotations

import math

import pytest

from cli.replay.baselines import BASELINES
from kvstore.core.retention import PRIORITY_DEFAULT, TTL_S_MAX, Ends, Retention
from kvstore.core.seams import MakePolicy
from kvstore.core.shard import ShardCore
from kvstore.core.state import CoreConfig, DemoteWhen, Encoding, Tiering
from kvstore.core.uses import Uses
from kvstore.errors import ConfigError
from kvstore.nouns import ISOLATE, NamespaceId, Quality, Refusal, ShardId, Tier
from kvstore.policies import POLICIES
from tests.kvstore.core.conftest import E1, E2, INCARNATION, MODEL, NBYTES, Shard, key

DEAR, CHEAP = Retention(80), Retention(10)
OURS, THEIRS = NamespaceId(bytes([1] * 16)), NamespaceId(bytes([2] * 16))
EVERY = {**POLICIES, **BASELINES}
policies = pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)


def order(shard: Shard, tenant: str | None = None) -> list[int]:
    """All that is idle, by key number, in the order it would go; nothing is left."""
    index, gone = shard.core.index, []
    shard.core.reap(shard.now)
    while (victim := index.host.evictables.victim(tenant, index.now)) is not None:
        gone.append(int.from_bytes(index.versions.key(victim), "big"))
        shard.core.retiring.evict(victim)
    shard.core.check_integrity()
    return gone


# -- priorities --------------------------------------------------------------------------------------


@policies
def test_the_lower_priority_goes_first_whatever_the_policy(policy: MakePolicy) -> None:
    shard = Shard(policy=policy)
    for n, retention in ((0, DEAR), (100, CHEAP), (200, None), (300, Retention(0)), (400, Retention(100))):
        shard.put([n], retention=retention)
        shard.now += 1
    assert order(shard) == [300, 100, 200, 0, 400]


def test_within_a_priority_the_policy_orders() -> None:
    shard = Shard()
    for n in (0, 100, 200):
        shard.put([n], retention=DEAR)
    shard.hits([0])
    assert order(shard) == [100, 200, 0]


def test_the_default_priority_is_that_of_which_nothing_was_said() -> None:
    shard = Shard()
    shard.put([0], retention=Retention(PRIORITY_DEFAULT))
    shard.put([100])
    shard.put([200], retention=Retention(PRIORITY_DEFAULT, 1.0))
    assert order(shard) == [0, 100, 200]


def test_the_past_goes_before_the_present_however_dear_it_was() -> None:
    shard = Shard()
    shard.put([0], E1, retention=Retention(100))
    shard.put([100], E2, retention=Retention(0))
    shard.core.advance_epoch(MODEL, 2, ISOLATE)
    assert order(shard) == [0, 100]


@policies
def test_a_dear_leaf_holds_the_cheap_blocks_it_was_built_on(policy: MakePolicy) -> None:
    shard = Shard(policy=policy)
    shard.put([0, 1], retention=Retention(0))
    shard.put([2], retention=DEAR)
    shard.put([100])
    assert order(shard) == [100, 2, 1, 0]


def test_a_use_of_blocks_of_several_priorities_keeps_each_where_it_belongs() -> None:
    shard = Shard()
    shard.put([0, 1], retention=DEAR)
    shard.put([2, 3], retention=CHEAP)
    shard.put([100])
    assert shard.hits([0, 1, 2, 3]) == 4
    assert order(shard) == [3, 2, 100, 1, 0]


def test_what_is_pinned_stays_however_cheap() -> None:
    shard = Shard(blocks=2)
    shard.put([0], retention=Retention(0))
    shard.put([100], retention=DEAR)
    lease = shard.match([0]).lease
    shard.put([200])
    assert shard.present([0, 100, 200]) == {0, 200}
    shard.release(lease)
    assert order(shard) == [0, 200]


# -- their end ---------------------------------------------------------------------------------------


@policies
def test_after_its_time_a_version_is_worth_the_default(policy: MakePolicy) -> None:
    shard = Shard(policy=policy)
    shard.put([0], retention=Retention(80, 10.0))
    shard.put([100], retention=Retention(0, 10.0))
    shard.later(11)
    shard.put([200], retention=Retention(34))
    shard.put([300], retention=Retention(36))
    went = order(shard)
    assert (went[0], set(went[1:3]), went[3]) == (200, {0, 100}, 300)


def test_it_counts_from_the_last_use_and_begins_anew_with_each() -> None:
    shard = Shard(blocks=2)
    shard.put([0], retention=Retention(80, 10.0))
    shard.later(8)
    shard.hits([0])
    shard.later(8)
    shard.put([100])
    shard.put([200])  # 16 s after its commit, 8 s after its use
    assert shard.present([0, 100, 200]) == {0, 200}
    shard.later(11)
    shard.put([300])  # over: the look above was its last use, and 200's as well
    shard.hits([0])  # a use after the end: dear again
    shard.put([400])
    shard.put([500])
    assert shard.present([0]) == {0}


def test_a_pin_does_not_use_up_the_time() -> None:
    shard = Shard(blocks=2)
    shard.put([0], retention=Retention(80, 5.0))
    lease = shard.match([0], lease_s=60.0).lease
    shard.later(20)
    shard.put([100])
    shard.put([200])  # a victim is looked for, and found to be over while it is pinned
    shard.release(lease)
    assert order(shard) == [200, 0]


def test_a_pause_of_the_shard_does_not_count() -> None:
    shard = Shard(blocks=2)
    shard.put([0], retention=Retention(80, 5.0))
    shard.put([100])
    shard.now += 1000.0
    shard.core.reap(shard.now)
    assert order(shard) == [100, 0]


def test_a_slot_that_is_used_again_knows_nothing_of_the_version_before() -> None:
    shard = Shard(blocks=2)
    shard.put([0], retention=Retention(0, 500.0))
    shard.put([100])
    shard.put([200], retention=Retention(90, 5.0))  # in the slot that 0 was in
    shard.later(6)
    shard.put([300], retention=Retention(36))
    assert shard.present([100, 200, 300]) == {200, 300}
    shard.core.purge(NamespaceId(bytes(16)), (key(200), key(300)), None)
    assert shard.core.index.retentions.kept == 0


def test_what_waits_for_its_end_is_bounded_however_often_it_is_put_off() -> None:
    ends = Ends()
    for i in range(10_000):
        ends.expect(i % 10, 1e6 - i)
        assert len(ends) <= 2 * 10 + 64 + 1
    assert sorted(ends.past(math.inf)) == list(range(10))
    assert list(ends.past(math.inf)) == []


# -- said anew ---------------------------------------------------------------------------------------


def test_an_offer_of_what_is_there_changes_what_it_is_worth_or_says_nothing() -> None:
    shard = Shard()
    shard.put([0], retention=DEAR)
    shard.put([100])
    shard.put([0], retention=CHEAP)
    shard.put([0])  # says nothing
    shard.put([100], retention=DEAR)
    assert order(shard) == [0, 100]


def test_who_comes_second_at_the_commit_says_it_too() -> None:
    shard = Shard()
    lesser = shard.begin([0], quality=Quality.INT8, retention=DEAR)
    better = shard.begin([0])
    for txn in (better, lesser):  # what is better stands in the lesser one's place
        shard.write(txn)
        assert not isinstance(shard.commit(txn)[0], Refusal)
    shard.put([100])
    assert order(shard) == [100, 0]


def test_said_anew_of_what_a_move_holds_it_counts_at_once() -> None:
    """What is held for no use of it keeps its place, but not among those of another priority."""
    shard = Shard()
    for n in (0, 100):
        shard.put([n])
    index = shard.core.index
    slot = index.spaces[NamespaceId(bytes(16))].heads[key(0)]
    index.pin(index.space_of(slot), (slot,))
    index.host.evictables.victim(None, shard.now)  # lifted: it is pinned
    index.retain(slot, DEAR)
    index.unpin((slot,), used=False)
    assert order(shard) == [100, 0]


# -- tenants -----------------------------------------------------------------------------------------


def two_tenants(blocks: int, **quotas: int) -> Shard:
    shard = Shard(blocks, quotas={tenant: quota * NBYTES for tenant, quota in quotas.items()})
    shard.open(OURS, MODEL, "us")
    shard.open(THEIRS, MODEL, "them")
    return shard


def held(shard: Shard, tenant: str) -> int:
    return shard.core.index.accounts[tenant].used_nbytes // NBYTES


def test_a_quota_is_made_room_in_by_the_tenants_own_priorities() -> None:
    shard = two_tenants(8, us=3)
    shard.put([0], namespace=THEIRS, retention=Retention(0))
    for n, retention in ((0, DEAR), (100, CHEAP), (200, None), (300, None)):
        shard.put([n], namespace=OURS, retention=retention)
    there = {n for n in (0, 100, 200, 300) if shard.match([n], namespace=OURS).versions}
    assert there == {0, 200, 300}
    assert held(shard, "them") == 1


def test_no_tenant_pins_the_shard_by_calling_everything_dear() -> None:
    shard = two_tenants(4)
    for n in (0, 100, 200, 300):
        shard.put([n], namespace=OURS, retention=Retention(100))
    for n in (0, 100, 200):
        shard.put([n], namespace=THEIRS, retention=Retention(0))
    assert (held(shard, "us"), held(shard, "them")) == (1, 3)


def test_a_cheap_new_block_is_no_shield_for_dear_old_ones() -> None:
    """Who has kept something longest pays, with what it says is cheap as long as it has any."""
    shard = two_tenants(4)
    for n in (0, 100):
        shard.put([n], namespace=OURS, retention=Retention(100))
    shard.put([0], namespace=THEIRS)
    shard.put([200], namespace=OURS, retention=Retention(0))
    shard.put([100], namespace=THEIRS)
    assert (held(shard, "us"), held(shard, "them")) == (2, 2)
    assert len(shard.match([0], namespace=OURS).versions) == 1
    shard.put([200], namespace=THEIRS)
    assert (held(shard, "us"), held(shard, "them")) == (1, 3)


# -- the tier below ----------------------------------------------------------------------------------


class Never:
    """An admission policy that writes nothing below."""

    def admits(self, slot: int, now: float) -> bool:
        return False


class Silent:
    def observe(self, use: object) -> None: ...

    def probability(self, slot: int, within_s: float, now: float) -> float:
        return 0.0


def tiered(nvme_blocks: int, *, when: DemoteWhen = DemoteWhen.USED_AGAIN, encoded: bool = False) -> Shard:
    shard = Shard()
    encode = (lambda layout: Encoding(Quality.INT8, NBYTES)) if encoded else None
    tiering = Tiering(nvme_blocks * NBYTES, when, encode=encode)
    config = CoreConfig(ShardId("shard"), INCARNATION, 8 * NBYTES, tiering=tiering)

    def admission(uses: Uses, predictor: object) -> Never:
        return Never()

    shard.core = ShardCore(config, POLICIES["lru"], lambda uses: Silent(), admission)
    shard.open(NamespaceId(bytes(16)), MODEL)
    return shard


def move(shard: Shard) -> list[int]:
    """Perform what is to move down; the numbers of the keys that did."""
    moved = []
    while moves := shard.core.moves.start(shard.now, 1 << 30):
        for one in moves:
            assert shard.core.moves.done(one)
            moved.append(int.from_bytes(one.source.key, "big"))
    shard.core.check_integrity()
    return moved


@pytest.mark.parametrize("when", DemoteWhen)
def test_what_is_dear_goes_below_and_what_is_cheap_does_not(when: DemoteWhen) -> None:
    shard = tiered(8, when=when)
    for n, retention in ((0, DEAR), (100, CHEAP), (200, None)):
        shard.put([n], retention=retention)
    for n in (300, 400, 500, 600, 700):
        shard.put([n], retention=CHEAP)  # crowds the host
    went = set(move(shard))
    assert 100 not in went
    assert (0 in went) == (when is not DemoteWhen.CROWDED)  # there the cheap ones made room
    assert (200 in went) == (when is DemoteWhen.COMMITTED)


def test_the_tier_below_gives_up_the_cheapest_first() -> None:
    shard = tiered(2)
    for n, priority in ((0, 90), (100, 60), (200, 70)):
        shard.put([n], retention=Retention(priority))
        assert move(shard) == [n]
    below = shard.core.index.nvme.evictables
    assert {n for n in (0, 100, 200) if below.holds(slot_of(shard, n))} == {0, 200}


def test_what_the_tier_below_makes_of_it_is_worth_as_much_for_as_long() -> None:
    shard = tiered(8, encoded=True)
    shard.put([0], retention=Retention(90, 10.0))
    shard.later(4)
    assert move(shard) == [0]
    index = shard.core.index
    [lesser] = [slot for slot in index.slots() if index.versions.tiers[slot] == Tier.NVME]
    assert index.retentions.of(lesser) == Retention(90, 10.0)
    assert index.retentions.end(lesser, index.uses.used_s[lesser]) == 10.0


def slot_of(shard: Shard, n: int) -> int:
    return shard.core.index.spaces[NamespaceId(bytes(16))].heads[key(n)]


# -- bounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", [-1, 101, 1 << 40])
def test_a_priority_out_of_bounds_is_refused_by_name(priority: int) -> None:
    with pytest.raises(ConfigError, match="from 0 to 100"):
        Retention(priority)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, math.nan, math.inf, TTL_S_MAX + 1])
def test_a_time_out_of_bounds_is_refused_by_name(ttl_s: float) -> None:
    with pytest.raises(ConfigError, match="or None for one without end"):
        Retention(80, ttl_s)
