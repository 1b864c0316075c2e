"""What replay found: one JSON document, or a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.replay.offline import Ideal
from cli.replay.runs import Row


def document(ideal: Ideal, rows: Sequence[Row]) -> dict[str, Any]:
    """All rates in percent."""
    shares = {name: 100 * share for name, share in ideal._asdict().items()}
    return {"ideal": shares, "runs": list(rows)}


def draw(ideal: Ideal, rows: Sequence[Row], console: Console) -> None:
    table = Table(title="share of block accesses that hit, in percent", title_justify="left")
    for column in ("policy", "by", "codec"):
        table.add_column(column)
    for column in ("blocks", "block hit", "token hit", "request hit", "optimum", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        rates = [f"{row[name]:.2f}" for name in ("block_hit", "token_hit", "request_hit", "opt_block_hit")]
        seconds = f"{row['seconds']:.1f}"
        table.add_row(
            row["policy"], row["by"], row["cold_codec"], f"{row['capacity_blocks']:,}", *rates, seconds
        )
    console.print(table)
    block, token, request = (100 * share for share in ideal)
    console.print(
        f"An infinite cache hits {block:.2f} % of block accesses, {token:.2f} % of tokens, "
        f"{request:.2f} % of a request's tokens in the mean."
    )
