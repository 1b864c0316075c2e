"""Law of imports: the store's core is nouns, errors and the standard library, and those two are no less pure.

import-linter (make verify-imports) forbids what it is told by name; here an allow list refuses all the rest.
"""

from __future__ import annotations

import sys

import pytest

from tests.house.sources import imported_modules, parse, python_files

ALLOWED_OF_OURS = {
    "kvstore/core": ("kvstore.core", "kvstore.errors", "kvstore.nouns"),
    "kvstore/errors.py": ("kvstore.nouns",),
    "kvstore/nouns.py": (),
}
# I/O has no place in a state machine whose results must be replayable from its inputs.
IO_MODULES = frozenset(
    {"asyncio", "mmap", "multiprocessing", "os", "random", "socket", "subprocess", "threading", "time"}
)


def is_allowed(module: str, ours: tuple[str, ...]) -> bool:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return top not in IO_MODULES
    return any(module == name or module.startswith(f"{name}.") for name in ours)


@pytest.mark.parametrize(("where", "ours"), ALLOWED_OF_OURS.items())
def test_imports_only_what_it_may(where: str, ours: tuple[str, ...]) -> None:
    files = [p for p in python_files("kvstore") if str(p) == where or str(p).startswith(f"{where}/")]
    assert files, f"{where} is gone: change this test with it"
    strangers = [
        f"{path}:{line} {module}"
        for path in files
        for line, module in imported_modules(parse(path))
        if not is_allowed(module, ours)
    ]
    assert strangers == []


def test_the_rule_sees_a_stranger() -> None:
    ours = ALLOWED_OF_OURS["kvstore/core"]
    assert is_allowed("kvstore.core.slots", ours)
    assert is_allowed("collections.abc", ours)
    assert not is_allowed("kvstore.transport.base", ours)
    assert not is_allowed("numpy", ours)
    assert not is_allowed("asyncio", ours)
