"""What somebody is about to ask for is given up last: for a while, and no more than a share of the host."""

from __future__ import annotations

from kvstore.nouns import Snapshot, Tier
from tests.kvstore.core.conftest import E1, NAMESPACE
from tests.kvstore.core.test_continuations import CHAIN, World


class Busy(World):
    """Sessions end on the host, and go below only when others need the room."""

    def sink(self) -> None:
        self.core.index.freed.clear()

    disk_stands_still = False

    def perform(self) -> int:
        return 0 if self.disk_stands_still else super().perform()

    def announce(self, session: int) -> None:
        self.core.announce(Snapshot(NAMESPACE, E1), self.keys(session))
        self.perform()

    def fill(self, first: int) -> None:
        """More new blocks than the host holds."""
        for number in range(first, first + 10):
            self.now += 0.1
            self.session(number)


def test_what_was_announced_is_there_when_it_is_asked_for_however_much_comes_between() -> None:
    world = Busy()
    for session in (1, 2, 3):
        world.session(session)
    World.sink(world)
    world.session(4)  # on the host already
    for session in (1, 4):
        world.announce(session)
    world.fill(10)
    assert world.tiers(1) == world.tiers(4) == {Tier.HOST}
    assert world.tiers(2) == {Tier.NVME}, "nobody announced it"
    world.core.check_integrity()


def test_once_it_was_used_it_goes_as_any_other_does() -> None:
    world = Busy()
    world.session(1)
    world.announce(1)
    world.use(1)
    world.fill(10)
    assert world.tiers(1) == {Tier.NVME}
    assert not world.core.index.kept


def test_nobody_waits_for_ever_for_a_reader_that_does_not_come() -> None:
    world = Busy()
    world.session(1)
    world.announce(1)
    world.fill(10)
    assert world.tiers(1) == {Tier.HOST}
    world.tick(31.0)
    world.fill(30)
    assert world.tiers(1) == {Tier.NVME}
    world.core.check_integrity()


def test_only_a_share_of_the_host_is_kept() -> None:
    world = Busy(blocks=24)
    for session in range(1, 6):
        world.session(session)
    for session in range(1, 6):
        world.announce(session)
    assert len(world.core.index.kept) == 12
    assert world.core.counters["prefetch:announced_not_kept"] == 5 * CHAIN - 12
    world.fill(10)
    assert [world.tiers(session) for session in range(1, 6)] == [{Tier.HOST}] * 4 + [{Tier.NVME}]


def test_what_waits_for_its_way_down_stays_while_others_have_a_copy_there() -> None:
    world = Busy()
    world.session(2)
    world.disk_stands_still = True
    world.session(1)
    world.use(2)  # so that 1 is the one used least recently
    for session in range(3, 10):
        world.session(session)
    assert world.tiers(1) == {Tier.HOST}
    assert world.tiers(2) == {Tier.NVME}
    world.core.check_integrity()
