"""What a run of `kvstrata bench engine` found: one JSON document for scripts, tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli.bench.engines.plan import ENGINES

if TYPE_CHECKING:
    from rich.console import Console

    from cli.bench.engines.run import Result
    from cli.bench.figures import Spread

    Figures = dict[str, dict[str, Spread]]


def document(result: Result) -> dict[str, Any]:
    """The JSON of `kvstrata bench engine --json`; its shape is a contract."""
    return {
        "prefill_s": {name: _medians(result.prefill_s, name) for name in ENGINES},
        "decode_tok_s": {name: _medians(result.decode_tok_s, name) for name in ENGINES},
        "engines": result.what | {name: f"absent: {why}" for name, why in result.absent.items()},
        "dtype": result.setup.dtype,
        "threads": result.setup.threads,
        "rounds": result.plan.rounds,
    }


def _medians(figures: Figures, name: str) -> dict[str, float] | None:
    if name not in figures:
        return None
    found: dict[str, float] = {}
    for what, spread in figures[name].items():
        for suffix, value in (("", spread.median), ("_min", spread.least), ("_max", spread.most)):
            found[f"{what}{suffix}"] = round(value, 4)
    return found


def draw(result: Result, console: Console) -> None:
    setup = result.setup
    console.print(f"{setup.folder.name}, {setup.dtype}, {setup.threads} threads, {result.plan.rounds} rounds")
    for name, what in document(result)["engines"].items():
        console.print(f"  {name}: {what}")
    _table(result.prefill_s, "seconds from a prompt to its first token; below 1: ours is faster", console)
    _table(result.decode_tok_s, "tokens a second, decoding; above 1: ours is faster", console)


def _table(figures: Figures, title: str, console: Console) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    rivals = [name for name in figures if name != "kvstrata"]
    for name in figures:
        table.add_column(name, justify="right")
    for name in rivals:
        table.add_column(f"of {name}", justify="right")
    for what, own in figures["kvstrata"].items():
        cells = [_cell(figures[name][what]) for name in figures]
        ratios = [f"{own.median / figures[name][what].median:.2f}" for name in rivals]
        table.add_row(what, *cells, *ratios)
    console.print(table)


def _cell(spread: Spread) -> str:
    return f"{spread.median:.3g} ({spread.least:.3g} to {spread.most:.3g})"
