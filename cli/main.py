"""The `kvstrata` command. One file a command; each imports what it needs when it runs, so help is instant."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated

import typer

from cli.bench.command import bench
from cli.chat import chat
from cli.down import down
from cli.epoch import epoch
from cli.model import model
from cli.purge import purge
from cli.replay.command import replay
from cli.status import status
from cli.store import store
from cli.up import up
from cli.vllm_config import vllm_config
from cli.weights import weights

__all__ = ["app", "main"]

app = typer.Typer(
    name="kvstrata",
    help="A versioned KV-cache service for LLM serving, and the serving stack around it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"kvstrata {importlib.metadata.version('kvstrata')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


app.command()(up)
app.command()(down)
app.command()(chat)
app.command()(status)
app.command()(store)
app.command()(purge)
app.command()(replay)
app.command("vllm-config")(vllm_config)
app.add_typer(epoch, name="epoch")
app.add_typer(model, name="model")
app.add_typer(weights, name="weights")
app.add_typer(bench, name="bench")


@app.command(
    add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def demo(context: typer.Context) -> None:
    """Hold a conversation through the store, and check every token of it."""
    from cli.demo.command import demo as command

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(command)
    alone(args=context.args, prog_name="kvstrata demo")


def main() -> None:
    """Exit code 0, 1 for an error (told in one line), 2 for wrong usage, 130 for Ctrl-C."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
