"""docs/python-api.md is true: its blocks run in order, and print what the page says they print."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from tests.cli.stores import RunningStore, running_store
from tests.house.sources import REPO

PAGE = REPO / "docs" / "python-api.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WAIT_S = 60.0


@dataclass(frozen=True)
class Example:
    line: int
    source: str
    prints: str


def examples(page: str) -> list[Example]:
    """Every python block, with what the text block behind it says that it prints."""
    found: list[Example] = []
    blocks = list(BLOCK.finditer(page))
    for block, follower in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] == "python":
            prints = follower[2] if follower is not None and follower[1] == "text" else ""
            found.append(Example(page.count("\n", 0, block.start(2)) + 1, block[2], prints))
    return found


def compiled(example: Example, path: Path) -> CodeType:
    """Its lines are the page's own, so that a traceback points into the page."""
    tree = compile(
        "\n" * (example.line - 1) + example.source,
        str(path),
        "exec",
        ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
    )
    code: CodeType = compile(tree, str(path), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return code


async def run(examples: list[Example], path: Path) -> list[tuple[int, str, str]]:
    """(line, printed, promised) of each block that did not print what the page says."""
    names: dict[str, Any] = {}
    wrong: list[tuple[int, str, str]] = []
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            made = eval(compiled(example, path), names)
            if inspect.iscoroutine(made):
                await asyncio.wait_for(made, WAIT_S)
        if printed.getvalue() != example.prints:
            wrong.append((example.line, printed.getvalue(), example.prints))
    return wrong


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunningStore]:
    with running_store(tmp_path, "--shards", "2", "--capacity", "64MiB") as running:
        yield running


async def test_every_example_of_the_page_runs_and_prints_what_it_says(
    store: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_STATE", str(store.state))
    page = PAGE.read_text(encoding="utf-8")
    assert "kvstrata store --shards 2 --capacity 64MiB" in page, "it starts another store than we do"
    for wanted, there in (
        ("127.0.0.1:7400", store.shards[0]["address"]),
        ("~/.local/state/kvstrata", str(store.state)),
    ):
        assert wanted in page
        page = page.replace(wanted, there)
    assert await run(examples(page), PAGE) == []


async def test_a_wrong_example_or_output_is_found(tmp_path: Path) -> None:
    page = "# x\n\n```python\nprint(await asyncio.sleep(0, 1 + 1))\n```\n\n```text\n3\n```\n"
    shown = examples(page.replace("print", "import asyncio\nprint"))
    assert await run(shown, tmp_path) == [(4, "2\n", "3\n")]
    with pytest.raises(ZeroDivisionError):
        await run(examples("```python\n1 / 0\n```\n"), tmp_path)


def test_the_page_speaks_of_everything_that_kvstore_offers() -> None:
    import kvstore

    silent = {name for name in kvstore.__all__ if name not in PAGE.read_text(encoding="utf-8")}
    assert silent <= {"DROP", "ISOLATE", "EpochPolicy", "MissReason", "Quality", "Refusal", "StoreSession"}
    assert os.path.commonpath([PAGE, REPO]) == str(REPO)
