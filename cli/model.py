"""`kvstrata model`: the models this machine has, and how it gets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from cli.say import note, one_json, reported

__all__ = ["model"]

_MB = 1_000_000

model = typer.Typer(no_args_is_help=True, help="Fetch and list models.")

JsonOut = Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")]


@model.command()
def pull(
    name: Annotated[str, typer.Argument(help="As `kvstrata model list` shows it.")], json_out: JsonOut = False
) -> None:
    """Fetch a model into the cache; at once if it is there."""
    raise typer.Exit(reported(lambda: _pull(name, json_out)))


@model.command("list")
def list_(json_out: JsonOut = False) -> None:
    """What can be pulled and what is here."""
    raise typer.Exit(reported(lambda: _list(json_out)))


def _pull(name: str, json_out: bool) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from router.model_folder import model_folder

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        folder = model_folder(name, _bar(bars))
    if json_out:
        one_json({"model": name, "path": str(folder)})
    else:
        note(f"{name} is in {folder}")
    return 0


def _bar(bars: Any) -> Callable[[str, int, int], None]:
    """One bar, of the stage that runs."""
    task = bars.add_task("looking", total=None)

    def progress(stage: str, done: int, total: int) -> None:
        bars.update(task, description=stage, completed=done, total=total or None)

    return progress


def _list(json_out: bool) -> int:
    from engine.registry import list_models

    listed = list_models()
    if json_out:
        rows = [
            {"name": m.name, "title": m.title, "ready": m.ready, "path": str(m.path), "nbytes": m.nbytes}
            for m in listed
        ]
        one_json({"models": rows})
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "", "MB", "what it is")
    for m in listed:
        table.add_row(m.name, "here" if m.ready else "to be fetched", str(m.nbytes // _MB), m.title)
    Console().print(table)
    return 0
