"""Promise 5: prefill -> store -> decode gives, token for token, what one process without a store gives."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.monolithic import generate
from engine.types import GenerationRequest
from tests.role_parts import BLOCK_TOKENS, ENGINE, Pair, pair_over, prompt, request, shard
from tests.tiny_model import make_tiny_model

LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 40, 47, 48, 49, 63, 64, 95, 130, 200, 257)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Engine:
    return Engine.load(folder, ENGINE)


def prompts(temperature: float) -> list[GenerationRequest]:
    return [
        request(prompt(n, seed), name=f"r{n}", temperature=temperature, seed=seed, max_tokens=5 + seed % 17)
        for seed, n in enumerate(LENGTHS)
    ]


async def assert_equal(pair: Pair, reference: Engine, asked: list[GenerationRequest]) -> int:
    """All requests at once, so that batches are of every shape; how many prompt tokens came from the store."""
    answers = await asyncio.gather(*(pair.prefill.prefill(one) for one in asked))
    for one, first in zip(asked, answers, strict=True):
        handoff = await pair.prefill.handoff(one.request_id, one.attempt)
        tokens = (first.event.token_id,)
        if handoff is not None:
            tokens += tuple(await pair.decode_all(handoff))
        assert tokens == generate(reference, one), f"prompt of {len(one.prompt_ids)} tokens"
    return sum(first.stats.cached_tokens for first in answers)


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
async def test_equal_to_one_process(folder: Path, reference: Engine, temperature: float) -> None:
    async with pair_over(folder, [shard("s0"), shard("s1"), shard("s2")]) as pair:
        asked = prompts(temperature)
        assert len(asked) >= 20
        assert await assert_equal(pair, reference, asked) == 0
        again = [replace(one, request_id=f"again {one.request_id}") for one in asked]
        usable = sum((n - 1) // BLOCK_TOKENS * BLOCK_TOKENS for n in LENGTHS)
        assert await assert_equal(pair, reference, again) == usable
        await pair.assert_nothing_held()
