"""Promise 1, threat model: nothing shipped runs code out of bytes, and no lease rests on wall time."""

from __future__ import annotations

import ast

from tests.house.sources import imported_modules, parse, python_files

RUNS_CODE = frozenset({"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"})
FORBIDDEN_CALLS = frozenset({"torch.load", "time.time", "time.time_ns", "eval", "exec", "yaml.load"})


def forbidden_in(tree: ast.Module) -> list[str]:
    """`line: what` for every forbidden import, name or call in the tree."""
    found = [
        (line, f"import {module}")
        for line, module in imported_modules(tree)
        if module.partition(".")[0] in RUNS_CODE
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_CALLS:
            found.append((node.lineno, ast.unparse(node)))
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS
        ):
            found.append((node.lineno, node.func.id))
        elif isinstance(node, ast.ImportFrom) and node.module in {"time", "torch"}:
            found += [
                (node.lineno, f"{node.module}.{alias.name}")
                for alias in node.names
                if f"{node.module}.{alias.name}" in FORBIDDEN_CALLS
            ]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append((node.lineno, "allow_pickle="))
    return [f"{line}: {what}" for line, what in sorted(found)]


def test_no_shipped_file_uses_pickle_torch_load_or_wall_time() -> None:
    found = {str(p): bad for p in python_files() if (bad := forbidden_in(parse(p)))}
    wall_clock = [what.partition(": ")[2] for what in found.pop("kvstore/clock.py")]
    assert wall_clock == ["time.time_ns"], "clock.py alone may ask for wall time, once, to stamp HTTP bodies"
    assert found == {}


def test_the_rule_sees_each_of_them() -> None:
    source = (
        "import pickle\nfrom time import time\ntorch.load(x)\ntime.time()\nnp.load(f, allow_pickle=True)\n"
    )
    assert forbidden_in(ast.parse(source)) == [
        "1: import pickle",
        "2: time.time",
        "3: torch.load",
        "4: time.time",
        "5: allow_pickle=",
    ]
