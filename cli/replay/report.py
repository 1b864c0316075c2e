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
    if any(row["tiers"] for row in rows):
        console.print(_of_tiers([row for row in rows if row["tiers"]]))
    block, token, request = (100 * share for share in ideal)
    console.print(
        f"An infinite cache hits {block:.2f} % of block accesses, {token:.2f} % of tokens, "
        f"{request:.2f} % of a request's tokens in the mean."
    )


def _of_tiers(rows: Sequence[Row]) -> Table:
    told = rows[0]["tiers"]
    table = Table(
        title=f"two tiers: {told['nvme_blocks']:,} blocks below at {told['nvme_gb_s']} GB/s each way, "
        f"{told['write']}, known {told['lead_s']} s ahead",
        title_justify="left",
    )
    for column in ("policy", "codec", "prefetch"):
        table.add_column(column)
    for column in (
        "host hit",
        "NVMe hit",
        "ready %",
        "delay ms p50",
        "p99",
        "up GB",
        "down GB",
        "read GB",
        "wasted GB",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        tiers, moved = row["tiers"], row["tiers"]["moved_nbytes"]
        figures = [
            f"{tiers['host_hit']:.2f}",
            f"{tiers['nvme_hit']:.2f}",
            f"{row['ready_on_start']:.2f}",
            f"{row['start_delay_ms_p50']:.0f}",
            f"{tiers['start_delay_ms_p99']:.0f}",
            *(f"{moved[where] / 1e9:,.0f}" for where in ("to_host", "to_nvme", "read_below")),
            f"{row['wasted_prefetch_bytes'] / 1e9:,.0f}",
        ]
        table.add_row(row["policy"], row["cold_codec"], tiers["prefetch"], *figures)
    return table
