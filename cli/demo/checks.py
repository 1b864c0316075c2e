"""What the demo holds its own answers against: one process that knows neither store nor disaggregation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cli.demo.conversation import ANSWER_TOKENS, Turn, shared_prefix
from engine.config import EngineConfig
from engine.engine import Engine
from engine.monolithic import generate_all
from engine.registry import resolve_model
from engine.types import GenerationRequest, SamplingParams

SHARED_HIT_MIN = 0.9  # of the prefix a later turn shares with an earlier one
WARM_TTFT_MAX = 0.25  # of the cold one


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything the demo claims. `failures` names what did not hold; empty means all of it did."""

    equal_to_monolithic: bool
    unchanged_after_flip: bool
    ttft_cold_ms: float
    ttft_warm_ms: float
    verified_blocks: int
    rejected: dict[str, int]
    ownerless_bytes: int
    failures: tuple[str, ...]


def monolithic_answers(
    model: str, config: EngineConfig, turns: Sequence[Turn], told: Callable[[int], None]
) -> list[tuple[int, ...]]:
    """Greedy output tokens of each turn's prompt, from a fresh engine in this process."""
    engine = Engine.load(resolve_model(model), config)
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
    requests = [GenerationRequest(f"alone-{i}", 0, turn.prompt_ids, sampling) for i, turn in enumerate(turns)]
    return generate_all(engine, requests, told)


def judge(
    turns: Sequence[Turn],
    alone: Sequence[tuple[int, ...]],
    repeated: Turn,
    verified_blocks: int,
    rejected: dict[str, int],
    ownerless_bytes: int,
) -> Verdict:
    failures = []
    equal = all(t.output_ids == a for t, a in zip(turns, alone, strict=True))
    if not equal:
        failures.append("an answer differs from what one process without a store generates")
    for i, turn in enumerate(turns[1:], start=1):
        shared = shared_prefix(turn, list(turns[:i]))
        if turn.cached_tokens < SHARED_HIT_MIN * shared:
            failures.append(f"turn {i + 1} reused {turn.cached_tokens} of {shared} shared tokens")
    cold, warm = turns[0].ttft_ms, max(t.ttft_ms for t in turns[1:])
    if warm > WARM_TTFT_MAX * cold:
        failures.append(f"warm TTFT {warm:.0f} ms is over a quarter of the cold {cold:.0f} ms")
    unchanged = repeated.output_ids == turns[-1].output_ids
    if not unchanged:
        failures.append("the answer changed after a stored byte was flipped")
    if not rejected.get("checksum"):
        failures.append("the flipped block was not rejected by its checksum")
    if not verified_blocks:
        failures.append("no block was verified: nothing came from the store")
    if ownerless_bytes:
        failures.append(f"{ownerless_bytes} bytes in the store have no owner")
    return Verdict(
        equal_to_monolithic=equal,
        unchanged_after_flip=unchanged,
        ttft_cold_ms=cold,
        ttft_warm_ms=warm,
        verified_blocks=verified_blocks,
        rejected=rejected,
        ownerless_bytes=ownerless_bytes,
        failures=tuple(failures),
    )
