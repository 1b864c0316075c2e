"""Convention: a module that lists its public names lists them sorted, once, and defines each of them.

Sorted as ruff does it: constants, then classes, then the rest.
"""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.house.sources import REPO, parse, python_files


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


def imported_when_named(tree: ast.Module) -> set[str]:
    """What a module with a `__getattr__` names for type checkers, and imports when it is asked for."""
    if "__getattr__" not in defined(tree):
        return set()
    later = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return set().union(*(defined(ast.Module(node.body, [])) for node in later))


def in_order(names: list[str]) -> list[str]:
    return sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def test_exports_are_sorted_and_defined() -> None:
    for path in python_files():
        tree = parse(path)
        names = exported(tree)
        if names is not None:
            assert names == in_order(names), f"{path}: __all__ is not sorted, or names one twice"
            known = defined(tree) | imported_when_named(tree)
            assert set(names) <= known, f"{path}: {set(names) - known} exported but not defined"


def test_what_kvstore_imports_when_named_is_there_and_nothing_is_imported_before() -> None:
    import kvstore

    assert all(getattr(kvstore, name) is not None for name in kvstore.__all__)
    code = "import sys, kvstore; print(sorted({'grpc', 'numpy', 'ray', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout == "[]\n"
