"""The driver over a real core and host tier: acknowledged means visible, and a wrong hit never is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from kvstore import failpoints
from kvstore.errors import ConfigError, EpochConflict, EpochUnknown, LeaseExpired
from kvstore.nouns import (
    BlockRef,
    Incarnation,
    KVLayout,
    MissReason,
    NamespaceSpec,
    Quality,
    Refusal,
    Revision,
    allow_stale,
)
from tests.kvstore.oracle import (
    LAYOUT,
    SPEC,
    TIMEOUT,
    chain,
    frame,
    get,
    new_driver,
    offer,
    payload,
    put,
    refs_in,
    refs_of,
)
from tests.kvstore.shard import E1, E2, Shard, leases


@pytest.fixture
async def shard() -> AsyncIterator[Shard]:
    opened = await Shard().open()
    yield opened
    opened.driver.check_integrity()


async def test_committed_blocks_are_matched_and_read_back(shard: Shard) -> None:
    made = chain(shard.namespace, 5)
    await put(shard.driver, made, range(5), E1)
    matched = await shard.match(made.keys)
    assert matched.miss is None
    assert await get(shard.driver, shard.namespace, refs_in(matched)) == [payload(k, E1) for k in made.keys]


async def test_match_stops_at_the_first_gap(shard: Shard) -> None:
    made = chain(shard.namespace, 5)
    await put(shard.driver, made, [0, 1, 3, 4], E1)
    matched = await shard.match(made.keys)
    assert (len(matched), matched.miss) == (2, MissReason.ABSENT)


async def test_new_weights_never_meet_old_kv(shard: Shard) -> None:
    made = chain(shard.namespace, 2)
    await put(shard.driver, made, [0, 1], E1)
    assert (await shard.match(made.keys, shard.snapshot(epoch=E2))).miss is MissReason.OTHER_EPOCH
    stale = shard.snapshot(epoch=E2, stale_lag_max=1)
    assert (await shard.match(made.keys, stale)).miss is MissReason.OTHER_EPOCH
    await shard.driver.advance_epoch(SPEC.model_id, 2, allow_stale(1), timeout_s=TIMEOUT)
    lagging = await shard.match(made.keys, stale)
    assert (len(lagging), lagging.epochs) == (2, (E1,))


async def test_an_epoch_number_is_bound_to_its_weights_for_ever(shard: Shard) -> None:
    other = type(E1)(1, E2.weights_digest)
    with pytest.raises(EpochConflict, match="bound to weights"):
        await shard.driver.register_epoch(SPEC.model_id, other, timeout_s=TIMEOUT)
    with pytest.raises(EpochUnknown):
        await put(shard.driver, chain(shard.namespace, 1), [0], other)
    with pytest.raises(EpochUnknown):
        await shard.driver.advance_epoch(SPEC.model_id, 9, timeout_s=TIMEOUT)


async def test_staged_blocks_are_invisible_until_commit(shard: Shard) -> None:
    made = chain(shard.namespace, 1)
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, [offer(made, 0)], "w", 10.0, b"r", timeout_s=TIMEOUT
    )
    assert await shard.driver.write(opened.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT) == [None]
    assert (await shard.match(made.keys)).miss is MissReason.ABSENT
    await shard.driver.commit(opened.txn, None, timeout_s=TIMEOUT)
    assert (await shard.match(made.keys)).miss is None


async def test_two_writers_of_one_key(shard: Shard) -> None:
    made = chain(shard.namespace, 1)
    begin = (shard.namespace, E1, Quality.LOSSLESS, [offer(made, 0)])
    first = await shard.driver.begin(*begin, "a", 10.0, b"a", timeout_s=TIMEOUT)
    second = await shard.driver.begin(*begin, "b", 10.0, b"b", timeout_s=TIMEOUT)
    assert (first.outcomes, second.outcomes) == ((None,), (Refusal.STAGED,))
    await shard.driver.write(first.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT)
    (ref,) = refs_of(await shard.driver.commit(first.txn, None, timeout_s=TIMEOUT))
    third = await put(shard.driver, made, [0], E1)
    assert third.blocks == (ref,)
    assert (await shard.driver.commit(second.txn, None, timeout_s=TIMEOUT)).blocks == (Refusal.STAGED,)


async def test_begin_and_commit_are_idempotent(shard: Shard) -> None:
    made = chain(shard.namespace, 1)
    args = (shard.namespace, E1, Quality.LOSSLESS, [offer(made, 0)], "w", 10.0, b"same")
    first = await shard.driver.begin(*args, timeout_s=TIMEOUT)
    assert await shard.driver.begin(*args, timeout_s=TIMEOUT) == first
    await shard.driver.write(first.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT)
    answer = await shard.driver.commit(first.txn, 5.0, timeout_s=TIMEOUT)
    assert await shard.driver.commit(first.txn, 5.0, timeout_s=TIMEOUT) == answer


async def test_what_was_granted_but_never_written_is_refused_by_name(shard: Shard) -> None:
    made = chain(shard.namespace, 2)
    offers = [offer(made, 0), offer(made, 1)]
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, offers, "w", 10.0, b"r", timeout_s=TIMEOUT
    )
    await shard.driver.write(opened.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT)
    result = await shard.driver.commit(opened.txn, None, timeout_s=TIMEOUT)
    assert isinstance(result.blocks[0], BlockRef)
    assert result.blocks[1] is Refusal.UNWRITTEN


async def test_bytes_that_are_not_what_was_offered_are_refused(shard: Shard) -> None:
    made, other = chain(shard.namespace, 3), chain(shard.namespace, 3, first_token=900)
    offers = [offer(made, i) for i in range(3)]
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, offers, "w", 10.0, b"r", timeout_s=TIMEOUT
    )
    header, body = frame(made, 0, E1)
    torn = memoryview(bytes(body[:-1]) + bytes([body[-1] ^ 1]))
    frames = [(0, header, torn), (1, b"x" * len(header), body), (2, *frame(other, 2, E1))]
    outcomes = await shard.driver.write(opened.txn, frames, timeout_s=TIMEOUT)
    assert outcomes == [Refusal.CHECKSUM, Refusal.BAD_HEADER, Refusal.MISMATCH]
    assert (await shard.driver.status(timeout_s=TIMEOUT)).staged_nbytes == 0


async def test_writer_dead_mid_write_leaves_nothing(shard: Shard) -> None:
    made = chain(shard.namespace, 2)
    offers = [offer(made, 0), offer(made, 1)]
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, offers, "w", 3.0, b"r", timeout_s=TIMEOUT
    )
    await shard.driver.write(opened.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT)
    shard.later(4)
    status = await shard.driver.status(timeout_s=TIMEOUT)
    assert (status.staged_nbytes, status.leases, status.versions) == (0, 0, 0)
    with pytest.raises(LeaseExpired, match="begin another"):
        await shard.driver.write(opened.txn, [(1, *frame(made, 1, E1))], timeout_s=TIMEOUT)
    assert (await put(shard.driver, made, [0, 1], E1, request_id=b"again")).lease is None


async def test_writer_whose_lease_ends_while_a_frame_is_copied(shard: Shard) -> None:
    made = chain(shard.namespace, 1)
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, [offer(made, 0)], "w", 3.0, b"r", timeout_s=TIMEOUT
    )
    gate = asyncio.Event()
    with failpoints.armed("storage.write", failpoints.Delay(gate)):
        writing = asyncio.ensure_future(
            shard.driver.write(opened.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT)
        )
        await asyncio.sleep(0)
        shard.later(4)
        gate.set()
        with pytest.raises(LeaseExpired):
            await writing
    assert (await shard.driver.status(timeout_s=TIMEOUT)).versions == 0


async def test_pinned_blocks_are_not_evicted_and_refusals_are_explicit() -> None:
    shard = await Shard(frames=4).open()
    made, rival = chain(shard.namespace, 4), chain(shard.namespace, 2, first_token=500)
    await put(shard.driver, made, range(4), E1)
    held = await shard.match(made.keys)
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, [offer(rival, 0)], "w", 10.0, b"r", timeout_s=TIMEOUT
    )
    assert opened.outcomes == (Refusal.NO_SPACE,)
    await shard.driver.release(leases(held), timeout_s=TIMEOUT)
    await put(shard.driver, rival, [0, 1], E1)
    left = await shard.match(made.keys)
    assert left.slots == held.slots[:2]  # the leaves went first
    shard.driver.check_integrity()


async def test_old_epochs_are_the_first_victims() -> None:
    shard = await Shard(frames=4).open()
    old, new = chain(shard.namespace, 2), chain(shard.namespace, 2, first_token=500)
    await put(shard.driver, new, [0, 1], E2)
    await put(shard.driver, old, [0, 1], E1)
    await shard.driver.advance_epoch(SPEC.model_id, 2, timeout_s=TIMEOUT)
    await put(shard.driver, chain(shard.namespace, 2, first_token=800), [0, 1], E2)
    assert len(await shard.match(old.keys)) == 0
    assert len(await shard.match(new.keys, shard.snapshot(epoch=E2))) == 2


async def test_a_reference_to_a_reused_slot_is_a_miss() -> None:
    shard = await Shard(frames=1).open()
    first, second = chain(shard.namespace, 1), chain(shard.namespace, 1, first_token=70)
    refs = refs_of(await put(shard.driver, first, [0], E1))
    (newer,) = refs_of(await put(shard.driver, second, [0], E1))
    assert newer.slot == refs[0].slot
    assert await get(shard.driver, shard.namespace, [*refs, newer]) == [
        MissReason.STALE_REFERENCE,
        payload(second.keys[0], E1),
    ]


async def test_a_slot_reused_while_it_is_read_is_a_miss() -> None:
    shard = await Shard(frames=1).open()
    first, second = chain(shard.namespace, 1), chain(shard.namespace, 1, first_token=70)
    refs = refs_of(await put(shard.driver, first, [0], E1))
    gate = asyncio.Event()
    with failpoints.armed("storage.read", failpoints.Delay(gate)):
        reading = asyncio.ensure_future(get(shard.driver, shard.namespace, refs))
        await asyncio.sleep(0)
        await put(shard.driver, second, [0], E1)
        gate.set()
        assert await reading == [MissReason.STALE_REFERENCE]


async def test_a_reference_of_another_incarnation_is_a_miss(shard: Shard) -> None:
    (ref,) = refs_of(await put(shard.driver, chain(shard.namespace, 1), [0], E1))
    past = BlockRef(ref.shard, Incarnation(6), ref.slot, ref.generation)
    assert await get(shard.driver, shard.namespace, [past]) == [MissReason.STALE_REFERENCE]
    snapshot = shard.snapshot(revision=Revision(Incarnation(6), 1))
    assert (await shard.match(chain(shard.namespace, 1).keys, snapshot)).miss is MissReason.COMPACTED


async def test_a_pin_holds_until_its_lease_ends() -> None:
    shard = await Shard(frames=1).open()
    made, rival = chain(shard.namespace, 1), chain(shard.namespace, 1, first_token=70)
    await put(shard.driver, made, [0], E1)
    matched = await shard.match(made.keys, lease_s=3.0)
    shard.later(2)
    assert await shard.driver.renew(leases(matched), 3.0, timeout_s=TIMEOUT) == [True]
    shard.later(2)
    assert await get(shard.driver, shard.namespace, refs_in(matched)) == [payload(made.keys[0], E1)]
    shard.later(2)
    assert await shard.driver.renew(leases(matched), 3.0, timeout_s=TIMEOUT) == [False]
    await put(shard.driver, rival, [0], E1)
    assert await get(shard.driver, shard.namespace, refs_in(matched)) == [MissReason.STALE_REFERENCE]


async def test_the_shards_own_pause_ends_no_lease(shard: Shard) -> None:
    made = chain(shard.namespace, 1)
    await put(shard.driver, made, [0], E1)
    matched = await shard.match(made.keys, lease_s=3.0)
    shard.clock.advance(60.0)  # stopped: nobody ticked, nobody could renew
    assert shard.driver.core.reap(shard.clock.now()) == 0
    assert await shard.driver.renew(leases(matched), 3.0, timeout_s=TIMEOUT) == [True]
    shard.later(4)
    assert (await shard.driver.status(timeout_s=TIMEOUT)).leases == 0


async def test_a_fixed_revision_never_gains_and_only_shrinks_to_a_miss(shard: Shard) -> None:
    first, second = chain(shard.namespace, 1), chain(shard.namespace, 1, first_token=70)
    at = (await put(shard.driver, first, [0], E1)).revision
    await put(shard.driver, second, [0], E1)
    then = shard.snapshot(revision=at)
    assert (await shard.match(first.keys, then)).miss is None
    assert (await shard.match(second.keys, then)).miss is MissReason.NOT_YET


async def test_a_flipped_byte_is_reported_retired_and_written_again() -> None:
    shard = await Shard(faults=True).open()
    made = chain(shard.namespace, 2)
    before = refs_of(await put(shard.driver, made, [0, 1], E1))
    # A false alarm retires nothing.
    assert await shard.driver.report(shard.namespace, before, timeout_s=TIMEOUT) == 0
    assert shard.driver.flip_stored_byte() == made.keys[0]
    assert await shard.driver.report(shard.namespace, before, timeout_s=TIMEOUT) == 1
    assert (await shard.match(made.keys)).miss is MissReason.ABSENT
    await put(shard.driver, made, [0], E1, request_id=b"again")
    matched = await shard.match(made.keys)
    assert await get(shard.driver, shard.namespace, refs_in(matched)) == [payload(k, E1) for k in made.keys]
    shard.driver.check_integrity()


async def test_tenants_and_layouts_never_share_a_namespace(shard: Shard) -> None:
    other_layout = KVLayout(2, 0, 1, 4, "bfloat16", 2)
    ids = {
        await shard.driver.open_namespace(spec, tenant, timeout_s=TIMEOUT)
        for spec in (SPEC, NamespaceSpec(SPEC.model_id, other_layout, bytes(16)))
        for tenant in ("tenant", "another")
    }
    assert len(ids) == 4
    assert LAYOUT.fingerprint != other_layout.fingerprint


async def test_the_reaper_runs_without_traffic() -> None:
    shard = await Shard(reap_interval_s=0.001).open()
    await shard.driver.start()
    made = chain(shard.namespace, 1)
    await put(shard.driver, made, [0], E1)
    await shard.match(made.keys, lease_s=1.0)
    shard.clock.advance(1.5)

    reaped = asyncio.Event()
    core_reap = shard.driver.core.reap

    def reap(now: float) -> int:
        expired = core_reap(now)
        if expired:
            reaped.set()
        return expired

    shard.driver.core.reap = reap  # type: ignore[method-assign]
    await asyncio.wait_for(reaped.wait(), TIMEOUT)
    assert (await shard.driver.status(timeout_s=TIMEOUT)).leases == 0
    await shard.driver.close()


async def test_the_late_copy_of_a_frame_takes_nothing_from_the_committed_one(shard: Shard) -> None:
    made = chain(shard.namespace, 1)
    opened = await shard.driver.begin(
        shard.namespace, E1, Quality.LOSSLESS, [offer(made, 0)], "w", 5.0, b"r", timeout_s=TIMEOUT
    )
    gate = asyncio.Event()
    with failpoints.armed("storage.write", failpoints.Delay(gate)):
        late = asyncio.ensure_future(
            shard.driver.write(opened.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT)
        )
        await asyncio.sleep(0)
    assert await shard.driver.write(opened.txn, [(0, *frame(made, 0, E1))], timeout_s=TIMEOUT) == [None]
    done = await shard.driver.commit(opened.txn, None, timeout_s=TIMEOUT)
    gate.set()
    with pytest.raises(LeaseExpired):
        await late
    assert await get(shard.driver, shard.namespace, refs_of(done)) == [payload(made.keys[0], E1)]


async def test_a_block_whose_bytes_are_lost_is_absent_and_can_be_written_again(shard: Shard) -> None:
    made = chain(shard.namespace, 1)
    with failpoints.armed("storage.write", failpoints.Effect.DROP):
        (lost,) = refs_of(await put(shard.driver, made, [0], E1))
    assert await get(shard.driver, shard.namespace, [lost]) == [MissReason.ABSENT]
    assert shard.driver.core.counters["miss:absent"] == 1
    (again,) = refs_of(await put(shard.driver, made, [0], E1, request_id=b"again"))
    assert await get(shard.driver, shard.namespace, [again]) == [payload(made.keys[0], E1)]


def test_a_tick_that_looks_like_a_pause_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reap_interval_s must be at most 1\.0"):
        new_driver(reap_interval_s=1.1)
