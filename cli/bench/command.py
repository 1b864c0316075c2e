"""`kvstrata bench`: what store, codecs and engines do here, beside limits and peers, in the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.bench.connectors.command import vllm
from cli.say import fail, note, one_json

if TYPE_CHECKING:
    from cli.bench.store import Corrupt, Progress, Result

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, help="Measure this installation, on this machine.")


@bench.callback()
def options() -> None:
    """Measure this installation, on this machine."""


bench.command()(vllm)


@bench.command()
def store(
    rounds: Annotated[
        int | None, typer.Option(min=1, max=1_000, help="Rounds that count; one before them warms up.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Prove that it runs, in seconds. The figures mean nothing.")
    ] = False,
    install_peers: Annotated[
        bool, typer.Option("--install-peers", help="First install Mooncake and Redis into the peers' folder.")
    ] = False,
    peers_venv: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The peers' folder; in the user's cache unless said.")
    ] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Leave the other stores out.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")] = False,
    corrupt: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Blocks, calls and epochs of the store, beside a memcpy, raw TCP and other stores.

    Another process reads than the one that stores, every byte read is verified, and all take turns.

    Takes some minutes and about 6 GiB of memory. Exit code 1 for a wrong byte or a missed commit.
    """
    from cli.bench.peers.install import install
    from cli.bench.peers.start import default_folder

    folder = None if no_peers else (peers_venv or default_folder()).absolute()
    if folder is not None and install_peers:
        install(folder, note)
    result = _measured(rounds, quick, folder, corrupt)
    if json_out:
        from cli.bench.report import document

        one_json(document(result))
    else:
        from rich.console import Console

        from cli.bench.report import draw

        draw(result, Console())
    if result.misses:
        fail(f"{result.misses} of {result.plan.pairs} commits were not seen by another client")


@bench.command()
def codec(
    model: Annotated[str, typer.Option(metavar="NAME", help="As `kvstrata model list` shows it.")] = "",
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What the model reads; pydoc's topics unless said.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Prove that it runs, in seconds. The figures mean nothing.")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed-only", help="Only how fast: needs no model, and takes seconds.")
    ] = False,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")] = False,
) -> None:
    """What each codec costs a real model in perplexity, and its speed beside a memcpy.

    Takes some minutes and about 3 GiB of memory.
    """
    from engine.process import prepare_process

    prepare_process()
    from rich.console import Console

    from cli.bench.codec import QUICK, Plan, pydoc_topics, run, speed_only
    from cli.bench.codec_report import document, draw, draw_speed, speed_document
    from engine.registry import DEFAULT_MODEL, resolve_model
    from kvstore.errors import KVStrataError

    plan = QUICK if quick else Plan()
    if speed:
        with _progress() as progress:
            measured = speed_only(plan, progress)
        if json_out:
            one_json(speed_document(*measured))
        else:
            draw_speed(*measured, console=Console())
        return
    try:
        read = pydoc_topics() if text is None else text.read_text(encoding="utf-8")
        folder = resolve_model(model or DEFAULT_MODEL)
        with _progress() as progress:
            result = run(folder, read, plan, progress)
    except (KVStrataError, OSError, ValueError) as error:
        fail(str(error))
    if json_out:
        one_json(document(result))
    else:
        draw(result, Console())


@bench.command()
def engine(
    model: Annotated[str, typer.Option(metavar="NAME", help="As `kvstrata model list` shows it.")] = "",
    dtype: Annotated[str, typer.Option(help="What all engines compute in: float32 or bfloat16.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Of each engine; every core unless said.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=1_000, help="Rounds that count; one before them warms up.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Ours in batch-invariant mode, to see its price.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Prove that it runs, in seconds. The figures mean nothing.")
    ] = False,
    install_peers: Annotated[
        bool, typer.Option("--install-peers", help="First install vLLM's CPU build into its folder (3 GB).")
    ] = False,
    vllm_venv: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="vLLM's environment: $KVSTRATA_VLLM_VENV, or in the user's cache, unless said.",
        ),
    ] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Leave the other engines out.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")] = False,
) -> None:
    """Prefill and decode of one engine on the CPU, beside transformers and vLLM's CPU build.

    Each runs in a process of its own; they take turns within every round, with the same prompts.

    Takes some minutes and about 8 GiB of memory.
    """
    from cli.bench.engines.plan import QUICK, Plan
    from cli.bench.engines.run import Setup, run, threads_here
    from cli.bench.jsonlines import ChildFailed
    from cli.bench.peers.vllm_environment import install_vllm, vllm_folder
    from engine.registry import DEFAULT_MODEL, resolve_model
    from kvstore.errors import KVStrataError

    plan = QUICK if quick else Plan()
    plan = dataclasses.replace(plan, rounds=rounds or plan.rounds)
    peers = None if no_peers else (vllm_venv or vllm_folder()).absolute()
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter("say float32 or bfloat16", param_hint="--dtype")
    if peers is not None and install_peers:
        install_vllm(peers, note)
    try:
        folder = resolve_model(model or DEFAULT_MODEL)
        setup = Setup(folder, dtype, threads or threads_here(), peers, batch_invariant)
        result = run(plan, setup, note)
    except (ChildFailed, KVStrataError, OSError) as error:
        fail(str(error))
    if json_out:
        from cli.bench.engines.report import document

        one_json(document(result))
    else:
        from rich.console import Console

        from cli.bench.engines.report import draw

        draw(result, Console())


def _measured(rounds: int | None, quick: bool, peers_folder: Path | None, corrupt: str | None) -> Result:
    import asyncio

    import kvstore.polling  # noqa: F401 - as an engine's process does, before anything that imports grpc
    from cli.bench.jsonlines import ChildFailed
    from cli.bench.oracle import WrongBytes
    from cli.bench.plan import QUICK, Plan
    from cli.bench.store import StoreBench
    from kvstore.errors import KVStrataError
    from kvstore.memory import keep_freed_buffers

    keep_freed_buffers()
    plan = QUICK if quick else Plan()
    plan = dataclasses.replace(plan, rounds=rounds or plan.rounds)
    try:
        with _progress() as progress:
            return asyncio.run(StoreBench(plan, progress, _corrupt(corrupt)).run(peers_folder))
    except (ChildFailed, KVStrataError, OSError, WrongBytes) as error:
        fail(str(error))


def _corrupt(said: str | None) -> Corrupt | None:
    if said not in (None, "stored", "delivered"):
        raise typer.BadParameter("say stored or delivered")
    return said  # type: ignore[return-value]


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, else a line a step. Drawn between measurements only, never during one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    said = ""
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task("starting", total=None)

        def progress(step: str, done: int, total: int) -> None:
            nonlocal said
            bars.update(task, description=step, completed=done, total=total, refresh=True)
            if not console.is_terminal and step != said:
                note(step)
            said = step

        yield progress
