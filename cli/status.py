"""`kvstrata status`: what a running service says of itself."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.http import ApiKey, Url
from cli.say import one_json, reported

__all__ = ["status"]

_MIB = 1 << 20


def status(
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")] = False,
) -> None:
    """Show workers, shards and counters of a running service."""
    raise typer.Exit(reported(lambda: _status(url, api_key, json_out)))


def _status(url: str, api_key: str | None, json_out: bool) -> int:
    from cli.http import service

    with service(url, api_key) as client:
        document = client.get("/kvstrata/status").raise_for_status().json()
    if json_out:
        one_json(document)
    else:
        _draw(document)
    return 0 if document["ready"] else 1


def _draw(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    state = "ready" if document["ready"] else f"not ready: {document['reason']}"
    epochs = ", ".join(map(str, document["epochs"])) or "none"
    console.print(
        f"{document['model']}: {state}; epoch {epochs}; {document['requests_running']} requests running; "
        f"up {document['uptime_s']:.0f} s"
    )
    workers = Table("worker", "state", "pid", "requests", "load (tokens)")
    for row in document["workers"]:
        cells = (row.get("pid"), row.get("requests"), row.get("load_tokens"))
        workers.add_row(row["worker_id"], row.get("why") or row["state"], *map(_cell, cells))
    console.print(workers)
    shards = Table("shard", "state", "address", "blocks", "live MiB", "of MiB", "leases")
    for row in document["shards"]:
        sizes = (row.get("live_nbytes", 0) / _MIB, row.get("capacity_nbytes", 0) / _MIB)
        cells = (row.get("address"), row.get("versions"), *(f"{s:.0f}" for s in sizes), row.get("leases"))
        shards.add_row(row["shard"], row.get("why") or row["state"], *map(_cell, cells))
    console.print(shards)


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
