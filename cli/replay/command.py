"""`kvstrata replay TRACE`: what a shard would have hit of a trace of requests, under which policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cli.replay import options
from cli.say import fail, note, one_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli.replay.runs import Setting

__all__ = ["replay"]


def replay(
    trace: options.Source,
    capacity: options.Capacity = options.CAPACITIES,
    tiers: options.Tiers = None,
    policy: options.Policy = "lru,default",
    cold_codec: options.ColdCodec = "lossless",
    by: options.By = None,
    part: options.Part = "whole",
    prefetch: options.Prefetch = "best_effort,off",
    lead_s: options.Lead = 5.0,
    wait_s: options.Wait = 1.0,
    nvme_gb_s: options.Bandwidth = 12.0,
    write: options.Write = "write_through",
    admission: options.Admission = "predicted_reuse",
    block_nbytes: options.BlockBytes = options.BLOCK_NBYTES,
    jobs: options.Jobs = 1,
    plot: options.Plot = None,
    json_out: options.AsJson = False,
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

    With --tiers a request is known --lead-s before it starts. ready_on_start: of the blocks found on either
    tier, those on the host when their request starts. start_delay_ms: how long it then waits or reads from
    below. wasted_prefetch_bytes: announced or predicted, and gone or not asked for. Runs of several
    --prefetch modes stand side by side.
    """
    from cli.replay.runs import settings
    from cli.replay.tiered import TierSetting
    from kvstore.errors import KVStrataError

    policies, codecs, share = options.names(policy), options.names(cold_codec), options.share_of(part)
    try:
        if tiers is None:
            wanted = settings(policies, options.numbers(capacity), codecs, by)
        else:
            host, nvme = options.host_and_nvme(tiers)
            below = [
                TierSetting(nvme, nvme_gb_s, lead_s, mode, wait_s, write, admission, block_nbytes)
                for mode in options.names(prefetch)
            ]
            wanted = settings(policies, [host], codecs, by, below)
    except KVStrataError as error:
        fail(str(error))
    _replay(trace, share, wanted, jobs, plot, json_out)


def _replay(
    trace: Path,
    share: tuple[float, float],
    wanted: list[Setting],
    jobs: int,
    plot: Path | None,
    json_out: bool,
) -> None:
    from rich.console import Console

    from cli.bench.jsonlines import ChildFailed
    from cli.replay.offline import ideal
    from cli.replay.plot import check_path, draw_svg
    from cli.replay.report import document, draw
    from cli.replay.runs import run_all
    from cli.replay.trace import read_trace
    from kvstore.errors import KVStrataError

    try:
        if plot is not None:
            check_path(plot)
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
