"""Sessions that will likely go on come up by themselves: within a share of the host, and not for nothing."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.core.foreseen import Why
from kvstore.core.seams import ContinuationPredictor
from kvstore.core.shard import ShardCore
from kvstore.core.state import CoreConfig, DemoteWhen, Foresight, Namespace, Offer, Tiering
from kvstore.core.uses import Use, Uses
from kvstore.nouns import ROOT_KEY, BlockKey, LeaseId, Quality, ShardId, Snapshot, Tier
from kvstore.policies import POLICIES
from tests.kvstore.core.conftest import E1, INCARNATION, LAYOUT, MODEL, NAMESPACE, NBYTES, key

CHAIN = 3  # blocks of a session


class Fortune:
    """Says of each session what the test says. A session is known by its chain's last slot."""

    def __init__(self, uses: Uses) -> None:
        self.uses = uses
        self.says: dict[int, float] = {}
        self.seen: list[Use] = []

    def observe(self, use: Use) -> None:
        self.seen.append(use)

    def probability(self, slot: int, within_s: float, now: float) -> float:
        assert within_s == 120.0
        return self.says.get(slot, 0.0)


class World:
    """A core with a tier below it, a tick at a time."""

    def __init__(self, share: float = 0.5, blocks: int = 24) -> None:
        config = CoreConfig(
            ShardId("shard"),
            INCARNATION,
            blocks * NBYTES,
            tiering=Tiering(1 << 20, DemoteWhen.COMMITTED),
            foresight=Foresight(share=share),
        )
        self.fortune: Fortune

        def make(uses: Uses) -> ContinuationPredictor:
            self.fortune = Fortune(uses)
            return self.fortune

        self.core = ShardCore(config, POLICIES["lru"], make)
        self.core.open_namespace(NAMESPACE, Namespace(MODEL, LAYOUT))
        self.core.register_epoch(MODEL, E1)
        self.now = 0.0

    def keys(self, session: int, blocks: int = CHAIN) -> list[BlockKey]:
        return [key(100 * session + i) for i in range(blocks)]

    def session(self, number: int, blocks: int = CHAIN, likely: float = 0.0, first: int = 0) -> None:
        """A session whose last turn is over, and whose chain lies below alone. Of its first `first` blocks
        another shard is the owner."""
        keys, core = self.keys(number, blocks), self.core
        parents = [ROOT_KEY, *keys]
        offers = [Offer(keys[i], parents[i], first + i, keys[0], NBYTES) for i in range(blocks)]
        request = number.to_bytes(16, "big")
        txn = core.begin(NAMESPACE, E1, Quality.LOSSLESS, offers, "w", 10.0, request, self.now)
        for i in txn.staged.copy():
            core.written(txn, i, None, self.now)
        answer = core.commit(txn.id, None, self.now)
        self.fortune.says[answer.slots[-1]] = likely
        self.perform()
        self.sink()

    def sink(self) -> None:
        core = self.core
        while (victim := core.index.host.evictables.victim(None, core.index.now)) is not None:
            core.retiring.evict_from(core.index.host, victim)
        core.index.freed.clear()

    def perform(self) -> int:
        """Do what the core wants moved. How much came up."""
        up = 0
        while moves := self.core.moves.start(self.now, 1 << 20):
            for move in moves:
                assert self.core.moves.done(move)
                up += move.to is Tier.HOST
        self.core.index.freed.clear()
        self.core.check_integrity()
        return up

    def tick(self, seconds: float = 0.5) -> int:
        """Time passes as it does for a shard that runs; then how much came up."""
        while seconds > 0:
            self.now += min(seconds, 1.0)
            seconds -= 1.0
            self.core.reap(self.now)
            self.core.look_ahead(self.now)
        return self.perform()

    def tiers(self, session: int, blocks: int = CHAIN) -> set[Tier]:
        announced = self.core.past.run_of(
            Snapshot(NAMESPACE, E1), self.keys(session, blocks), self.core.index.space(NAMESPACE)
        )[0]
        return {Tier(self.core.index.versions.tiers[slot]) for slot in announced}

    def use(self, session: int) -> None:
        found = self.core.match(Snapshot(NAMESPACE, E1), self.keys(session), "r", 10.0, self.now)
        self.release([found.lease] if found.lease is not None else [])

    def release(self, leases: Sequence[LeaseId]) -> None:
        self.core.release(leases)

    def counted(self, outcome: str) -> int:
        return self.core.counters[f"prefetch:predicted_{outcome}"]


def test_the_likeliest_come_up_whole_and_the_unlikely_stay() -> None:
    world = World()
    world.session(1, likely=0.6)
    world.session(2, likely=0.1)
    world.session(3, likely=0.9)
    assert world.tick() == 2 * CHAIN
    assert (world.tiers(1), world.tiers(2), world.tiers(3)) == ({Tier.HOST}, {Tier.NVME}, {Tier.HOST})
    assert world.counted("blocks") == 2 * CHAIN
    assert world.fortune.seen, "the predictor goes on learning"


def test_what_is_on_the_host_for_nothing_yet_is_a_share_of_it() -> None:
    world = World(share=0.25)  # 6 of 24 blocks
    for number in range(1, 5):
        world.session(number, likely=0.5 + number / 10)
    assert world.tick() == 6
    assert (world.tiers(4), world.tiers(3), world.tiers(2)) == ({Tier.HOST}, {Tier.HOST}, {Tier.NVME})
    assert world.tick() == 0
    world.use(4)
    assert world.counted("in_time") == CHAIN
    assert world.tick() == CHAIN
    assert world.tiers(2) == {Tier.HOST}


def test_a_session_that_does_not_fit_the_share_as_a_whole_stays_below() -> None:
    world = World(share=0.1)  # 2 blocks
    world.session(1, likely=1.0)
    assert world.tick() == 0


def test_it_can_be_turned_off() -> None:
    world = World(share=0.0)
    world.session(1, likely=1.0)
    assert world.tick() == 0


def test_the_disk_is_not_kept_from_what_somebody_asked_for() -> None:
    world = World()
    world.session(1, likely=1.0)
    world.session(2)
    world.core.announce(Snapshot(NAMESPACE, E1), world.keys(2))
    world.core.look_ahead(world.now)
    assert world.counted("blocks") == 0
    assert world.perform() == CHAIN
    assert world.tick() == CHAIN


def test_a_chain_with_a_gap_is_of_no_use_and_stays() -> None:
    world = World()
    world.session(1, likely=1.0)
    world.core.purge(NAMESPACE, (world.keys(1)[1],), None)
    assert world.tick() == 0


def test_a_stripe_whose_parent_lies_on_another_shard_comes_up() -> None:
    world = World()
    world.session(1, likely=1.0, first=32)
    assert world.tick() == CHAIN
    assert world.tiers(1) == {Tier.HOST}


def test_it_stops_when_too_much_was_for_nothing_and_tries_again_later() -> None:
    world = World(share=0.25)
    for number in range(1, 4):
        world.session(number, likely=1.0)
    assert world.tick() == 6
    assert world.tick(121.0) == 0, "they were not used within their time, and all of it was wasted"
    assert world.counted("wasted") == 6
    assert world.core.continuations is not None
    assert world.core.continuations.is_wasteful
    world.sink()
    assert world.tick(60.0) == 0
    assert world.tick(1800.0) > 0, "what was long ago does not count for ever"


def test_it_goes_on_while_most_of_it_is_used() -> None:
    world = World(share=0.25)
    for number in range(1, 9):
        world.session(number, likely=1.0)
        world.tick()
        if number % 3:
            world.use(number)
        world.sink()
        world.fortune.says.clear()  # its last turn
    assert world.core.continuations is not None
    assert not world.core.continuations.is_wasteful
    assert world.counted("in_time") > world.counted("wasted") > 0


def test_a_prediction_is_no_announcement_and_the_books_are_kept_apart() -> None:
    world = World()
    world.session(1, likely=1.0)
    world.session(2)
    world.tick()
    world.core.announce(Snapshot(NAMESPACE, E1), world.keys(2))
    assert world.core.foreseen.open_nbytes[Why.PREDICTED] == CHAIN * NBYTES
    assert world.core.foreseen.open_nbytes[Why.ANNOUNCED] == CHAIN * NBYTES
    assert world.core.counters["prefetch:announced_blocks"] == CHAIN
    world.core.announce(Snapshot(NAMESPACE, E1), world.keys(1))
    assert world.core.counters["prefetch:announced_blocks"] == CHAIN, "they are there already"
