"""What vLLM's worker saves is what a worker loads, or it is told so; whatever the store does meanwhile."""

from __future__ import annotations

import pytest

from kvstore.failpoints import Effect, armed
from kvstore.frame import HEADER_NBYTES
from tests.kvstore.integrations.vllm.backends import BACKENDS, Backend
from tests.kvstore.integrations.vllm.rig import Rig, Store, layout_of, rig, seeded, some_kv, some_tokens

NHD, TRANSPOSED = BACKENDS[0], BACKENDS[5]
ids = [backend.name for backend in BACKENDS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 32), (64, 32), (128, 32), (32, 16), (16, 64)])
def test_saved_by_one_engine_loaded_by_another(theirs: int, ours: int, dtype: str) -> None:
    chance, store, layout = seeded(), Store(), layout_of(ours, dtype)
    one, other = chance.sample(BACKENDS, 2)
    n = 256
    tokens, kv = some_tokens(chance, n), some_kv(n, dtype)
    with rig(one, store, theirs, layout) as saver, rig(other, store, 256 // theirs * 16, layout) as loader:
        blocks = chance.sample(range(24), n // theirs)
        saver.compute(kv, blocks, 0, n)
        cut = chance.randrange(ours, n, ours)
        saver.save(tokens, blocks, 0, cut)
        saver.save(tokens, blocks, cut, n)
        for pool in saver.pool.values():
            pool.fill_(7)  # whoever has the blocks next: what was saved is out already
        saver.settle()
        report = saver.worker.report()
        assert report.counters["saved_blocks"] == n // ours
        assert sorted(report.stored)[0] == ("r", 0, cut)
        run = loader.match(tokens)
        assert len(run) == n // ours
        begin = chance.randrange(0, n, loader.theirs)
        blocks = chance.sample(range(24), n // loader.theirs)
        loader.compute(kv, blocks, 0, begin)
        loader.load(run, blocks, begin, n)
        report = loader.loaded()
        assert (report.loaded, report.failed_blocks) == ({"r"}, set())
        assert loader.holds(kv, blocks, 0, n)


@pytest.mark.parametrize("backend", BACKENDS, ids=ids)
def test_every_layout_goes_there_and_back(backend: Backend) -> None:
    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, 128), some_kv(128)
    with rig(backend, store, 64) as worker:
        worker.compute(kv, [5, 3], 0, 128)
        worker.save(tokens, [5, 3], 0, 128)
        worker.settle()
        worker.load(worker.match(tokens), [1, 0], 0, 128)
        assert worker.loaded().failed_blocks == set()
        assert worker.holds(kv, [1, 0], 0, 128)


def test_a_load_may_begin_inside_a_block_of_ours() -> None:
    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, 128), some_kv(128)
    with rig(NHD, store, 16) as worker:
        blocks = list(range(8))
        worker.compute(kv, blocks, 0, 128)
        worker.save(tokens, blocks, 0, 128)
        worker.settle()
        run = worker.match(tokens)
        others = list(range(8, 16))
        worker.load(run, others, 48, 112)
        assert worker.loaded().failed_blocks == set()
        assert worker.holds(kv, others, 48, 112)
        assert not any(pool[others[:3]].any() or pool[others[7]].any() for pool in worker.pool.values())


def test_a_corrupt_block_fails_its_vllm_block_and_all_behind_it() -> None:
    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, 256), some_kv(256)
    with rig(TRANSPOSED, store, 64) as worker:
        worker.compute(kv, [0, 1, 2, 3], 0, 256)
        worker.save(tokens, [0, 1, 2, 3], 0, 256)
        worker.settle()
        run = worker.match(tokens)
        with armed("storage.read", Effect.CORRUPT, after=5):
            worker.load(run, [10, 11, 12, 13], 0, 256)
            report = worker.loaded()
        assert (report.loaded, report.failed_blocks) == ({"r"}, {12, 13})
        assert report.counters["missed_blocks:checksum"] == 3
        assert worker.holds(kv, [10, 11], 0, 128)


def test_salted_requests_do_not_meet_others() -> None:
    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, 64), some_kv(64)
    with rig(NHD, store, 32) as worker:
        worker.compute(kv, [0, 1], 0, 64)
        worker.save(tokens, [0, 1], 0, 32, salt="pepper")
        worker.save(tokens, [0, 1], 32, 64, salt="pepper")
        worker.settle()
        assert len(worker.match(tokens)) == 0
        assert len(worker.match(tokens, "pepper")) == 2


def test_what_the_store_has_is_not_saved_again_and_what_is_wanted_may_begin_later() -> None:
    chance, store = seeded(), Store()
    tokens, kv = some_tokens(chance, 256), some_kv(256)
    with rig(NHD, store, 64) as worker:
        blocks = [4, 2, 9, 1]
        worker.compute(kv, blocks, 0, 256)
        worker.save(tokens, blocks, 0, 160, request="a")
        worker.save(tokens, blocks, 0, 128, request="b")
        worker.settle()
        worker.save(tokens, blocks, 0, 256, wanted=160, request="c")
        worker.settle()
        counters = worker.worker.report().counters
        assert counters["saved_blocks"] == 5 + 4 + 3
        assert written(worker) == 8
        worker.load(worker.match(tokens), [20, 21, 22, 23], 0, 256)
        assert worker.loaded().failed_blocks == set()
        assert worker.holds(kv, [20, 21, 22, 23], 0, 256)


def test_each_rank_saves_and_loads_its_own_heads() -> None:
    chance, store = seeded(), Store()
    tokens, of_rank = some_tokens(chance, 128), [some_kv(128), some_kv(128)]
    with rig(NHD, store, 64) as one, rig(TRANSPOSED, store, 64, rank=1) as other:
        for worker, kv in zip((one, other), of_rank, strict=True):
            worker.compute(kv, [5, 3], 0, 128)
            worker.save(tokens, [5, 3], 0, 128)
            worker.settle()
            assert written(worker) == 4
        for worker, kv in zip((one, other), of_rank, strict=True):
            worker.load(worker.match(tokens), [1, 0], 0, 128)
            assert worker.loaded().failed_blocks == set()
            assert worker.holds(kv, [1, 0], 0, 128)


def written(worker: Rig) -> int:
    """Blocks whose bytes went to the store."""
    assert worker.side._client is not None
    return worker.side._client.counters["written_bytes"] // (HEADER_NBYTES + worker.frames.block_nbytes)
