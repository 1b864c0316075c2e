"""Promise 5 with accepted drafts in most steps of decode: the same tokens, and blocks for the next turn."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.monolithic import generate_all
from engine.types import GenerationRequest
from tests.engine.speculation.drafters import oracle
from tests.role_parts import BLOCK_TOKENS, CACHING, ENGINE, WAIT_S, Pair, pair_over, prompt, request, shard

LENGTHS = (5, 16, 31, 40)
MAX_TOKENS = 40


def requests(turn: str, texts: list[tuple[int, ...]], temperature: float) -> list[GenerationRequest]:
    return [
        request(text, name=f"{turn}{i}", temperature=temperature, seed=i, max_tokens=MAX_TOKENS)
        for i, text in enumerate(texts)
    ]


async def answers(pair: Pair, asked: list[GenerationRequest]) -> tuple[list[tuple[int, ...]], int]:
    """All at once; and how many tokens of their prompts came from the store."""
    first = await asyncio.gather(*(pair.prefill.prefill(one) for one in asked))
    handoffs = await asyncio.gather(*(pair.prefill.handoff(one.request_id, one.attempt) for one in asked))
    outputs = await pair.decode_each([handoff for handoff in handoffs if handoff is not None])
    return outputs, sum(each.stats.cached_tokens for each in first)


@pytest.mark.parametrize("caching", [False, True], ids=["store", "pool"])
@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
async def test_drafts_change_no_token_and_no_block(
    folder: Path, temperature: float, caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.load(folder, ENGINE.model_copy(update={"speculation": "off"}))
    texts = [prompt(length, seed) for seed, length in enumerate(LENGTHS)]
    first = generate_all(plain, requests("a", texts, temperature))
    longer = [text + output for text, output in zip(texts, first, strict=True)]
    second = generate_all(plain, requests("b", longer, temperature))
    known = [text + output for text, output in zip(longer, second, strict=True)]
    monkeypatch.setattr("engine.engine.NGramDrafter", oracle(*known))
    engine = CACHING if caching else ENGINE
    async with pair_over(folder, [shard("s0"), shard("s1")], engine=engine) as pair:
        outputs, _ = await answers(pair, requests("a", texts, temperature))
        assert outputs == first
        counters = pair.workers[1].counters()
        assert counters["engine:drafts_accepted"] > 0.6 * len(texts) * MAX_TOKENS
        assert await pair.workers[1].background.settle(WAIT_S)
        outputs, cached = await answers(pair, requests("b", longer, temperature))
        assert outputs == second
        # Every full block of prompt and output was there; the last token of an answer is never computed.
        assert cached == sum((len(text) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for text in longer)
        await pair.assert_nothing_held()
