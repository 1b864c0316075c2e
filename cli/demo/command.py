"""`kvstrata demo`: start everything, hold the conversation, break a stored byte, check every token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.say import note, one_json, reported

if TYPE_CHECKING:
    from cli.demo.checks import Verdict
    from cli.demo.conversation import Turn
    from cli.host import Hosted

__all__ = ["demo"]


def demo(
    model: Annotated[
        str | None, typer.Option(help="Registry name, folder, GGUF file or hub id; a chat model.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; every setting has a default.")] = None,
    json_out: Annotated[
        bool, typer.Option("--json", help="One JSON document of the results; on an error none.")
    ] = False,
) -> None:
    """Hold a conversation through the store, and check every token of it.

    Three turns about a document, then a second reader of the same one.

    Every answer is compared, token for token, with what one process without a store generates.

    A stored byte is flipped, and the answer must not change.

    Exit code 1 if anything of it does not hold.
    """
    raise typer.Exit(reported(lambda: _demo(model, config, json_out)))


def _demo(model: str | None, path: Path | None, json_out: bool) -> int:
    from engine.process import prepare_process

    prepare_process()  # this process computes too: the answers to compare with

    from cli.host import host_locally
    from cli.settings import service_config

    flags = {"model": model, "router.port": 0, "store.faults": True}
    config = service_config(path, flags)
    return host_locally(config, lambda hosted: _run(hosted, json_out), note)


def _run(hosted: Hosted, json_out: bool) -> int:
    import httpx

    from cli.demo.checks import judge, monolithic_answers
    from cli.demo.conversation import hold, repeat_last
    from cli.demo.figures import read_figures
    from kvstore.errors import KVStrataError

    try:
        with httpx.Client(base_url=hosted.url) as client:
            note("holding the conversation")
            turns = hold(
                client, hosted.model, lambda t: note(f"  {t.reader}: {t.question} {t.ttft_ms:.0f} ms")
            )
            note("flipping one stored byte, and asking the last question again")
            flipped = hosted.router.flip_stored_byte()
            repeated = repeat_last(client, hosted.model)
            figures = read_figures(client)
    except (httpx.HTTPError, RuntimeError) as error:
        raise KVStrataError(
            f"the conversation broke off: {error}. Try `kvstrata up` and look at its log"
        ) from None
    if flipped is None:
        raise KVStrataError("there was no stored block to break: nothing had reached the store")
    note("generating the same answers in one process, without a store")
    alone = monolithic_answers(
        str(hosted.folder), hosted.config.engine, turns, lambda n: note(f"  {n} of {len(turns)}")
    )
    verdict = judge(
        turns, alone, repeated, figures.verified_blocks, figures.rejected, figures.ownerless_bytes
    )
    if json_out:
        one_json(_document(turns, verdict))
    else:
        _show(turns, verdict)
    for failure in verdict.failures:
        note(f"FAILED: {failure}")
    return 1 if verdict.failures else 0


def _document(turns: list[Turn], verdict: Verdict) -> dict[str, Any]:
    return {
        "turns": [
            {
                "prompt_tokens": len(turn.prompt_ids),
                "cached_tokens": turn.cached_tokens,
                "ttft_ms": round(turn.ttft_ms, 1),
                "output_tokens": len(turn.output_ids),
            }
            for turn in turns
        ],
        "equal_to_monolithic": verdict.equal_to_monolithic,
        "unchanged_after_flip": verdict.unchanged_after_flip,
        "ttft_cold_ms": round(verdict.ttft_cold_ms, 1),
        "ttft_warm_ms": round(verdict.ttft_warm_ms, 1),
        "verified_blocks": verdict.verified_blocks,
        "rejected": verdict.rejected,
        "ownerless_bytes": verdict.ownerless_bytes,
    }


def _show(turns: list[Turn], verdict: Verdict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "prompt", "cached", "TTFT", "tokens/s", "KV came from", title="The conversation")
    for column in (1, 2, 3, 4):
        table.columns[column].justify = "right"
    for number, turn in enumerate(turns, 1):
        computed = len(turn.prompt_ids) - turn.cached_tokens
        origin = [f"{tier} {tokens}" for tier, tokens in turn.cached_by_tier.items() if tokens]
        table.add_row(
            f"{number} {turn.reader}",
            str(len(turn.prompt_ids)),
            str(turn.cached_tokens),
            f"{turn.ttft_ms:.0f} ms",
            f"{turn.decode_tokens_per_s:.1f}",
            ", ".join([*origin, f"computed {computed}"]),
        )
    console = Console()
    console.print(table)
    for number, turn in enumerate(turns, 1):
        console.print(f"[bold]{number} {turn.question}[/]\n  {turn.answer.strip()}", highlight=False)
    yes = {True: "[green]yes[/]", False: "[red]NO[/]"}
    console.print(f"equal to one process, token for token: {yes[verdict.equal_to_monolithic]}")
    console.print(
        f"one stored byte flipped: rejected {verdict.rejected}, answer unchanged: "
        f"{yes[verdict.unchanged_after_flip]}",
        highlight=False,
    )
    console.print(
        f"TTFT cold {verdict.ttft_cold_ms:.0f} ms, warm at most {verdict.ttft_warm_ms:.0f} ms; "
        f"{verdict.verified_blocks} blocks verified by their readers; "
        f"{verdict.ownerless_bytes} bytes without an owner",
        highlight=False,
    )
