"""What a run found: one JSON document for scripts, tables for people, the rows we lose included."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any, Final

from cli.bench.plan import MIB, SIZES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cli.bench.figures import Spread
    from cli.bench.store import Result

TRANSPORTS: Final = ("shm", "grpc")
PEERS: Final = ("mooncake_tcp", "redis", "ray")
_TITLES: Final = {
    "memcpy": "memcpy, a limit",
    "tcp": "raw TCP, a limit",
    "shm": "kvstrata, shared memory",
    "grpc": "kvstrata, gRPC",
    "mooncake_tcp": "Mooncake",
    "redis": "Redis",
    "ray": "Ray's object store",
}


def document(result: Result) -> dict[str, Any]:
    """The JSON of `kvstrata bench store --json`; its shape is a contract."""
    samples = result.samples
    epoch = ("versions", "advance_ms", "bytes_per_version", "match_p99_before_us", "match_p99_during_us",
             "gc_pause_ms_max", "flush_ms")  # fmt: skip
    return {
        "read": _ours(result, "read"),
        "write": _ours(result, "write"),
        "limits": {
            f"{who}_gib_s": {str(n): _round(samples.gib_s(("read", who, n)).median) for n in SIZES}
            for who in ("memcpy", "tcp")
        },
        "peers": {name: _peer(result, name) for name in PEERS},
        "match64_ms_p50": _round(samples.value("match64_ms").median),
        "match_keys_per_s": _round(samples.value("match_keys_per_s").median),
        "core_match64_us": _round(result.core_match64_us.median),
        "read_your_writes": {"pairs": result.plan.pairs, "misses": result.misses},
        "epoch": {name: _round(result.epoch[name]) for name in epoch},
    }


def _ours(result: Result, what: str) -> list[dict[str, Any]]:
    rows = []
    for who in TRANSPORTS:
        for nbytes in SIZES if who not in result.absent else ():
            gib_s = result.samples.gib_s((what, who, nbytes))
            cpu = result.samples.cpu_s_per_gb((what, who, nbytes))
            figures = {"gib_s": gib_s.median, "gib_s_min": gib_s.least, "gib_s_max": gib_s.most}
            figures["cpu_s_per_gb"] = cpu.median
            rows.append(
                {"transport": who, "nbytes": nbytes} | {name: _round(v) for name, v in figures.items()}
            )
    return rows


def _peer(result: Result, name: str) -> dict[str, Any] | None:
    if name not in result.peers:
        return None
    medians = {str(n): _round(result.samples.gib_s(("read", name, n)).median) for n in SIZES}
    return {"get_gib_s": medians}


def _round(value: float | None) -> float | int | None:
    """Four digits after the point are more than any of this repeats to."""
    return value if value is None or isinstance(value, int) else round(value, 4)


def draw(result: Result, console: Console) -> None:
    from rich.table import Table

    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("kvstrata", "grpcio", "numpy"))
    console.print(f"{machine}; Python {platform.python_version()}, {versions}; {result.plan.rounds} rounds")
    for what in ("read", "write"):
        console.print(_moved(result, what, Table(title=f"{what}: GiB/s, median (least to most); CPU s/GB")))
    console.print(_single(result, Table("", "figure", "spread", "wanted", title="calls and epochs")))
    for name, reason in result.absent.items():
        console.print(f"{_TITLES.get(name, name)}: absent: {reason}", highlight=False, markup=False)


def _moved(result: Result, what: str, table: Table) -> Table:
    table.add_column("")
    for nbytes in SIZES:
        table.add_column(f"{nbytes // 1024} KiB" if nbytes < MIB else f"{nbytes // MIB} MiB", justify="right")
        table.add_column("CPU", justify="right")
    present = {who for kind, who, _ in result.samples.rows() if kind == what}
    for who, title in _TITLES.items():
        if who not in present:
            if what == "read":
                table.add_row(title, *["absent", ""] * len(SIZES))
            continue
        cells = []
        for nbytes in SIZES:
            gib_s = result.samples.gib_s((what, who, nbytes))
            cells.append(f"{gib_s.median:.2f} ({gib_s.least:.2f} to {gib_s.most:.2f})")
            cells.append(f"{result.samples.cpu_s_per_gb((what, who, nbytes)).median:.2f}")
        table.add_row(result.peers.get(who, title), *cells)
    return table


def _single(result: Result, table: Table) -> Table:
    def spread(value: Spread, digits: int) -> tuple[str, str]:
        return f"{value.median:,.{digits}f}", f"{value.least:,.{digits}f} to {value.most:,.{digits}f}"

    samples, epoch = result.samples, result.epoch
    flush = "absent" if epoch["flush_ms"] is None else f"{epoch['flush_ms']:,.1f}"
    rows = [
        ("match of 64 keys over gRPC, p50, ms", *spread(samples.value("match64_ms"), 3), "at most 0.6"),
        ("match over gRPC, keys/s, one client", *spread(samples.value("match_keys_per_s"), 0), "at least 150,000"),
        ("match of 64 keys in the core, us", *spread(result.core_match64_us, 1), "at most 100"),
        (f"misses of {result.plan.pairs:,} commits by another client", str(result.misses), "", "0"),
        (f"advance_epoch over {epoch['versions']:,} versions, ms", f"{epoch['advance_ms']:.3f}", "", "under 1"),
        ("resident bytes a version", f"{epoch['bytes_per_version']:,.0f}", "", "at most 500"),
        ("match p99 before reclamation, us", f"{epoch['match_p99_before_us']:,.1f}", "", ""),
        ("match p99 during reclamation, us", f"{epoch['match_p99_during_us']:,.1f}", "", "at most twice that"),
        ("longest collector pause, ms", f"{epoch['gc_pause_ms_max']:,.1f}", "", "at most 20"),
        ("dropping as many versions, ms", flush, "", ""),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    for column in table.columns[1:3]:
        column.justify = "right"
    return table
