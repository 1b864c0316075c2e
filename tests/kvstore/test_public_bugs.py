"""What went wrong elsewhere, in public, must not be possible here. One test a fault, named after it.

The issues are of other systems; numbers and links stand in docs/design.md, "Faults of the field".
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.core.state import CoreLimits
from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.errors import EpochConflict, LeaseExpired, NotFound
from kvstore.lineage import Lineage
from kvstore.nouns import BlockRef, Incarnation, MissReason, Quality, Refusal, Snapshot, WeightsDigest
from kvstore.tiers.base import place_of
from kvstore.tiers.host import HostTier
from tests.kvstore.oracle import (
    FRAME_NBYTES,
    LAYOUT,
    SECRET,
    SPEC,
    TIMEOUT,
    chain,
    epoch,
    frame,
    get,
    offer,
    payload,
    put,
    refs_in,
    refs_of,
)
from tests.kvstore.shard import E1, E2, Shard, leases


async def test_kv_seventeen_epochs_stale() -> None:
    """Hot KV that every look-up kept fresh survived 17 weight updates and was served to all of them."""
    shard = await Shard(frames=2).open()
    made = chain(shard.namespace, 2)
    await put(shard.driver, made, [0, 1], E1)
    for number in range(2, 19):
        now = epoch(number)
        await shard.driver.register_epoch(SPEC.model_id, now, timeout_s=TIMEOUT)
        await shard.driver.advance_epoch(SPEC.model_id, number, timeout_s=TIMEOUT)
        for lag in (0, 17):
            found = await shard.match(made.keys, shard.snapshot(epoch=now, stale_lag_max=lag))
            assert (len(found), found.miss) == (0, MissReason.OTHER_EPOCH)
        kept = await shard.match(made.keys)  # an engine that never updated keeps it hot
        assert len(kept) == 2
        await shard.driver.release(leases(kept), timeout_s=TIMEOUT)
    done = await put(shard.driver, made, [0, 1], now)  # no flush was needed to make room
    assert await get(shard.driver, shard.namespace, refs_of(done)) == [payload(k, now) for k in made.keys]


async def test_an_epoch_number_used_again_after_a_restart() -> None:
    """The trainer restarted, counted from 1 again, and met the KV of its former life."""
    shard = await Shard().open()
    made = chain(shard.namespace, 1)
    await put(shard.driver, made, [0], E1)
    again = replace(E1, weights_digest=WeightsDigest(b"other weights!!!"))
    with pytest.raises(EpochConflict):
        await shard.driver.register_epoch(SPEC.model_id, again, timeout_s=TIMEOUT)
    found = await shard.match(made.keys, shard.snapshot(epoch=again))
    assert (len(found), found.miss) == (0, MissReason.OTHER_EPOCH)


async def test_an_adapter_loaded_again_under_its_old_name(shard: Shard) -> None:
    """Same name, other weights: blocks were reused, 12 of 12 answers wrong."""
    ids = [
        await shard.driver.open_namespace(
            replace(SPEC, adapter_digest=bytes([version]) * 16), "tenant", timeout_s=TIMEOUT
        )
        for version in (1, 2)
    ]
    old, new = chain(ids[0], 1), chain(ids[1], 1)
    await put(shard.driver, old, [0], E1)
    for keys in (old.keys, new.keys):
        assert len(await shard.match(keys, shard.snapshot(namespace=ids[1]))) == 0


@pytest.mark.parametrize(
    ("onboarded", "publishes"),
    [
        ([(E1, Quality.LOSSLESS)], None),
        ([(E2, Quality.INT8)], Quality.INT8),
        ([(E2, Quality.INT8), (E2, Quality.LOSSLESS)], Quality.INT8),
        ([(E2, Quality.LOSSLESS), (E1, Quality.INT8)], None),
        ([(E2, Quality.LOSSLESS)], Quality.LOSSLESS),
    ],
)
async def test_a_suffix_computed_over_stale_or_lossy_blocks(
    shard: Shard, onboarded: list[tuple[object, Quality]], publishes: Quality | None
) -> None:
    """Its key says nothing of what it was computed over; it was served as the model's own."""
    lineage = Lineage(E2)
    for of, quality in onboarded:
        lineage = lineage.absorb(of, quality)  # type: ignore[arg-type]
    assert lineage.publishable is publishes
    if publishes is None:
        return
    made = chain(shard.namespace, 1)
    await put(shard.driver, made, [0], E2, quality=publishes)
    found = await shard.match(made.keys, shard.snapshot(epoch=E2))
    assert len(found) == (publishes is Quality.LOSSLESS)


async def test_a_reader_during_a_rewrite_and_the_reuse_of_its_slot() -> None:
    """The stale reference was answered with another prompt's KV, and no counter moved."""
    shard = await Shard(frames=1).open()
    made, rival = chain(shard.namespace, 1), chain(shard.namespace, 1, first_token=70)
    stale = refs_of(await put(shard.driver, made, [0], E1, quality=Quality.INT8))
    await put(shard.driver, rival, [0], E1)
    (now,) = refs_of(await put(shard.driver, made, [0], E1))
    assert (now.slot, stale[0].slot) == (0, 0)
    assert await get(shard.driver, shard.namespace, stale) == [MissReason.STALE_REFERENCE]
    assert await get(shard.driver, shard.namespace, [now]) == [payload(made.keys[0], E1)]
    assert shard.driver.core.counters["miss:stale_reference"] == 1


async def test_a_lease_that_ends_in_the_middle_of_a_read() -> None:
    shard = await Shard(frames=2).open()
    made, rival = chain(shard.namespace, 2), chain(shard.namespace, 2, first_token=70)
    await put(shard.driver, made, [0, 1], E1)
    matched = await shard.match(made.keys, lease_s=2.0)
    items = shard.driver.read(shard.namespace, refs_in(matched), timeout_s=TIMEOUT)
    assert (await anext(items)).frame is not None
    shard.later(3)
    await put(shard.driver, rival, [0, 1], E1)
    left = await anext(items)
    assert (left.frame, left.miss) == (None, MissReason.STALE_REFERENCE)


async def test_a_writer_that_dies_in_the_middle_of_a_write(shard: Shard) -> None:
    """An expired reservation stayed readable: half of one block, half of another."""
    made = chain(shard.namespace, 2)
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, [offer(made, 0), offer(made, 1)], "w", 2.0, b"r",
        timeout_s=TIMEOUT,
    )  # fmt: skip
    await shard.driver.write(opened.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT)
    assert len(await shard.match(made.keys)) == 0
    shard.later(3)
    with pytest.raises(LeaseExpired):
        await shard.driver.commit(opened.txn, None, timeout_s=TIMEOUT)
    status = await shard.driver.status(timeout_s=TIMEOUT)
    assert (status.staged_nbytes, status.ownerless_nbytes, status.versions) == (0, 0, 0)
    await put(shard.driver, made, [0, 1], E1)
    assert len(await shard.match(made.keys)) == 2


async def test_what_exists_is_not_evicted_before_it_is_used() -> None:
    """The look-up said yes, the block went, the transfer read what came after it."""
    shard = await Shard(frames=2).open()
    made, rival = chain(shard.namespace, 1), chain(shard.namespace, 2, first_token=70)
    await put(shard.driver, made, [0], E1)
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, [offer(made, 0)], "w", 10.0, b"r", timeout_s=TIMEOUT
    )
    assert opened.outcomes == (Refusal.EXISTS,)
    await put(shard.driver, rival, [0], E1)
    refused = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, [offer(rival, 0), offer(rival, 1)], "w", 10.0, b"s",
        timeout_s=TIMEOUT,
    )  # fmt: skip
    assert refused.outcomes == (Refusal.EXISTS, Refusal.NO_SPACE)
    done = await shard.driver.commit(opened.txn, None, timeout_s=TIMEOUT)
    assert await get(shard.driver, shard.namespace, refs_of(done)) == [payload(made.keys[0], E1)]


async def test_two_writers_of_one_key(shard: Shard) -> None:
    """Both were told that they had stored it; readers got a mixture, or nothing."""
    made = chain(shard.namespace, 1)
    asked = [offer(made, 0)]
    txns = [
        await shard.driver.begin(
            shard.namespace, E1, Quality.LOSSLESS, asked, n, 9.0, n.encode(), timeout_s=1
        )
        for n in ("one", "two")
    ]
    assert [t.outcomes for t in txns] == [(None,), (Refusal.STAGED,)]
    await shard.driver.write(txns[0].txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT)
    answers = [(await shard.driver.commit(t.txn, None, timeout_s=TIMEOUT)).blocks for t in txns]
    assert isinstance(answers[0][0], BlockRef)
    assert answers[1] == (Refusal.STAGED,)


async def test_what_exists_is_never_null(shard: Shard) -> None:
    """exists() said true and get() gave null, for ever."""
    made = chain(shard.namespace, 1)
    (ref,) = refs_of(await put(shard.driver, made, [0], E1))
    shard.driver.storage.discard(place_of(ref))
    assert await get(shard.driver, shard.namespace, [ref]) == [MissReason.ABSENT]
    assert len(await shard.match(made.keys)) == 0  # and it says so from here on
    await put(shard.driver, made, [0], E1, request_id=b"again")
    assert await get(shard.driver, shard.namespace, refs_in(await shard.match(made.keys))) == [
        payload(made.keys[0], E1)
    ]


async def test_what_was_acknowledged_is_there(shard: Shard) -> None:
    """After a store was acknowledged, 23 to 57 of 100 look-ups missed."""
    for first_token in range(0, 2000, 10):
        made = chain(shard.namespace, 1, first_token)
        await put(shard.driver, made, [0], E1)
        found = await shard.match(made.keys)
        assert found.miss is None
        await shard.driver.release(leases(found), timeout_s=TIMEOUT)


async def test_over_quota_writes_are_refused_and_never_vanish() -> None:
    """They returned success and were gone."""
    shard = await Shard(frames=8, quotas={"tenant": 2 * FRAME_NBYTES}).open()
    made = chain(shard.namespace, 3)
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, [offer(made, i) for i in range(3)], "w", 9.0, b"r", timeout_s=1
    )
    assert opened.outcomes == (None, None, Refusal.QUOTA)
    await shard.driver.write(opened.txn, [(i, *frame(made, i, E1)) for i in (0, 1)], timeout_s=TIMEOUT)
    done = await shard.driver.commit(opened.txn, 9.0, timeout_s=TIMEOUT)
    assert done.blocks[2] is Refusal.QUOTA
    assert len(await shard.match(made.keys)) == 2


async def test_a_key_learned_from_another_tenant(shard: Shard) -> None:
    """Knowing a key, a reference, even a namespace's name of somebody else opens nothing."""
    theirs = await shard.driver.open_namespace(SPEC, "another tenant", timeout_s=TIMEOUT)
    made = chain(theirs, 1)
    (ref,) = refs_of(await put(shard.driver, made, [0], E1))
    assert len(await shard.match(made.keys)) == 0
    assert await get(shard.driver, shard.namespace, [ref]) == [MissReason.STALE_REFERENCE]
    assert await shard.driver.report(shard.namespace, [ref], timeout_s=TIMEOUT) == 0
    page = await shard.driver.listing(shard.namespace, None, 0, 100, timeout_s=TIMEOUT)
    assert page.versions == ()
    batch = await anext(shard.driver.watch([shard.namespace], page.revision, timeout_s=0.01))
    assert batch.changes == ()
    assert len(await shard.match(made.keys, shard.snapshot(namespace=theirs))) == 1


async def test_a_restarted_shard_serves_nothing_of_its_former_life() -> None:
    """Garbled answers after a restart: references still resolved, to whatever lay there."""
    shard = await Shard().open()
    made = chain(shard.namespace, 1)
    done = await put(shard.driver, made, [0], E1)
    config = DriverConfig(shard.driver.shard, 1 << 20, SECRET, Incarnation(8), CoreLimits())
    later = ShardDriver(config, HostTier())
    with pytest.raises(NotFound):
        await later.match(Snapshot(shard.namespace, E1), made.keys, "r", 1.0, timeout_s=TIMEOUT)
    assert await later.open_namespace(SPEC, "tenant", timeout_s=TIMEOUT) == shard.namespace
    assert await get(later, shard.namespace, refs_of(done)) == [MissReason.STALE_REFERENCE]


def test_the_oracle_tells_epochs_and_qualities_apart() -> None:
    made = chain(b"n" * 16, 1)  # type: ignore[arg-type]
    bodies = {payload(made.keys[0], of, q) for of in (E1, E2) for q in (Quality.LOSSLESS, Quality.INT8)}
    assert len(bodies) == 4
    assert all(len(body) == LAYOUT.block_nbytes for body in bodies)


@pytest.fixture
async def shard() -> Shard:
    return await Shard().open()
