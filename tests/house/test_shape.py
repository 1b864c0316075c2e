"""Convention: no file over 400 lines, no function over 70, and a module says what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.house.sources import REPO, parse, python_files

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

EVERY_FILE = python_files("cli", "decode", "engine", "kvstore", "prefill", "router", "tests", "benchmarks")


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"{node.name} (line {node.lineno}): {lines} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]


@pytest.mark.parametrize("path", EVERY_FILE, ids=str)
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    assert len((REPO / path).read_text(encoding="utf-8").splitlines()) <= FILE_LINES_MAX


@pytest.mark.parametrize("path", EVERY_FILE, ids=str)
def test_a_function_fits_a_screen(path: Path) -> None:
    assert long_functions(parse(path)) == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [str(p) for p in EVERY_FILE if (tree := parse(p)).body and ast.get_docstring(tree) is None]
    assert silent == []


def test_the_rule_sees_a_long_function() -> None:
    body = "\n".join("    pass" for _ in range(FUNCTION_LINES_MAX))
    assert long_functions(ast.parse(f"async def f():\n{body}\n")) == ["f (line 1): 71 lines"]
