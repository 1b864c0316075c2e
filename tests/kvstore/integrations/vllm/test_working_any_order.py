"""Saves, loads, aborts and faults in any order: what was reported as loaded is right, all else untouched."""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack

import pytest
import torch

from kvstore.failpoints import Action, Effect, Fail, armed
from kvstore.integrations.vllm.plans import StepPlan, StepReport
from tests.kvstore.integrations.vllm.backends import BACKENDS
from tests.kvstore.integrations.vllm.rig import (
    BLOCKS,
    Rig,
    Store,
    layout_of,
    rig,
    seeded,
    some_kv,
    some_tokens,
)

TOKENS, UNTOUCHED = 128, 7.0
FAULTS: list[Action | None] = [None, None, Effect.CORRUPT, Effect.DROP, Fail(OSError("EIO"))]


class History:
    """Sequences that share half of their tokens, in vLLM blocks that are drawn anew each time."""

    def __init__(self, worker: Rig, chance: random.Random) -> None:
        self.worker, self.chance = worker, chance
        tokens, kv = some_tokens(chance, TOKENS // 2), some_kv(TOKENS // 2)
        self.sequences = [
            (tokens + some_tokens(chance, TOKENS // 2), torch.cat((kv, some_kv(TOKENS // 2)), dim=2))
            for _ in range(3)
        ]
        self.count = TOKENS // worker.theirs
        for pool in worker.pool.values():
            pool.fill_(UNTOUCHED)

    def save(self, request: str) -> None:
        """In one or more steps; the blocks are somebody else's right after each."""
        tokens, kv = self.chance.choice(self.sequences)
        blocks = self.chance.sample(range(BLOCKS), self.count)
        size = self.worker.frames.block_tokens
        cuts = sorted({0, TOKENS, *self.chance.sample(range(0, TOKENS, size), self.chance.randrange(3))})
        for begin, end in itertools.pairwise(cuts):
            self.worker.compute(kv, blocks, 0, end)
            self.worker.save(tokens, blocks, begin, end, request=request)
            for pool in self.worker.pool.values():
                pool.fill_(UNTOUCHED)
        if self.chance.random() < 0.5:
            self.worker.worker.start(StepPlan(ended=[request]))

    def load(self, index: int) -> None:
        """Up to three at a time, some aborted, over a store that may fail."""
        worker, chance, theirs = self.worker, self.chance, self.worker.theirs
        free = chance.sample(range(BLOCKS), BLOCKS)
        fault, loads = chance.choice(FAULTS), {}
        worker.settle()
        worker.worker.report()
        for i in range(chance.randrange(1, 4)):
            tokens, kv = chance.choice(self.sequences)
            run = worker.match(tokens)
            blocks, free = free[: self.count], free[self.count :]
            begin = chance.randrange(0, TOKENS, theirs)
            loads[f"{index}.{i}"] = (run, blocks, begin, kv)
        with ExitStack() as faults:
            if fault is not None:
                faults.enter_context(armed("storage.read", fault, times=2, after=chance.randrange(4)))
            for request, (run, blocks, begin, _) in loads.items():
                worker.load(run, blocks, begin, TOKENS, request=request)
                if chance.random() < 0.2:
                    worker.worker.start(StepPlan(ended=[request]))
            report = worker.loaded(lambda report: report.loaded == set(loads))
        for run, blocks, begin, kv in loads.values():
            self.check(report, len(run), blocks, begin, kv)
        touched = [block for _, blocks, begin, _ in loads.values() for block in blocks[begin // theirs :]]
        others = [block for block in range(BLOCKS) if block not in touched]
        for pool in worker.pool.values():
            assert (pool[others] == UNTOUCHED).all()
            pool.fill_(UNTOUCHED)

    def check(self, report: StepReport, found: int, blocks: list[int], begin: int, kv: torch.Tensor) -> None:
        worker, theirs = self.worker, self.worker.theirs
        mine = blocks[begin // theirs :]
        good = next((i for i, block in enumerate(mine) if block in report.failed_blocks), len(mine))
        assert all(block in report.failed_blocks for block in mine[good:]), "all behind a failed block fail"
        assert begin + good * theirs <= max(begin, found * worker.frames.block_tokens)
        assert worker.holds(kv, blocks, begin, begin + good * theirs)


@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 32), (64, 32), (32, 16)])
def test_any_order(theirs: int, ours: int) -> None:
    chance, store = seeded(), Store()
    backend = chance.choice([backend for backend in BACKENDS if backend.name != "kv-first"])
    with rig(backend, store, theirs, layout_of(ours)) as worker:
        history = History(worker, chance)
        for index in range(20):
            if chance.random() < 0.4:
                history.save(f"{index}")
            else:
                history.load(index)
