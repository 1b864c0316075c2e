"""Convention: a module that lists its public names lists them sorted, once, and defines each of them.

Sorted as ruff does it: constants, then classes, then the rest.
"""

from __future__ import annotations

import ast

from tests.house.sources import parse, python_files


def exported(tree: ast.Module) -> list[str] | None:
    """The literal `__all__` of a module; None where it has none."""
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if (
            isinstance(node, ast.Assign | ast.AnnAssign)
            and isinstance(target, ast.Name)
            and target.id == "__all__"
        ):
            assert node.value is not None
            return list(ast.literal_eval(node.value))
    return None


def defined(tree: ast.Module) -> set[str]:
    """The names a module binds at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        else:
            names |= {
                n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
    return names


def in_order(names: list[str]) -> list[str]:
    return sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def test_exports_are_sorted_and_defined() -> None:
    for path in python_files():
        tree = parse(path)
        names = exported(tree)
        if names is not None:
            assert names == in_order(names), f"{path}: __all__ is not sorted, or names one twice"
            assert set(names) <= defined(tree), (
                f"{path}: {set(names) - defined(tree)} exported but not defined"
            )
