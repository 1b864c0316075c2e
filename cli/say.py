"""How commands speak: results on standard output, everything else on standard error, errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

__all__ = ["fail", "note", "one_json", "reported"]


def note(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def one_json(document: Any) -> None:
    """The one JSON document of a --json command."""
    print(json.dumps(document, ensure_ascii=False), flush=True)


def fail(message: str) -> NoReturn:
    """One line that says what to do next; exit code 1."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise typer.Exit(1)


def reported(work: Callable[[], int]) -> int:
    """Run `work`; an error of ours becomes its one line and exit code 1."""
    from kvstore.errors import KVStrataError

    try:
        return work()
    except KVStrataError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
