"""What the service tells of itself: `/kvstrata/status`, and through it `kvstrata status`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from router.fleet import Fleet
from router.launcher import Kind, LaunchedShard, LaunchedWorker
from router.supervisor import Place, Supervisor
from router.totals import FleetTotals

__all__ = ["shard_rows", "worker_rows"]


def shard_rows(supervisor: Supervisor, totals: FleetTotals) -> list[dict[str, Any]]:
    """One row a shard: where it is, and what it last said of itself."""
    rows = []
    for place in supervisor.places:
        if place.kind is Kind.SHARD:
            running = place.running
            seen = totals.shards.get(place.name)
            row = _row(place) | {"shard": place.name}
            if isinstance(running, LaunchedShard):
                row |= {"address": running.address, "pid": running.pid}
            rows.append(row | (asdict(seen) if seen else {}))
    return rows


def worker_rows(supervisor: Supervisor, totals: FleetTotals, fleet: Fleet) -> list[dict[str, Any]]:
    """One row a worker: who it is, what it carries, its gauges."""
    rows = []
    members = {**fleet.prefill, **fleet.decode}
    for place in supervisor.places:
        if place.kind is Kind.SHARD:
            continue
        row = _row(place) | {"role": place.kind.value, "worker_id": place.worker_id}
        if isinstance(place.running, LaunchedWorker):
            facts = place.running.facts
            row |= {"pid": facts.pid, "node_id": facts.node_id, "epoch": facts.epoch.number}
            row |= {"weights_digest": facts.epoch.weights_digest.hex()}
            row["gauges"] = totals.gauges.get(facts.worker_id, {})
        if (member := members.get(place.worker_id)) is not None:
            row |= {"load_tokens": member.load, "requests": member.requests}
        rows.append(row)
    return rows


def _row(place: Place) -> dict[str, Any]:
    state = "running" if place.running is not None else "down"
    row: dict[str, Any] = {"state": state, "starts": place.incarnation}
    return row if place.running is not None else row | {"why": place.why_down}
