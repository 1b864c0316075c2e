"""`kvstrata status`: what a running service, or a store without one, says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.at_store import Json, TlsCa, TokenFile, store_client
from cli.http import ApiKey, Url
from cli.say import note, one_json, reported

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["status"]

_MIB = 1 << 20


def status(
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Of a store that `kvstrata store` runs, in place of a service: its name, or addresses of "
            "its shards, HOST:PORT,HOST:PORT."
        ),
    ] = None,
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    json_out: Json = False,
) -> None:
    """Show workers and shards of a running service, or the shards of a store (--store NAME).

    With --json also the shards' counters; exit code 1 while something of it is not ready.
    """
    if store is not None:
        at = (store, token_file, tls_ca)
        raise typer.Exit(reported(lambda: _of_store(at, json_out)))
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


def _of_store(at: tuple[str, Path | None, Path | None], json_out: bool) -> int:
    """Exit code 1 when a shard does not answer."""
    from dataclasses import asdict

    with store_client(*at, admin=False) as client:
        places = {entry.shard: entry.address for entry in client.topology.shards}
        answers, known = client.try_status(), client.try_namespaces()
    rows: list[dict[str, Any]] = []
    for shard, answer in answers.items():
        row: dict[str, Any] = {"shard": shard, "address": places[shard]}
        if isinstance(answer, Exception):
            rows.append(row | {"state": "down", "why": " ".join(str(answer).split())})
        else:
            rows.append(row | {"state": "running"} | asdict(answer))
    spaces = {space for answer in known.values() if not isinstance(answer, Exception) for space in answer}
    namespaces = [
        {"namespace": s.id.hex(), "model": s.model_id, "tenant": s.tenant, "block_nbytes": s.block_nbytes}
        for s in sorted(spaces)
    ]
    if json_out:
        one_json({"shards": rows, "namespaces": namespaces})
    else:
        _draw_store(rows, namespaces)
    return 0 if all(row["state"] == "running" for row in rows) else 1


def _draw_store(rows: list[dict[str, Any]], namespaces: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(_shards(rows))
    table = Table("namespace", "model", "tenant", "block KiB")
    for space in namespaces:
        size = f"{space['block_nbytes'] / 1024:.1f}"
        table.add_row(space["namespace"], space["model"], space["tenant"], size)
    if namespaces:
        console.print(table)
    for row in rows:
        if "why" in row:
            note("error: " + (row["why"] if row["shard"] in row["why"] else f"{row['shard']}: {row['why']}"))
        if row.get("ownerless_nbytes"):
            note(f"error: {row['shard']} has {row['ownerless_nbytes']} bytes without owner: a bug, report it")


def _shards(rows: list[dict[str, Any]]) -> Table:
    """Narrow enough for 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    below = any(row.get("nvme_capacity_nbytes") for row in rows)
    columns = ("shard", "state", "address", "blocks", "MiB", *(["NVMe MiB"] if below else []), "leases")
    for name in (*columns, "oldest pin"):
        table.add_column(name, no_wrap=name != "oldest pin")
    for row in rows:
        sizes = [_of(row, "live_nbytes", "capacity_nbytes")]
        sizes += [_of(row, "nvme_nbytes", "nvme_capacity_nbytes")] if below else []
        age = None if row.get("oldest_pin_s") is None else f"{row['oldest_pin_s']:.0f} s"
        cells = (row.get("address"), row.get("versions"), *sizes, row.get("leases"), age)
        table.add_row(row["shard"], row["state"], *map(_cell, cells))
    return table


def _of(row: dict[str, Any], used: str, capacity: str) -> str | None:
    """In MiB: `3/64`."""
    if row.get(used) is None or row.get(capacity) is None:
        return None
    return f"{row[used] / _MIB:.0f}/{row[capacity] / _MIB:.0f}"


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
    console.print(_shards([row | {"state": row.get("why") or row["state"]} for row in document["shards"]]))


def _cell(value: object) -> str:
    return "-" if value is None else str(value)
