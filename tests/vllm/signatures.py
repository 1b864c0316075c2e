"""What vLLM's base class of connectors declares, read from its source: names, parameters, what is abstract.

`python -m tests.vllm.signatures VERSION=PATH_TO_BASE.PY ...` prints signatures.json, which stands for the
vLLM versions that the connector names: nobody needs them installed to hold the connector against them.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

BASES: Final = ("KVConnectorBase_V1", "SupportsHMA")
FILE: Final = Path(__file__).with_name("signatures.json")


class Signature(NamedTuple):
    kind: str  # method, classmethod or property
    abstract: bool
    parameters: list[str]  # without self or cls

    def is_called_as(self, other: Signature) -> bool:
        return (self.kind, self.parameters) == (other.kind, other.parameters)


def kept() -> dict[str, dict[str, Signature]]:
    """Version -> method -> signature."""
    document = json.loads(FILE.read_text(encoding="utf-8"))
    return {
        version: {name: Signature(*signature) for name, signature in methods.items()}
        for version, methods in document.items()
    }


def methods_of(classes: Iterator[ast.ClassDef]) -> dict[str, Signature]:
    """Public methods, and the constructor."""
    return {
        statement.name: _signature(statement)
        for node in classes
        for statement in node.body
        if isinstance(statement, ast.FunctionDef)
        and (not statement.name.startswith("_") or statement.name == "__init__")
    }


def bases_in(source: str) -> Iterator[ast.ClassDef]:
    return (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name in BASES)


def derived_in(source: str) -> Iterator[ast.ClassDef]:
    """Classes, however deep in functions, that inherit from one of the bases."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and {ast.unparse(b).rpartition(".")[2] for b in node.bases} & {
            *BASES
        }:
            yield node


def _signature(method: ast.FunctionDef) -> Signature:
    decorators = {ast.unparse(decorator) for decorator in method.decorator_list}
    kinds = [kind for kind in ("classmethod", "property") if kind in decorators]
    arguments = method.args
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    starred = [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return Signature(kinds[0] if kinds else "method", "abstractmethod" in decorators, [*named[1:], *starred])


def _document(found: Mapping[str, Mapping[str, Signature]]) -> str:
    """One line a method."""
    versions = []
    for version, methods in sorted(found.items()):
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(methods[name])}" for name in sorted(methods))
        versions.append(f" {json.dumps(version)}: {{\n{rows}\n }}")
    return "{\n" + ",\n".join(versions) + "\n}"


def main() -> None:
    pairs = (argument.partition("=") for argument in sys.argv[1:])
    print(_document({v: methods_of(bases_in(Path(p).read_text(encoding="utf-8"))) for v, _, p in pairs}))


if __name__ == "__main__":
    main()
