"""Promise 4: what reached NVMe survives power loss at any write or sync, and what was deleted stays deleted.

A history runs once over a file system in memory that logs every operation; then the machine is stopped
before each of them, and each time several of the disks that may be left are drawn and recovered from.
"""

from __future__ import annotations

import random

import pytest

from kvstore.tiers.base import Place
from kvstore.tiers.nvme import journal
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block
from tests.kvstore.tiers.nvme.crash_files import CrashFiles, Inline, Operation, World
from tests.kvstore.tiers.nvme.history import History, Oracle, Written, adopt_all, blocks_of, small
from tests.kvstore.tiers.nvme.test_reclaiming import turns

TEN = [Written(Block(key), 0) for key in range(10)]


@pytest.fixture(autouse=True)
def _journals_are_rewritten_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "GROWTH_NBYTES", 1_000)


async def lived(seed: int, directories: int = 1, steps: int = 130) -> tuple[CrashFiles, Oracle, NvmeTier]:
    """Two lives: one that was closed, one that was not."""
    rng = random.Random(seed)
    files, oracle = CrashFiles(), Oracle()
    first = History(files, small(directories), rng, oracle)
    await first.open()
    await first.run(steps)
    await first.tier.close()
    second = History(files, small(directories), rng, oracle)
    await second.open()
    await second.run(steps // 2)
    await second.sync()
    return files, oracle, second.tier


async def recovered(world: World, directories: int, oracle: Oracle, at: int) -> set[Block]:
    """Which blocks a start over these disks finds; all of them were read."""
    tier = NvmeTier(small(directories), CrashFiles(world), Inline(), random.Random(at).getrandbits)
    found = await tier.recover()
    oracle.check(found, at)
    await adopt_all(tier, found)
    await tier.close()
    return set(blocks_of(found))


async def stop_everywhere(seed: int, directories: int, steps: int, survivors: int) -> None:
    files, oracle, tier = await lived(seed, directories, steps)
    assert tier.counters["copied_nbytes"] > 0, "nothing was reclaimed"
    assert {operation.kind for operation in files.log} >= {"unlink", "rename", "size"}
    world = World()
    for at in range(len(files.log) + 1):
        for draw in range(survivors):
            rng = random.Random(f"{seed}/{at}/{draw}")
            await recovered(world.survivor(rng), directories, oracle, at)
        if at < len(files.log):
            world.apply(files.log[at])
    await tier.close()


async def test_power_may_fail_at_every_operation() -> None:
    await stop_everywhere(1, 1, 130, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "directories"), [(2, 2), (21, 1), (22, 1)])
async def test_power_may_fail_at_every_operation_of_longer_histories(seed: int, directories: int) -> None:
    await stop_everywhere(seed, directories, 200 * directories, 1)


async def begun_again(world: World, oracle: Oracle, seed: str, steps: int) -> list[Operation]:
    """The operations of a start over these disks and of the first writes after it; facts go to the oracle."""
    files = CrashFiles(world.as_it_is())
    life = History(files, small(write_wait_s=5.0), random.Random(seed), oracle)
    await life.open()
    await life.run(steps)
    await life.sync()
    await life.tier.close()
    return files.log


async def stop_in_recovery(seed: int, stops: int, again: int) -> None:
    """Stopped at random, then at every operation of the next start, then at random in the one after that."""
    files, oracle, tier = await lived(seed)
    rng, world, done = random.Random(seed), World(), 0
    for at in sorted(rng.sample(range(len(files.log) // 2, len(files.log)), stops)):
        for operation in files.log[done:at]:
            world.apply(operation)
        done = at
        # The process was killed, and the machine goes on with what it has in memory; or it was the machine.
        second = world.as_it_is() if rng.random() < 0.5 else world.survivor(random.Random(f"{seed}/{at}"))
        facts = oracle.after(at)
        log = await begun_again(second, facts, f"{seed}/{at}/second", 8)
        for stop in range(len(log) + 1):
            third = second.survivor(random.Random(f"{seed}/{at}/{stop}"))
            then = facts.after(stop)
            last = await begun_again(third, then, f"{seed}/{at}/{stop}/third", 2)
            for end in rng.choices(range(len(last) + 1), k=again):
                left = third.as_it_is()
                for operation in last[:end]:
                    left.apply(operation)
                await recovered(left.survivor(random.Random(end)), 1, then, end)
            if stop < len(log):
                second.apply(log[stop])
    await tier.close()


async def test_power_may_fail_while_it_recovers_from_a_failure() -> None:
    await stop_in_recovery(4, 3, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [30, 31])
async def test_power_may_fail_in_many_recoveries(seed: int) -> None:
    await stop_in_recovery(seed, 8, 1)


async def test_a_scan_makes_durable_what_it_found_before_it_says_so_in_a_footer() -> None:
    """A killed process left frames in the page cache alone; power fails while they are recovered."""
    tier = NvmeTier(small(), CrashFiles(), Inline(), random.Random(0).getrandbits)
    await tier.recover()
    for key in range(10):
        await tier.write(Place(key, 1), Block(key).frame())
    await turns()  # written in the background, not synced
    assert isinstance(tier.files, CrashFiles)
    world = tier.files.world.as_it_is()
    files = CrashFiles(world.as_it_is())
    again = NvmeTier(small(), files, Inline())
    assert len((await again.recover()).blocks) > 3
    for operation in [*files.log, None]:
        for seed in range(40):
            await recovered(world.survivor(random.Random(seed)), 1, Oracle(TEN, []), 0)
        if operation is not None:
            world.apply(operation)
    await again.close()
    await tier.close()


async def test_a_killed_process_loses_power_next() -> None:
    """What a restart found in the page cache is durable before it is handed out."""
    files, oracle, tier = await lived(3)
    world = World()
    for at in range(0, len(files.log)):
        world.apply(files.log[at])
        if at % 5:
            continue
        left = world.as_it_is()
        found = await recovered(left, 1, oracle, at + 1)
        assert found <= await recovered(left.survivor(random.Random(at)), 1, oracle, at + 1)
    await tier.close()
