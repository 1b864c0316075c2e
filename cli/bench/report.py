"""What a run found: one JSON document for scripts, tables for people, the rows we lose included."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any, Final

from cli.bench.figures import BYTES_ALONE
from cli.bench.plan import MIB, SIZES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from cli.bench.figures import Row, Samples, Spread
    from cli.bench.store import Result

TRANSPORTS: Final = ("shm", "grpc")
PEERS: Final = ("mooncake_tcp", "redis", "ray")
_VERSIONS: Final = ("kvstrata", "grpcio", "numpy")
_TITLES: Final = {
    "memcpy": "memcpy (limit)",
    "tcp": "raw TCP (limit)",
    "shm": "kvstrata, shm",
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


def _round(value: float) -> float:
    """Four digits after the point are more than any of this repeats to."""
    return value if isinstance(value, int) else round(value, 4)


def draw(result: Result, console: Console) -> None:
    from rich.table import Table

    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS)
    console.print(
        f"{machine}; Python {platform.python_version()}, {versions}; medians of {result.plan.rounds} rounds"
    )
    for what in ("read", "write"):
        console.print(_moved(result, what, Table(title=f"{what}, payload in GiB/s")))
    console.print(_single(result, Table("", "figure", "spread", "wanted", title="what is wanted")))
    for name, said in (result.peers | {n: f"absent: {why}" for n, why in result.absent.items()}).items():
        console.print(f"{_TITLES.get(name, name)}: {said}", highlight=False, markup=False)
    for line in result.notes:
        console.print(line, highlight=False)


def _moved(result: Result, what: str, table: Table) -> Table:
    """A row for each size and store; `of memcpy` compares medians of the same rounds."""
    samples = result.samples
    present = {row for row in samples.rows() if row[1] not in result.absent}
    for name in ("block", "by", "median", "least", "most", "of memcpy", "CPU s/GB"):
        table.add_column(name, justify="left" if name == "by" else "right")
    for nbytes in SIZES:
        size = f"{nbytes // 1024} KiB" if nbytes < MIB else f"{nbytes // MIB} MiB"
        memcpy = samples.gib_s(("read", "memcpy", nbytes)).median
        for who, title in _TITLES.items():
            if (what, who, nbytes) in present:
                _add_row(table, samples, (what, who, nbytes), (size, title), memcpy)
                if what == "read" and who in TRANSPORTS:
                    _add_row(table, samples, (BYTES_ALONE, who, nbytes), ("", "  bytes alone"), memcpy)
            elif what == "read" or who in TRANSPORTS:
                table.add_row(size, title, "absent")
            else:
                continue
            size = ""
        table.add_section()
    return table


def _add_row(table: Table, samples: Samples, row: Row, named: tuple[str, str], memcpy: float) -> None:
    gib_s, cpu = samples.gib_s(row), samples.cpu_s_per_gb(row).median
    figures = gib_s.median, gib_s.least, gib_s.most, gib_s.median / memcpy
    table.add_row(*named, *(f"{figure:.2f}" for figure in figures), f"{cpu:.2f}")


def _single(result: Result, table: Table) -> Table:
    def spread(value: Spread, digits: int) -> tuple[str, str]:
        return f"{value.median:,.{digits}f}", f"{value.least:,.{digits}f} to {value.most:,.{digits}f}"

    samples, epoch = result.samples, result.epoch
    versions, pairs = f"{epoch['versions']:,}", f"{result.plan.pairs:,}"
    for row in (
        *_ratios(result),
        ("match of 64 keys, gRPC, p50, ms", *spread(samples.value("match64_ms"), 3), "≤ 0.6"),
        ("keys/s, gRPC, one client", *spread(samples.value("match_keys_per_s"), 0), "≥ 150,000"),
        ("match of 64 keys, core, us", *spread(result.core_match64_us, 1), "≤ 100"),
        (f"missed of {pairs} commits", str(result.misses), "", "0"),
        (f"advance, {versions} versions, ms", f"{epoch['advance_ms']:.3f}", "", "< 1"),
        ("resident bytes a version", f"{epoch['bytes_per_version']:,.0f}", "", "≤ 500"),
        ("match p99 before reclaiming, us", f"{epoch['match_p99_before_us']:,.1f}", "", ""),
        ("match p99 while reclaiming, us", f"{epoch['match_p99_during_us']:,.1f}", "", "≤ twice that"),
        ("longest collector pause, ms", f"{epoch['gc_pause_ms_max']:,.1f}", "", "≤ 20"),
        ("dropping as many, ms", f"{epoch['flush_ms']:,.1f}", "", ""),
    ):
        table.add_row(*row)
    for column in table.columns[1:3]:
        column.justify = "right"
    return table


def _ratios(result: Result) -> list[tuple[str, str, str, str]]:
    """What is wanted of blocks, at 64 KiB, 1 and 4 MiB: medians over medians of the same rounds."""
    samples = result.samples
    rows = []
    for title, who, beside, wanted in (
        ("shm of memcpy", "shm", "memcpy", "≥ 0.4, 0.7, 0.7"),
        ("shm of Mooncake", "shm", "mooncake_tcp", "≥ 5"),
        ("gRPC of Mooncake", "grpc", "mooncake_tcp", "≥ 1 from 1 MiB"),
    ):
        if who not in result.absent and beside not in result.absent:
            ratios = [
                samples.gib_s(("read", who, n)).median / samples.gib_s(("read", beside, n)).median
                for n in SIZES
            ]
            rows.append((title, ", ".join(f"{ratio:.2f}" for ratio in ratios), "", wanted))
    used = [samples.cpu_s_per_gb(("read", "grpc", n)).median for n in SIZES]
    rows.append(("gRPC read, CPU s/GB", ", ".join(f"{cpu:.2f}" for cpu in used), "", "≤ 0.7 from 1 MiB"))
    return rows
