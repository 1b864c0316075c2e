"""`kvstrata replay TRACE`: what a shard would have hit of a trace of requests, under which policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.say import fail, note, one_json

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["replay"]

CAPACITIES = "100,1000,3000,5860,10000,20000,30000,50000,100000"


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="JSON lines, as Mooncake publishes them.")],
    capacity: Annotated[
        str, typer.Option(metavar="LIST", help="Capacities in uncompressed blocks of 512 tokens.")
    ] = CAPACITIES,
    policy: Annotated[
        str, typer.Option(metavar="LIST", help="Replacement policies by name.")
    ] = "lru,default",
    cold_codec: Annotated[
        str, typer.Option(metavar="LIST", help="Codecs; the whole byte budget holds blocks encoded so.")
    ] = "lossless",
    by: Annotated[
        str | None, typer.Option(metavar="request|block", help="How blocks are accessed; see below.")
    ] = None,
    part: Annotated[str, typer.Option(metavar="whole|first|second", help="Half of the trace.")] = "whole",
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Runs at once, each in a process.")] = 1,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw hits over capacity.")] = None,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")] = False,
) -> None:
    """Drive the real core of a shard with a trace, in virtual time, and say what it hits.

    A line of the trace is {"timestamp" in ms, "input_length", "output_length", "hash_ids"}, a hash id a block
    of 512 tokens and all that came before it.

    block_hit: blocks that were found, of all block accesses. token_hit: input tokens in matched prefixes, of
    all input tokens (a request's last block is partial). request_hit: the share of its tokens a request
    found, in the mean over requests. opt_block_hit: Belady's optimum, which knows the future. In percent.

    By request (arc, default, hazard, s3fifo): a request matches its prefix, writes what it missed in one
    transaction and lets go of the whole chain; found is what the matched prefix run holds. By block (lru,
    fifo, lfu, gdsf, unless --by says otherwise): every block is an access by itself, as cache studies replay
    traces; found is every block that is there.
    """
    from rich.console import Console

    from cli.bench.jsonlines import ChildFailed
    from cli.replay.offline import ideal
    from cli.replay.plot import check_path, draw_svg
    from cli.replay.report import document, draw
    from cli.replay.runs import run_all, settings
    from cli.replay.trace import read_trace
    from kvstore.errors import KVStrataError

    try:
        if plot is not None:
            check_path(plot)
        wanted = settings(_names(policy), _numbers(capacity), _names(cold_codec), by)
        share = _part(part)
        best = ideal(read_trace(trace).part(*share))
        with _progress(len(wanted)) as done:
            rows = run_all(trace.absolute(), share, wanted, jobs, done)
        if plot is not None:
            draw_svg(plot, best, rows)
    except (ChildFailed, KVStrataError, OSError) as error:
        fail(str(error))
    if json_out:
        one_json(document(best, rows))
    else:
        draw(best, rows, Console())


def _names(listed: str) -> list[str]:
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("an empty list: say at least one name")
    return names


def _numbers(listed: str) -> list[int]:
    try:
        return [int(name.replace("_", "")) for name in _names(listed)]
    except ValueError:
        raise typer.BadParameter(f"{listed!r} is no list of whole numbers, such as 1000,5860") from None


def _part(said: str) -> tuple[float, float]:
    parts = {"whole": (0.0, 1.0), "first": (0.0, 0.5), "second": (0.5, 1.0)}
    if said not in parts:
        raise typer.BadParameter(f"--part {said}: say whole, first or second")
    return parts[said]


@contextmanager
def _progress(runs: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, else a line when the first run is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=runs)
        finished = 0

        def done() -> None:
            nonlocal finished
            finished += 1
            bars.advance(task)
            if not console.is_terminal:
                note(f"run {finished} of {runs} done")

        yield done
