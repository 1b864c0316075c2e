"""The edge shard through both roles: what lies in a worker's own pool is used there, and changes no token.

Promises 1, 3 and 5 for it: no stale or lesser block is lent as a better one, no slot that somebody reads is
written or given away, no slot is lost, and the pool's cache costs no admission its room.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.monolithic import generate
from engine.types import GenerationRequest
from kvstore.core.versions import State
from kvstore.errors import OverLimit
from kvstore.hashing import KeyChain
from kvstore.nouns import DROP, Epoch, Quality, Tier, WeightsDigest, allow_stale
from kvstore.transport.base import Purge
from tests.role_parts import (
    BLOCK_TOKENS,
    CACHING,
    ENGINE,
    WAIT_S,
    Pair,
    check_pool,
    pair_over,
    prompt,
    request,
    shard,
)
from tests.test_pd_lineage import OLD, seed_store

SMALL = CACHING.model_copy(update={"pool_blocks": 24, "max_model_len": 160})


def kept_of(pair: Pair, worker: int) -> list[tuple[int, Epoch, Quality]]:
    """(chain index, epoch, quality) of what a worker's edge shard holds: 0 is prefill, 1 decode."""
    edge = pair.workers[worker].edge
    assert edge is not None
    rows = [v for v in edge.driver.core.index.rows() if v.state is State.LIVE]
    assert {v.tier for v in rows} <= {Tier.DEVICE}
    return sorted((v.chain_index, v.epoch, v.quality) for v in rows)


async def until(said: Callable[[], bool]) -> None:
    """Turns of the event loop until it is so: what nobody tells of."""
    async with asyncio.timeout(WAIT_S):
        while not said():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def settle(pair: Pair) -> None:
    for worker in pair.workers:
        assert await worker.background.settle(5.0)
        await worker.loop.settled()
        await asyncio.sleep(0)


Alone = Callable[[GenerationRequest], tuple[int, ...]]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    """What one process generates that keeps nothing."""
    engine = Engine.load(folder, ENGINE)
    return lambda asked: generate(engine, asked)


async def test_the_second_turn_is_served_from_the_pool(folder: Path, alone: Alone) -> None:
    spoken = prompt(45)
    async with pair_over(folder, [shard("s0"), shard("s1")], engine=CACHING) as pair:
        for turn in range(3):
            asked = request(spoken, name=f"turn {turn}", max_tokens=30)
            first, output = await pair.generate(asked)
            assert output == alone(asked)
            await settle(pair)
            stats = first.stats
            if turn:
                # What prefill computed lies in its pool; what decode added is read from the store.
                device = (len(spoken) - 41) // BLOCK_TOKENS * BLOCK_TOKENS
                assert stats.cached_by_tier["device"] == device
                assert stats.cached_tokens == sum(stats.cached_by_tier.values())
                assert stats.cached_tokens == (len(spoken) - 12) // BLOCK_TOKENS * BLOCK_TOKENS
            else:
                assert stats.cached_by_tier == {}
            assert stats.cached_tokens // BLOCK_TOKENS + sum(stats.misses.values()) == (
                (len(spoken) - 1) // BLOCK_TOKENS
            )
            spoken = (*spoken, *output, *prompt(11, seed=turn))
        counters = await pair.decode.counters()
        assert counters["decode:local_blocks"] > 0
        assert counters["edge:kept"] > 0
        assert not counters.get("edge:leases_lost")
        assert not counters.get("edge:not_kept")
        await pair.assert_nothing_held()


async def test_what_is_used_in_place_is_not_read_again(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine=CACHING) as pair:
        await pair.generate(request(prompt(64), name="a"))
        await settle(pair)
        read = [worker.store.client_counters["verified_blocks"] for worker in pair.workers]
        first, _ = await pair.generate(request(prompt(64), name="b"))
        assert first.stats.cached_by_tier == {"device": 56}
        after = [worker.store.client_counters["verified_blocks"] for worker in pair.workers]
        assert after[0] == read[0]
        assert after[1] == read[1]
        await pair.assert_nothing_held()


async def test_sequences_share_slots_and_none_writes_what_it_shares(folder: Path, alone: Alone) -> None:
    """Poison: the bytes of every kept block are the same before and after others run over them."""
    async with pair_over(folder, [shard()], engine=CACHING) as pair:
        asked = [request(prompt(48) + prompt(9, i), name=f"r{i}", max_tokens=20) for i in range(6)]
        await pair.generate(request(prompt(48), name="first"))
        await settle(pair)
        edge, engine = pair.workers[0].edge, pair.engines[0]
        assert edge is not None
        before = {slot: engine.pool.read_block(slot).tobytes() for slot in edge.tier.kept_slots()}
        assert before
        firsts = await asyncio.gather(*(pair.prefill.prefill(one) for one in asked))
        users = [slot for slot in edge.lent_slots() if slot in before]
        assert len(users) > len(set(users)), "nobody shared a slot"
        assert all(first.stats.cached_by_tier == {"device": 48} for first in firsts)
        for slot, payload in before.items():
            assert engine.pool.read_block(slot).tobytes() == payload
        for one in asked:
            handoff = await pair.prefill.handoff(one.request_id, one.attempt)
            assert handoff is not None
            assert await pair.decode_all(handoff) == alone(one)
        await pair.assert_nothing_held()


async def test_free_slots_full_of_poison_change_nothing(folder: Path, alone: Alone) -> None:
    """Lent blocks are read, and nothing else that a sequence did not write itself."""
    async with pair_over(folder, [shard()], engine=CACHING) as pair:
        await pair.generate(request(prompt(40), name="a"))
        await settle(pair)
        for worker, engine in zip(pair.workers, pair.engines, strict=True):
            assert worker.edge is not None
            kept = worker.edge.tier.kept_slots()
            for slot in set(range(len(engine.slots))) - kept:
                engine.pool.write_block(slot, memoryview(b"\xff" * engine.layout.block_nbytes))
        asked = request(prompt(40) + prompt(7, 1), name="b", max_tokens=20)
        first, output = await pair.generate(asked)
        assert first.stats.cached_by_tier == {"device": 40}
        assert output == alone(asked)


async def test_idle_blocks_make_room_and_no_admission_fails(folder: Path, alone: Alone) -> None:
    """A pool that is full of idle blocks takes whatever an empty one would."""
    async with pair_over(folder, [shard()], engine=SMALL) as pair:
        for seed in range(6):
            asked = request(prompt(120, seed), name=f"r{seed}", max_tokens=20)
            _, output = await pair.generate(asked)
            assert output == alone(asked)
            for worker, engine in zip(pair.workers, pair.engines, strict=True):
                await worker.loop.settled()
                check_pool(worker, engine)
        counters = await pair.prefill.counters()
        assert counters["edge:evicted"] > 0
        assert counters["gauge:slots_kept"] > 0
        await pair.assert_nothing_held()


async def test_a_waiting_request_gives_back_what_it_was_lent(folder: Path, alone: Alone) -> None:
    """Who is first in line gets its room though those behind it hold leases on idle blocks; they compute."""
    async with pair_over(folder, [shard()], engine=SMALL, admit_timeout_s=20.0) as pair:
        shared = prompt(64, 5)
        await pair.generate(request(shared, name="warm", max_tokens=2))
        await settle(pair)
        worker = pair.workers[0]
        edge = worker.edge
        assert edge is not None
        session = await worker.store.session("default")
        assert session is not None
        chain = KeyChain(session.namespace, BLOCK_TOKENS)
        chain.extend(shared)
        waiter = worker.lend(session, "default", chain, 7, "waits")
        assert waiter is not None
        assert len(waiter.blocks) == 7
        first, output = await pair.generate(big := request(prompt(150, 1), name="big", max_tokens=3))
        assert output == alone(big)
        assert first.stats.cached_tokens == 0
        assert waiter.recalled
        assert waiter.slots == []
        waiter.abandon()
        assert edge.counters["edge:recalled"] == 1
        await pair.assert_nothing_held()


async def test_a_recalled_prefix_is_computed(folder: Path, alone: Alone) -> None:
    """All through a role: what was lent goes while the request stands in the queue."""
    async with pair_over(folder, [shard()], engine=SMALL, parked_s=600.0) as pair:
        shared = prompt(64, 5)
        await pair.generate(request(shared, name="warm", max_tokens=2))
        await settle(pair)
        held = request(prompt(60, 9), name="held", max_tokens=4)
        await pair.prefill.prefill(held)  # parked: 8 of 24 slots
        worker = pair.workers[0]
        big = asyncio.create_task(pair.prefill.prefill(request(prompt(150, 1), name="big", max_tokens=3)))
        await until(lambda: worker.loop.waiting == 1)
        late = request(shared + prompt(20, 3), name="late", max_tokens=4)
        waiting = asyncio.create_task(pair.prefill.prefill(late))
        await until(lambda: worker.loop.waiting == 2)
        await pair.prefill.abort("held", 1)
        assert (await big).event.finish is None
        await pair.prefill.abort("big", 1)
        first = await waiting
        assert first.stats.cached_by_tier == {}
        handoff = await pair.prefill.handoff("late", 1)
        assert handoff is not None
        assert await pair.decode_all(handoff) == alone(late)
        await pair.assert_nothing_held()


async def test_what_was_purged_does_not_come_back_through_a_pool(folder: Path, alone: Alone) -> None:
    """Promise 4. Before, the pool's copy was written into the store again."""
    driver = shard()
    async with pair_over(folder, [driver], engine=CACHING) as pair:
        first, _ = await pair.generate(request(prompt(64), name="a"))
        await settle(pair)
        (space,) = driver.core.index.spaces
        chain = KeyChain(space, 8)
        chain.extend(prompt(64))
        driver.core.purge(space, tuple(chain.keys), None)  # by key: no pool is told
        asked = request(prompt(64) + prompt(5, 1), name="b")
        first = await pair.prefill.prefill(asked)
        assert first.stats.cached_by_tier == {}, "all of it is computed"
        handoff = await pair.prefill.handoff("b", 1)
        assert handoff is not None
        assert len(handoff.blocks) == 8, "and decode reads what was computed anew"
        assert pair.workers[1].edge is not None
        await pair.workers[1].edge.forget()
        assert await pair.decode_all(handoff) == alone(asked)
        assert (await pair.decode.counters())["engine:tokens_computed"] < 64
        await pair.assert_nothing_held()


async def test_lossy_blocks_are_kept_as_what_they_are(folder: Path) -> None:
    """Promise 3: onboarded at int8, they and what is computed over them are int8 in the pool, too."""
    driver, tokens = shard(), prompt(16)
    await seed_store(driver, folder, tokens, None, Quality.INT8)
    async with pair_over(folder, [driver], engine=CACHING, min_quality=Quality.INT8) as pair:
        await pair.generate(request(tokens + prompt(20, 1), name="a", max_tokens=20))
        await settle(pair)
        for worker in (0, 1):
            kept = kept_of(pair, worker)
            assert len(kept) >= 4
            assert {quality for _, _, quality in kept} == {Quality.INT8}
        first = await pair.prefill.prefill(request(tokens + prompt(20, 1), name="b", max_tokens=20))
        assert first.stats.cached_by_tier == {"device": 32}
        handoff = await pair.prefill.handoff("b", 1)
        assert handoff is not None
        assert handoff.floor is Quality.INT8, "a floor does not rise because the block lay near"
        await pair.decode_all(handoff)
        await pair.assert_nothing_held()


async def test_over_stale_blocks_nothing_is_kept(folder: Path) -> None:
    driver, tokens = shard(), prompt(16)
    await seed_store(driver, folder, tokens, OLD, Quality.LOSSLESS)
    await driver.advance_epoch("tiny", OLD.number, allow_stale(1), timeout_s=5.0)
    async with pair_over(folder, [driver], engine=CACHING, stale_lag_max=1) as pair:
        first, _ = await pair.generate(request(tokens + prompt(20, 1), max_tokens=20))
        assert first.stats.cached_tokens == 16
        await settle(pair)
        assert kept_of(pair, 0) == kept_of(pair, 1) == []
        await pair.assert_nothing_held()


async def test_a_dropped_epoch_is_not_served_from_the_pool(folder: Path) -> None:
    driver = shard()
    async with pair_over(folder, [driver], engine=CACHING) as pair:
        await pair.generate(request(prompt(64), name="a"))
        await settle(pair)
        assert kept_of(pair, 0)
        await driver.register_epoch("tiny", Epoch(9, WeightsDigest(b"weights of later")), timeout_s=5.0)
        await driver.advance_epoch("tiny", 9, DROP, timeout_s=5.0)
        first = await pair.prefill.prefill(request(prompt(64), name="b"))
        assert first.stats.cached_tokens == 0
        assert first.stats.misses == {"dropped_epoch": 7}


@pytest.mark.parametrize("seed", range(2))
async def test_churn_with_aborts_keeps_every_slot_and_every_token(
    folder: Path, alone: Alone, seed: int
) -> None:
    """Random requests over few prefixes in a pool much too small, some given up at any moment."""
    draw = random.Random(seed)
    async with pair_over(folder, [shard()], engine=SMALL, admit_timeout_s=60.0) as pair:
        known: dict[GenerationRequest, tuple[int, ...]] = {}

        async def one(i: int) -> None:
            body = prompt(draw.choice([17, 40, 64]), draw.randrange(2))
            asked = request(
                body + prompt(draw.randrange(1, 12), i), name=f"r{i}", max_tokens=draw.randrange(2, 20)
            )
            given_up = draw.random() < 0.3
            task = asyncio.create_task(pair.prefill.prefill(asked))
            if given_up:
                for _ in range(draw.randrange(40)):
                    await asyncio.sleep(0)
                await pair.prefill.abort(asked.request_id, asked.attempt)
                await asyncio.gather(task, return_exceptions=True)
                return
            await task
            handoff = await pair.prefill.handoff(asked.request_id, asked.attempt)
            if handoff is not None:
                await pair.decode.start(handoff)
                known[asked] = alone(asked)

        for batch in range(3):
            await asyncio.gather(*(one(8 * batch + i) for i in range(8)))
            for worker in pair.workers:
                await worker.loop.settled()
        events = await pair.events_of([asked.request_id for asked in known])
        for asked, expected in known.items():
            said = events[asked.request_id]
            assert said[-1].error is None
            assert tuple(event.token_id for event in said) == expected[-len(said) :], asked.request_id
        await pair.assert_nothing_held()
        counters: dict[str, Any] = await pair.prefill.counters()
        assert counters["edge:lent"] > 0
        assert counters["edge:evicted"] > 0


async def test_room_that_even_an_empty_pool_lacks_is_refused_and_nothing_evicted(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine=SMALL, admit_timeout_s=0.3) as pair:
        await pair.prefill.prefill(request(prompt(140), name="held"))
        await settle(pair)
        kept = kept_of(pair, 0)
        with pytest.raises(OverLimit):
            await pair.prefill.prefill(request(prompt(80, 1), name="late"))
        assert kept_of(pair, 0) == kept
        await pair.prefill.abort("held", 1)
        await pair.assert_nothing_held()


@pytest.mark.parametrize("epoch", [None, 1])
async def test_what_is_purged_from_the_store_goes_from_the_pools(folder: Path, epoch: int | None) -> None:
    """Promise: what was deleted stays deleted, also where a worker had it near."""
    drivers = [shard("s0"), shard("s1")]
    async with pair_over(folder, drivers, engine=CACHING) as pair:
        await pair.generate(request(prompt(64), name="a"))
        await settle(pair)
        assert kept_of(pair, 0)
        assert kept_of(pair, 1)
        for driver in drivers:
            for space in list(driver.core.index.spaces):
                await driver.purge(Purge(space, None, epoch), timeout_s=5.0)
        await until(lambda: kept_of(pair, 0) == kept_of(pair, 1) == [])
        first = await pair.prefill.prefill(request(prompt(64), name="b"))
        assert first.stats.cached_tokens == 0


async def test_an_epoch_dropped_in_the_store_is_dropped_in_the_pools(folder: Path) -> None:
    """Promise 3: also for decode, which asks the store for nothing that lies near."""
    driver = shard()
    async with pair_over(folder, [driver], engine=CACHING) as pair:
        await pair.generate(request(prompt(64), name="a"))
        await settle(pair)
        await driver.register_epoch("tiny", Epoch(9, WeightsDigest(b"weights of later")), timeout_s=5.0)
        await driver.advance_epoch("tiny", 9, DROP, timeout_s=5.0)
        for worker in pair.workers:
            assert worker.edge is not None
            epochs = worker.edge.driver.core.epochs
            await until(partial(lambda known: known.of("tiny").oldest == 9, epochs))
            session = await worker.store.session("default")
            assert session is not None
            chain = KeyChain(session.namespace, BLOCK_TOKENS)
            chain.extend(prompt(64))
            local = worker.lend(session, "default", chain, 8, "late")
            assert local is not None
            assert local.blocks == ()
            local.abandon()


async def test_a_shard_that_restarts_may_have_forgotten_a_purge_and_the_pools_forget(folder: Path) -> None:
    async with pair_over(folder, [shard()], engine=CACHING) as pair:
        await pair.generate(request(prompt(64), name="a"))
        await settle(pair)
        worker = pair.workers[0]
        assert worker.edge_watch is not None
        assert kept_of(pair, 0)
        await worker.edge_watch._resync()
        assert kept_of(pair, 0) == []
        assert worker.edge is not None
        assert worker.edge.counters["edge:resynced"] == 8
