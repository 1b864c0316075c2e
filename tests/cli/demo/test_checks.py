"""The demo's verdict: every claim it makes can fail, and says so when it does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cli.demo.checks import Verdict, judge
from cli.demo.conversation import QUESTIONS, Turn, document, shared_prefix


def turn(prompt: range, output: tuple[int, ...], cached: int, ttft_ms: float) -> Turn:
    return Turn(
        reader="reader",
        question="?",
        answer="!",
        prompt_ids=tuple(prompt),
        output_ids=output,
        cached_tokens=cached,
        cached_by_tier={"host": cached} if cached else {},
        ttft_ms=ttft_ms,
        total_ms=ttft_ms + 1000,
    )


TURNS = [turn(range(100), (100, 101), 0, 400.0), turn(range(200), (7, 8), 96, 90.0)]
ALONE = [t.output_ids for t in TURNS]


def verdict(
    turns: list[Turn] = TURNS,
    alone: list[tuple[int, ...]] = ALONE,
    repeated: Turn = TURNS[-1],
    verified: int = 3,
    rejected: dict[str, int] | None = None,
    ownerless: int = 0,
) -> Verdict:
    rejected = {"checksum": 1} if rejected is None else rejected
    return judge(turns, alone, repeated, verified, rejected, ownerless)


def test_all_claims_hold() -> None:
    held = verdict()
    assert held.failures == ()
    assert held.equal_to_monolithic
    assert (held.ttft_cold_ms, held.ttft_warm_ms) == (400.0, 90.0)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (verdict(alone=[(100, 101), (7, 9)]), "differs"),
        (verdict(turns=[TURNS[0], replace(TURNS[1], cached_tokens=64)]), "reused 64 of 102"),
        (verdict(turns=[TURNS[0], replace(TURNS[1], ttft_ms=101.0)]), "over a quarter"),
        (verdict(repeated=replace(TURNS[-1], output_ids=(7,))), "changed after"),
        (verdict(rejected={}), "not rejected"),
        (verdict(verified=0), "nothing came from the store"),
        (verdict(ownerless=4096), "4096 bytes"),
    ],
)
def test_each_broken_claim_is_named(broken: Verdict, says: str) -> None:
    assert len(broken.failures) == 1
    assert says in broken.failures[0]


def test_shared_prefix_counts_what_was_generated_too() -> None:
    assert shared_prefix(TURNS[1], TURNS[:1]) == 102
    assert shared_prefix(turn(range(5, 9), (), 0, 1.0), TURNS[:1]) == 0


def test_decode_speed_counts_tokens_after_the_first() -> None:
    assert TURNS[0].decode_tokens_per_s == pytest.approx(1.0)


def test_script_has_three_turns_and_a_second_reader() -> None:
    readers = [reader for reader, _ in QUESTIONS]
    assert readers == ["first reader"] * 3 + ["second reader"]
    assert 1000 < len(document().split()) < 1500
