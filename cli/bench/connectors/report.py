"""What a run of `kvstrata bench vllm` found: one JSON document for scripts, a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cli.bench.connectors.plan import COLD, PROMISES, TAIL_TOKENS, Promise
from cli.bench.figures import Spread

if TYPE_CHECKING:
    from rich.console import Console

    from cli.bench.connectors.run import Result

__all__ = ["Kept", "document", "draw", "kept"]


class Kept(NamedTuple):
    """A promise at one length: met only if both figures are within its bound."""

    of_medians: float
    of_pairs: Spread
    bound: float | None  # None: not promised at this length
    met: bool | None


def document(result: Result, dtype: str) -> dict[str, Any]:
    """The JSON of `kvstrata bench vllm --json`; its shape is a contract."""
    lengths = result.plan.lengths
    names = sorted({case for case, _ in result.ttft_s}, key=lambda case: (not case.startswith("vllm"), case))
    return {
        "ttft_s": {name: _medians(result, name) for name in names},
        "ratios": {
            promise.name: {str(n): _ratio(kept(result, promise, n)) for n in _present(result, promise)}
            for promise in PROMISES
        }
        | {
            "times faster than cold": {name: _faster(result, name, lengths) for name in names if name != COLD}
        },
        "dtype": dtype,
        "rounds": result.plan.rounds,
        "tail_tokens": TAIL_TOKENS,
        "what": result.what,
        "absent": result.absent,
    }


def kept(result: Result, promise: Promise, tokens: int) -> Kept:
    """Of pairs: the ratio of their medians, and the median of their ratios."""
    pairs = result.pairs[promise.case, tokens]
    if promise.faster:
        pairs = [(cold, seconds) for seconds, cold in pairs]
    of_medians = statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)
    of_pairs = Spread.of(a / b for a, b in pairs)
    if tokens not in promise.lengths:
        return Kept(of_medians, of_pairs, None, None)
    figures = (of_medians, of_pairs.median)
    met = min(figures) >= promise.bound if promise.faster else max(figures) <= promise.bound
    return Kept(of_medians, of_pairs, promise.bound, met)


def _present(result: Result, promise: Promise) -> list[int]:
    return [n for n in result.plan.lengths if (promise.case, n) in result.pairs]


def _medians(result: Result, case: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for tokens in result.plan.lengths:
        spread = result.spread(case, tokens)
        for suffix, value in (("", spread.median), ("_min", spread.least), ("_max", spread.most)):
            found[f"{tokens}{suffix}"] = round(value, 5)
    return found


def _faster(result: Result, case: str, lengths: Sequence[int]) -> dict[str, float]:
    """Than vLLM alone, cold, with the same prompt: the median over pairs."""
    return {
        str(n): round(statistics.median(cold / took for took, cold in result.pairs[case, n]), 3)
        for n in lengths
    }


def _ratio(kept: Kept) -> dict[str, float | bool | None]:
    return {
        "of_medians": round(kept.of_medians, 4),
        "of_pairs": round(kept.of_pairs.median, 4),
        "of_pairs_min": round(kept.of_pairs.least, 4),
        "of_pairs_max": round(kept.of_pairs.most, 4),
        "bound": kept.bound,
        "met": kept.met,
    }


def draw(result: Result, dtype: str, console: Console) -> None:
    from rich.table import Table

    said = document(result, dtype)
    console.print(f"{dtype}, {result.plan.rounds} rounds; prompts have {TAIL_TOKENS} tokens more than a hit")
    for name, what in result.what.items():
        console.print(f"  {name}: {what}", highlight=False)
    table = Table(title="ms to the first token; times faster than vLLM alone, cold", title_justify="left")
    table.add_column("", no_wrap=True)
    for tokens in result.plan.lengths:
        table.add_column(f"{tokens:,} tokens", justify="right")
        table.add_column("faster", justify="right")
    for case in said["ttft_s"]:
        cells = []
        for tokens in result.plan.lengths:
            ms = Spread.of(1000 * seconds for seconds in result.ttft_s[case, tokens])
            faster = (
                "" if case == COLD else f"{said['ratios']['times faster than cold'][case][str(tokens)]:.2f}"
            )
            cells += [f"{ms:.0f}", faster]
        table.add_row(case, *cells)
    console.print(table)
    for case, why in result.absent.items():
        console.print(f"{case}: absent: {why}", highlight=False)
    for promise in PROMISES:
        for tokens in _present(result, promise):
            console.print(_line(promise, tokens, kept(result, promise, tokens)), highlight=False)


def _line(promise: Promise, tokens: int, kept: Kept) -> str:
    least = "at least" if promise.faster else "at most"
    verdict = "not promised"
    if kept.bound is not None:
        verdict = f"{least} {kept.bound:g}: {'met' if kept.met else 'NOT met'}"
    figures = f"{kept.of_medians:.3f} of medians, {kept.of_pairs:.3f} of pairs"
    return f"{promise.name}, {tokens:,} tokens: {figures}; {verdict}"
