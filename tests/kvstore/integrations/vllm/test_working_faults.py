"""A store that is broken, slow, full or gone costs vLLM a bounded wait: no error, no stray write."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvstore.errors import Unavailable
from kvstore.failpoints import Action, Delay, Effect, Fail, armed
from kvstore.integrations.vllm import loading
from kvstore.integrations.vllm.plans import Load, StepPlan
from kvstore.nouns import Epoch, PinnedBlock, Quality
from tests.kvstore.integrations.vllm.backends import BACKENDS
from tests.kvstore.integrations.vllm.rig import (
    BOUND_S,
    EPOCH,
    Remote,
    Rig,
    Store,
    rig,
    seeded,
    some_kv,
    some_tokens,
)

NHD = BACKENDS[0]
TOKENS = 256
BLOCKS, OTHERS = [0, 1, 2, 3], [10, 11, 12, 13]


@contextmanager
def filled(store: Store, **settings: Any) -> Iterator[tuple[Rig, torch.Tensor, tuple[PinnedBlock, ...]]]:
    """A worker with vLLM blocks of 64 tokens, and a request's blocks in the store."""
    chance = seeded()
    tokens, kv = some_tokens(chance, TOKENS), some_kv(TOKENS)
    with rig(NHD, store, 64, **settings) as worker:
        worker.compute(kv, BLOCKS, 0, TOKENS)
        worker.save(tokens, BLOCKS, 0, TOKENS)
        worker.settle()
        worker.worker.report()
        yield worker, kv, worker.match(tokens)


FAULTS: dict[str, Action] = {
    "reads fail": Fail(OSError("EIO")),
    "blocks are gone": Effect.DROP,
    "nobody answers": Fail(Unavailable("gone")),
    "reads hang": Delay(asyncio.Event()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_load_over_a_broken_store_fails_its_blocks_in_time(fault: str) -> None:
    store = Store()
    with filled(store, load_timeout_s=0.3) as (worker, _, run):
        with armed("storage.read", FAULTS[fault], times=100):
            worker.load(run, OTHERS, 0, TOKENS)
            report = worker.loaded()
        assert (report.loaded, report.failed_blocks) == ({"r"}, set(OTHERS))
        assert sum(n for name, n in report.counters.items() if name.startswith("missed_blocks:")) == 8
        assert not any(pool[OTHERS].any() for pool in worker.pool.values())


def test_a_shard_that_restarted_is_a_miss() -> None:
    store = Store()
    with filled(store) as (worker, _, run):
        fresh = Store()
        assert worker.side._client is not None
        worker.side._client._peers.transports[store.driver.shard] = fresh.driver
        worker.load(run, OTHERS, 0, TOKENS)
        report = worker.loaded()
        assert (report.loaded, report.failed_blocks) == ({"r"}, set(OTHERS))


def test_a_run_that_is_too_short_fails_what_it_does_not_hold() -> None:
    with filled(Store()) as (worker, kv, run):
        worker.load(run[:3], OTHERS, 0, TOKENS)
        report = worker.loaded()
        assert report.failed_blocks == set(OTHERS[1:])
        assert worker.holds(kv, OTHERS, 0, 96)


def test_a_loop_that_stands_still_does_not_hold_vllm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_GRACE_S", 0.0)
    with filled(Store(), load_timeout_s=0.05) as (worker, _, run):
        stuck, goes_on = threading.Event(), threading.Event()

        def stand_still() -> None:
            stuck.set()
            goes_on.wait(20)

        worker.side.tell(stand_still)
        assert stuck.wait(20)
        worker.load(run, OTHERS, 0, TOKENS)
        report = worker.worker.report()
        while not report.loaded:  # until the deadline: bounded by the test's own
            report = worker.worker.report()
        assert (report.loaded, report.failed_blocks) == ({"r"}, set(OTHERS))
        goes_on.set()
        worker.settle()
        late = worker.worker.report()
        assert (late.loaded, late.failed_blocks) == (set(), set()), "a load ends once"
        assert not any(pool[OTHERS].any() for pool in worker.pool.values()), "nor is anything written later"


def test_an_aborted_load_ends_at_once_and_writes_no_more() -> None:
    with filled(Store()) as (worker, _, run):
        event = asyncio.Event()
        with armed("storage.read", Delay(event), times=1):
            worker.load(run, OTHERS, 0, TOKENS)
            worker.worker.start(StepPlan(ended=["r"]))
            report = worker.worker.report()
            assert report.loaded == {"r"}
            worker.side.tell(event.set)
            worker.settle()
        assert worker.worker.report().loaded == set()
        assert not any(pool[OTHERS].any() for pool in worker.pool.values())


def test_a_load_that_is_being_written_when_its_request_is_aborted_ends_right_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with filled(Store()) as (worker, kv, run):
        begun, goes_on = threading.Event(), threading.Event()
        loader = worker.worker._loader
        assert loader is not None
        into = loader._copies.into

        def slowly(*args: Any) -> None:
            begun.set()
            goes_on.wait(20)
            into(*args)

        monkeypatch.setattr(loader._copies, "into", slowly)
        worker.load(run, OTHERS, 0, TOKENS)
        assert begun.wait(20)
        worker.worker.start(StepPlan(ended=["r"]))
        assert worker.worker.report().loaded == set(), "somebody writes into its blocks"
        goes_on.set()
        report = worker.loaded()
        assert report.loaded == {"r"}
        assert report.failed_blocks == set()
        assert worker.holds(kv, OTHERS, 0, TOKENS)


def test_many_loads_take_turns_within_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_CHUNK_NBYTES", 2 * 12_288)
    with filled(Store()) as (worker, kv, run):
        for i in range(6):
            worker.load(run, [4 + i, 10 + i, 16 + i, 0], 0, 192, request=f"{i}")
        worker.settle()
        report = worker.worker.report()
        assert report.loaded == {str(i) for i in range(6)}
        assert report.failed_blocks == set()
        assert all(worker.holds(kv, [4 + i, 10 + i, 16 + i], 0, 192) for i in range(6))


def test_what_finds_no_room_is_dropped_with_the_rest_of_its_request() -> None:
    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, TOKENS), some_kv(TOKENS)
    with rig(NHD, store, 64, staging_nbytes=1 << 20) as worker:
        saver = worker.worker._saver
        assert saver is not None
        taken = saver._staging.take(saver._staging.slots - 3)
        worker.compute(kv, BLOCKS, 0, TOKENS)
        worker.save(tokens, BLOCKS, 0, 128)
        saver._staging.give_back(taken)
        worker.save(tokens, BLOCKS, 128, TOKENS)
        worker.settle()
        report = worker.worker.report()
        assert report.counters["saved_blocks"] == 3
        assert report.counters["dropped_blocks:room"] == 1
        assert report.counters["dropped_blocks:chain"] == 4, "behind it, and counted"
        assert report.stored == [("r", 0, 96)]
        assert len(worker.match(tokens)) == 3
        worker.worker.start(StepPlan(ended=["r"]))
        worker.save(tokens, BLOCKS, 0, TOKENS)
        worker.settle()
        assert len(worker.match(tokens)) == 8


@pytest.mark.parametrize("method", ["begin", "write", "commit"])
def test_a_store_that_refuses_costs_the_rest_of_the_request_and_no_more(method: str) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise Unavailable("gone")

    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, TOKENS), some_kv(TOKENS)
    with rig(NHD, store, 64) as worker:
        worker.compute(kv, BLOCKS, 0, TOKENS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store.driver, method, refuse)
            worker.save(tokens, BLOCKS, 0, 128)
            worker.settle()
        worker.save(tokens, BLOCKS, 128, TOKENS)
        worker.save(tokens, BLOCKS, 0, TOKENS, request="another")
        worker.settle()
        report = worker.worker.report()
        assert report.counters["refused_blocks:shard_unavailable"] == 4
        assert report.counters["dropped_blocks:chain"] == 4
        assert report.counters["saved_blocks"] == 8, (
            "of the other request: nobody could reach the rest of this"
        )
        assert len(worker.match(tokens)) == 8


def test_a_store_that_is_not_there_drops_saves_and_fails_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, TOKENS), some_kv(TOKENS)

    async def refuse() -> None:
        raise Unavailable("connection refused")

    with rig(NHD, store, 64) as worker:
        monkeypatch.setattr(worker.side, "_connect", refuse)
        worker.compute(kv, BLOCKS, 0, TOKENS)
        worker.save(tokens, BLOCKS, 0, TOKENS)
        worker.load((), OTHERS, 0, TOKENS)
        worker.settle()
        report = worker.worker.report()
        assert report.counters["dropped_blocks:store"] == 8
        assert (report.loaded, report.failed_blocks) == ({"r"}, set(OTHERS))


def test_a_copy_that_fails_raises_nothing_into_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, TOKENS), some_kv(TOKENS)
    with rig(NHD, store, 64) as worker:
        worker.compute(kv, BLOCKS, 0, TOKENS)
        worker.save(tokens, [99_999] * 4, 0, TOKENS)
        assert worker.worker.report().counters["unexpected_errors"] == 1
        worker.save(tokens, BLOCKS, 128, TOKENS)
        assert worker.worker.report().counters["dropped_blocks:order"] == 4


def load_over(worker: Rig, *runs: tuple[PinnedBlock, ...]) -> None:
    load = Load("r", EPOCH, 0, TOKENS, runs, tuple(OTHERS))
    worker.worker.start(StepPlan(loads=[load]))
    assert worker.loaded().failed_blocks == set()


def test_one_lossy_block_of_any_rank_lowers_all_that_the_process_publishes() -> None:
    with filled(Store(), min_quality="int8") as (worker, _, run):
        load_over(worker, run, (run[0]._replace(quality=Quality.INT8), *run[1:]))
        tokens = some_tokens(seeded(), TOKENS)
        worker.save(tokens, OTHERS, 0, TOKENS, request="other")
        worker.settle()
        assert {block.quality for block in worker.match(tokens)} == {Quality.INT8}


def test_over_blocks_of_another_epoch_nothing_is_published() -> None:
    with filled(Store()) as (worker, _, run):
        load_over(worker, run, (run[0]._replace(epoch=Epoch(0, EPOCH.weights_digest)), *run[1:]))
        tokens = some_tokens(seeded(), TOKENS)
        worker.save(tokens, OTHERS, 0, TOKENS, request="other")
        worker.settle()
        assert worker.match(tokens) == ()
        assert worker.worker.report().counters["dropped_blocks:lineage"] == 8


def test_closing_in_the_middle_gives_everything_back() -> None:
    store = Store()
    with filled(store) as (worker, _, run):
        event = asyncio.Event()
        with armed("storage.read", Delay(event), times=1):
            worker.load(run, OTHERS, 0, TOKENS)
            loader = worker.worker._loader
            assert loader is not None
            loader.close()
            assert not any(pool[OTHERS].any() for pool in worker.pool.values())
            worker.side.tell(event.set)
            worker.settle()
        assert not any(pool[OTHERS].any() for pool in worker.pool.values())


@pytest.mark.parametrize("shared_memory", [True, False], ids=["shm", "grpc"])
def test_a_store_of_its_own_process_that_dies_and_comes_back(shared_memory: bool) -> None:
    remote = Remote(shared_memory)
    with filled(remote, load_timeout_s=2.0) as (worker, kv, run):
        worker.load(run, OTHERS, 0, TOKENS)
        assert worker.loaded().failed_blocks == set()
        assert worker.holds(kv, OTHERS, 0, TOKENS)
        assert remote.served is not None
        worker.run(remote.served.stop())
        worker.load(run, OTHERS, 0, TOKENS)
        worker.save(some_tokens(seeded(), TOKENS), BLOCKS, 0, TOKENS, request="lost")
        report = worker.loaded()
        assert (report.loaded, report.failed_blocks) == ({"r"}, set(OTHERS))
        worker.run(remote.restart())
        worker.until_reachable()
        tokens = some_tokens(seeded(), TOKENS)
        began, stored, tries = worker.side.clock.now(), False, 0
        while not stored:  # bytes travel on a connection of their own, which waits before it connects, too
            assert worker.side.clock.now() - began < BOUND_S
            tries += 1
            worker.save(tokens, BLOCKS, 0, TOKENS, request=f"found {tries}")
            worker.settle()
            stored = bool(worker.worker.report().stored)
        worker.load(worker.match(tokens), OTHERS, 0, TOKENS)
        assert worker.loaded().failed_blocks == set()
        worker.run(remote.served.stop())
