"""What every replacement policy must keep, whatever it prefers: one row a policy."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from cli.replay.baselines import BASELINES
from kvstore.core.seams import MakePolicy
from kvstore.nouns import LeaseId
from kvstore.policies import POLICIES
from tests.kvstore.core.conftest import E1, E2, NAMESPACE, Shard, key

EVERY = {**POLICIES, **BASELINES}
policies = pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)
STEPS = 300


def history(policy: MakePolicy, seed: int) -> Iterator[Shard]:
    """Chains written, read in part, held, purged, under two epochs, on a shard that is too small."""
    random_ = random.Random(seed)
    shard = Shard(blocks=40, policy=policy, pause_s=float("inf"))
    held: list[LeaseId | None] = []
    for _ in range(STEPS):
        chain, length = 100 * random_.randrange(12), random_.randrange(1, 12)
        keys, of = range(chain, chain + length), E2 if random_.random() < 0.2 else E1
        what = random_.random()
        if what < 0.5:
            shard.put(keys, of)
        elif what < 0.8:
            shard.hits(keys, of)
        elif what < 0.88:
            held.append(shard.match(keys, of).lease)
        elif what < 0.97:
            random_.shuffle(held)
            shard.release(*held[:2])
            del held[:2]
        else:
            shard.core.purge(NAMESPACE, tuple(key(n) for n in keys), None)
        shard.now += random_.random()
        yield shard
    shard.release(*held)
    yield shard


@policies
def test_what_entered_and_did_not_leave_is_exactly_what_goes(policy: MakePolicy) -> None:
    """`check_integrity` counts queues and columns; draining names every idle version, each once."""
    for step, shard in enumerate(history(policy, seed=7)):
        if step % 10 == 0:
            shard.core.check_integrity()
    index = shard.core.index
    idle, gone = set(index.slots()), []
    while (victim := index.host.evictables.victim(None, shard.now)) is not None:
        assert index.host.evictables.victim(None, shard.now) == victim, "asked again it names another"
        gone.append(victim)
        index.host.evictables.forget("default", victim)
    assert sorted(gone) == sorted(idle)
    assert index.host.evictables.queued() == 0


@policies
def test_the_same_history_has_the_same_victims(policy: MakePolicy) -> None:
    def kept(seed: int) -> list[list[int]]:
        return [list(shard.core.index.slots()) for shard in history(policy, seed)]

    assert kept(3) == kept(3)


@policies
def test_a_leaf_goes_before_its_ancestors(policy: MakePolicy) -> None:
    """However it came to be, what is resident of a chain is a prefix of what was written of it."""
    random_ = random.Random(11)
    shard = Shard(blocks=30, policy=policy, pause_s=float("inf"))
    written: dict[int, int] = {}
    for _ in range(STEPS):
        chain, length = 100 * random_.randrange(10), random_.randrange(1, 15)
        if random_.random() < 0.6:
            shard.put(range(chain, chain + length))
            written[chain] = max(length, written.get(chain, 0))
        else:
            shard.hits(range(chain, chain + length))
        shard.now += random_.random() * 100
        heads = shard.core.index.spaces[NAMESPACE].heads
        for root, blocks in written.items():
            there = [key(n) in heads for n in range(root, root + blocks)]
            assert there == sorted(there, reverse=True), "a chain with a hole"


@policies
def test_a_pinned_block_never_goes_and_may_go_once_let_go(policy: MakePolicy) -> None:
    shard = Shard(blocks=4, policy=policy)
    shard.put([0, 1])
    lease = shard.match([0, 1]).lease
    for n in range(100, 1000, 100):
        shard.put([n, n + 1])
        assert shard.present([0, 1]) == {0, 1}
    shard.release(lease)
    for n in range(1000, 3000, 100):
        shard.put([n, n + 1, n + 2, n + 3])
    assert shard.present([0, 1]) == set()


@policies
def test_tenants_and_epochs_have_queues_of_their_own(policy: MakePolicy) -> None:
    shard = Shard(blocks=6, policy=policy)
    shard.put([0, 1], E1)
    shard.put([100, 101], E2)
    shard.core.advance_epoch("model", 2)
    shard.put([200, 201, 202], E2)
    assert shard.present([100, 101], E2) == {100, 101}
    assert shard.present([0, 1], E1) == {0}
