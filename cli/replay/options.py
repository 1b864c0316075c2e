"""The options of `kvstrata replay`, as typer takes them, and what their lists mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

CAPACITIES: Final = "100,1000,3000,5860,10000,20000,30000,50000,100000"
BLOCK_NBYTES: Final = 160 << 20
"""512 tokens of a model of 70B parameters, at 320 KiB a token."""

Source = Annotated[Path, typer.Argument(metavar="TRACE", help="JSON lines, as Mooncake publishes them.")]
Capacity = Annotated[
    str, typer.Option(metavar="LIST", help="Capacities in uncompressed blocks of 512 tokens.")
]
Tiers = Annotated[
    str | None, typer.Option(metavar="HOST,NVME", help="Two tiers, in such blocks; instead of --capacity.")
]
Policy = Annotated[str, typer.Option(metavar="LIST", help="Replacement policies by name.")]
ColdCodec = Annotated[
    str, typer.Option(metavar="LIST", help="Codecs: all of the byte budget, or all below, is encoded so.")
]
By = Annotated[str | None, typer.Option(metavar="request|block", help="How blocks are accessed; see below.")]
Part = Annotated[str, typer.Option(metavar="whole|first|second", help="Half of the trace.")]
Prefetch = Annotated[
    str, typer.Option(metavar="LIST", help="Of best_effort, wait_complete, timeout, off; with --tiers.")
]
Lead = Annotated[float, typer.Option(min=0, help="Seconds for which a known request waits for its start.")]
Wait = Annotated[float, typer.Option(min=0, help="Seconds that prefetch timeout then waits at most.")]
Bandwidth = Annotated[float, typer.Option(help="GB/s of the NVMe tier, reading and writing each.")]
Write = Annotated[
    str, typer.Option(metavar="WHEN", help="write_through, write_through_selective or write_back.")
]
Admission = Annotated[str, typer.Option(help="What the last two write: always, second_use, predicted_reuse.")]
BlockBytes = Annotated[int, typer.Option(min=1, help="Bytes of an uncompressed block.")]
Jobs = Annotated[int, typer.Option(min=1, max=64, help="Runs at once, each in a process.")]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE.svg", help="Draw hits over capacity, or over perplexity.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")]


def names(listed: str) -> list[str]:
    found = [name.strip() for name in listed.split(",") if name.strip()]
    if not found:
        raise typer.BadParameter("an empty list: say at least one name")
    return found


def numbers(listed: str) -> list[int]:
    try:
        return [int(name.replace("_", "")) for name in names(listed)]
    except ValueError:
        raise typer.BadParameter(f"{listed!r} is no list of whole numbers, such as 1000,5860") from None


def share_of(part: str) -> tuple[float, float]:
    parts = {"whole": (0.0, 1.0), "first": (0.0, 0.5), "second": (0.5, 1.0)}
    if part not in parts:
        raise typer.BadParameter(f"--part {part}: say whole, first or second")
    return parts[part]


def host_and_nvme(tiers: str) -> tuple[int, int]:
    sizes = numbers(tiers)
    if len(sizes) != 2:
        raise typer.BadParameter(f"--tiers {tiers}: say the host's blocks and the NVMe tier's, as 5860,50000")
    return sizes[0], sizes[1]
