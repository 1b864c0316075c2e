"""Promise: whatever is admitted, aborted, preempted, shared and forked, in any order and any chunks, each
sequence draws from the very bits it would draw from alone, and no slot is lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.monolithic import generate
from engine.prediction import OutputPrediction
from engine.types import GenerationRequest
from kvstore.errors import OverLimit
from tests.engine.conftest import Logits, prompt, request

BLOCK, POOL, STEPS_MAX = 8, 26, 4000
CONFIG = EngineConfig(
    threads=1, block_tokens=BLOCK, pool_blocks=POOL, step_tokens_max=20, running_max=6, max_model_len=150
)
ROOTS = [prompt(48, seed) for seed in range(2)]

Alone = Callable[[GenerationRequest], tuple[tuple[int, ...], Logits]]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.load(tiny_folder, CONFIG)


@pytest.fixture
def alone(tiny_folder: Path, seen_logits: Logits) -> Alone:
    """Output and logits of one request in an engine of its own, by its seed: each is computed once."""
    other = Engine.load(tiny_folder, CONFIG.model_copy(update={"pool_blocks": 64, "step_tokens_max": 150}))
    known: dict[int, tuple[tuple[int, ...], Logits]] = {}

    def compute(asked: GenerationRequest) -> tuple[tuple[int, ...], Logits]:
        seed = asked.sampling.seed
        if seed not in known:
            others = dict(seen_logits)
            seen_logits.clear()
            output = generate(other, asked)
            known[seed] = output, dict(seen_logits)
            seen_logits.clear()
            seen_logits.update(others)
        return known[seed]

    return compute


@dataclass
class World:
    """The engine's caller: what it holds, and what it has been told."""

    engine: Engine
    draw: random.Random
    waiting: list[GenerationRequest] = field(default_factory=list)
    said: dict[str, list[int]] = field(default_factory=dict)
    asked: dict[str, GenerationRequest] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    preempted: int = 0
    parked: set[str] = field(default_factory=set)

    def ask(self, seed: int) -> None:
        """Few prefixes and few lengths: so that many sequences share, fork, and end inside a block."""
        root = self.draw.choice(ROOTS)[: self.draw.choice([5, 8, 23, 24, 40, 48])]
        own = prompt(self.draw.choice([0, 0, 1, 9]), seed)
        wanted = request(f"r{seed}", root + own, self.draw.randint(1, 40), temperature=0.8, seed=seed)
        wanted = replace(wanted, tenant=self.draw.choice("aaab"), priority=self.draw.choice([0, 0, 1]))
        self.asked[wanted.request_id] = wanted
        self.said[wanted.request_id] = []
        self.waiting.append(wanted)

    def admit(self) -> None:
        for wanted in [*self.waiting]:
            if not self.engine.can_admit(wanted):
                with pytest.raises(OverLimit):
                    self.engine.admit(wanted)
            else:
                self.engine.admit(wanted, arrival=wanted.sampling.seed)
                self.waiting.remove(wanted)

    def abort(self) -> None:
        going = sorted(self.asked.keys() - self.ended)
        if going:
            name = self.draw.choice(going)
            self.engine.release(name)
            self.waiting = [one for one in self.waiting if one.request_id != name]
            del self.asked[name]

    def step(self) -> None:
        result = self.engine.step()
        for event in result.events:
            assert event.error is None
            assert event.index == len(self.said[event.request_id]), "a token was lost or doubled"
            self.said[event.request_id].append(event.token_id)
            if event.finish is not None:
                self.ended.add(event.request_id)
        for left in result.preempted:
            assert list(left.output_ids) == self.said[left.request_id], "it left with other tokens"
            self.preempted += 1
            self.waiting.insert(0, left)


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32), optimistic=st.booleans())
def test_any_schedule_is_bit_equal_to_each_alone(
    seed: int,
    optimistic: bool,
    engine: Engine,
    alone: Alone,
    seen_logits: Logits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen_logits.clear()
    world = World(engine, random.Random(seed))
    with monkeypatch.context() as patch:
        if optimistic:
            patch.setattr(OutputPrediction, "tokens", lambda _, known, longest: min(known + 1, longest))
        serial = iter(range(seed * 100, seed * 100 + 100))
        for _ in range(60):
            action = world.draw.random()
            if action < 0.3 and len(world.asked) < 9:
                world.ask(next(serial))
                world.admit()
            elif action < 0.34:
                world.abort()
            else:
                world.step()
            engine.check_integrity()
        for _ in range(STEPS_MAX):
            if world.ended >= world.asked.keys():
                break
            world.admit()
            world.step()
            engine.check_integrity()
    assert world.ended >= world.asked.keys(), "somebody starves"
    assert engine.free_blocks == POOL
    seen = dict(seen_logits)
    for name, wanted in world.asked.items():
        output, logits = alone(wanted)
        assert tuple(world.said[name]) == output
        for key, row in logits.items():
            assert torch.equal(seen[key], row), f"{name} drew from other bits at {key[1]}"


def test_these_schedules_do_what_they_are_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator above preempts, shares and copies: a test that never met them would prove nothing."""
    monkeypatch.setattr(OutputPrediction, "tokens", lambda _, known, longest: min(known + 1, longest))
    lent: list[object] = []
    copied: list[int] = []
    lend, copy_block = engine.slots.lend, engine.pool.copy_block

    def count_lent(slots: list[int]) -> None:
        lent.append(slots)
        lend(slots)

    def count_copied(source: int, target: int, tokens: int) -> None:
        copied.append(tokens)
        copy_block(source, target, tokens)

    monkeypatch.setattr(engine.slots, "lend", count_lent)
    monkeypatch.setattr(engine.pool, "copy_block", count_copied)
    preempted = 0
    for seed in range(3):
        world = World(engine, random.Random(seed))
        for serial in range(8):
            world.ask(serial)
        for _ in range(STEPS_MAX):
            if world.ended >= world.asked.keys():
                break
            world.admit()
            world.step()
        preempted += world.preempted
    assert preempted > 3
    assert len(lent) > 10
    assert any(tokens < BLOCK for tokens in copied)
