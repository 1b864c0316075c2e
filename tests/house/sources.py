"""Which files the house rules are asked of: what git would ship, found by walking (no git is needed)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("cli", "decode", "engine", "kvstore", "prefill", "router")
GENERATED = Path("kvstore/v1")
IGNORED_FOLDERS = frozenset({"__pycache__", "build", "dist"})


def walk(top: Path = REPO) -> Iterator[Path]:
    """Every file and folder below `top` that is the project's own, relative to the repository."""
    for path in sorted(top.iterdir()):
        if path.name in IGNORED_FOLDERS or path.name.endswith(".egg-info"):
            continue
        if path.name.startswith(".") and path.name != ".ci":
            continue
        yield path.relative_to(REPO)
        if path.is_dir():
            yield from walk(path)


def python_files(*tops: str) -> list[Path]:
    """The hand-written Python files of the given folders (default: every package)."""
    return [
        path
        for top in tops or PACKAGES
        if (REPO / top).is_dir()
        for path in walk(REPO / top)
        if path.suffix == ".py" and not path.is_relative_to(GENERATED)
    ]


def parse(path: Path) -> ast.Module:
    """The syntax tree of one file, relative to the repository."""
    return ast.parse((REPO / path).read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every absolute import in the tree, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.lineno, node.module
