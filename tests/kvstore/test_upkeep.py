"""Promise: whatever fails, a shard goes on ending leases, ends its watches, and mends what it lost."""

from __future__ import annotations

import asyncio

import pytest

from kvstore import failpoints
from kvstore.core.eviction import Evictables
from kvstore.core.state import Offer
from kvstore.core.uses import Use
from kvstore.errors import Unavailable
from kvstore.lending import Lent
from kvstore.nouns import MissReason
from kvstore.tiers.base import place_of
from kvstore.transport.base import Purge
from tests.kvstore.core.conftest import E1 as E1_CORE
from tests.kvstore.core.conftest import LOSSLESS, NAMESPACE, key
from tests.kvstore.core.conftest import Shard as Core
from tests.kvstore.oracle import TIMEOUT, chain, get, new_driver, payload, put, refs_in, refs_of
from tests.kvstore.shard import E1, Shard


async def test_the_reaper_outlives_what_fails_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = new_driver(reap_interval_s=0.001)
    failed, went_on = asyncio.Event(), asyncio.Event()

    def fail(_now: float) -> int:
        (went_on if failed.is_set() else failed).set()
        raise OSError("EIO")

    monkeypatch.setattr(driver.core, "reap", fail)
    await driver.start()
    await asyncio.wait_for(went_on.wait(), TIMEOUT)
    await driver.close()
    assert driver.core.counters["upkeep_failed"] >= 1


async def test_closing_a_shard_ends_its_watches() -> None:
    shard = await Shard().open()
    watch = shard.driver.watch([shard.namespace], None, timeout_s=3600.0)
    await anext(watch)
    waiting = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    await shard.driver.close()
    with pytest.raises(Unavailable, match="closed"):
        await asyncio.wait_for(waiting, TIMEOUT)


async def test_a_purge_of_pinned_blocks_leaves_a_shard_that_is_whole() -> None:
    shard = await Shard().open()
    made = chain(shard.namespace, 2)
    await put(shard.driver, made, [0, 1], E1)
    held = await shard.match(made.keys)
    await shard.driver.purge(Purge(shard.namespace, (made.keys[0],)), timeout_s=TIMEOUT)
    shard.driver.check_integrity()
    await shard.driver.purge(Purge(shard.namespace), timeout_s=TIMEOUT)
    shard.driver.check_integrity()
    assert await get(shard.driver, shard.namespace, refs_in(held)) == [payload(k, E1) for k in made.keys]


async def test_bytes_that_were_lost_are_found_out_by_whoever_sends_them() -> None:
    shard = await Shard().open()
    made = chain(shard.namespace, 1)
    (ref,) = refs_of(await put(shard.driver, made, [0], E1))
    shard.driver.storage.discard(place_of(ref))
    assert await Lent(shard.driver, shard.namespace, ()).borrow(ref) is MissReason.ABSENT
    assert len(await shard.match(made.keys)) == 0
    await put(shard.driver, made, [0], E1, request_id=b"again")
    assert len(await shard.match(made.keys)) == 1


async def test_an_error_of_storage_costs_one_block_and_is_counted() -> None:
    shard = await Shard().open()
    made = chain(shard.namespace, 1)
    (ref,) = refs_of(await put(shard.driver, made, [0], E1))
    with failpoints.armed("storage.read", failpoints.Fail(OSError("EIO"))):
        assert await Lent(shard.driver, shard.namespace, ()).borrow(ref) is MissReason.SHARD_UNAVAILABLE
    assert shard.driver.core.counters["storage_error:read"] == 1
    lent = Lent(shard.driver, shard.namespace, ())
    assert isinstance(await lent.borrow(ref), memoryview)
    lent.give_back()


async def test_a_closed_shard_lends_nothing() -> None:
    shard = await Shard().open()
    made = chain(shard.namespace, 1)
    (ref,) = refs_of(await put(shard.driver, made, [0], E1))
    await shard.driver.close()
    with pytest.raises(Unavailable):
        await Lent(shard.driver, shard.namespace, ()).borrow(ref)


def test_letting_go_touches_what_was_used_however_long_a_chain_its_writers_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = 3 * 1024
    core = Core(blocks, slots_max=blocks)
    for start in range(0, blocks, 1024):
        offers = [Offer(key(n + 1), key(n), n, key(1), 1) for n in range(start, min(blocks, start + 1024))]
        txn = core.core.begin(NAMESPACE, E1_CORE, LOSSLESS, offers, "w", 9.0, b"%d" % start, core.now)
        core.write(txn)
        core.commit(txn)
    used: list[int] = []
    use = Evictables.use

    def counted(self: Evictables, tenant: str, of: Use) -> None:
        used.extend(of.slots)
        use(self, tenant, of)

    monkeypatch.setattr(Evictables, "use", counted)
    held = core.match([blocks], E1_CORE)
    core.release(held.lease)
    assert len(used) == 1
    core.core.check_integrity()
