"""What CI runs is written down: constraints.txt pins every direct dependency, inside pyproject's range."""

from __future__ import annotations

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.house.sources import REPO


def pins() -> dict[str, Version]:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    pinned: dict[str, Version] = {}
    for requirement in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement}: a constraint here is an exact pin"
        assert canonicalize_name(requirement.name) not in pinned, f"{requirement.name} is pinned twice"
        pinned[canonicalize_name(requirement.name)] = Version(specifier.version)
    return pinned


def direct_dependencies() -> list[Requirement]:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in direct_dependencies():
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}: CI runs {pinned[name]}"


def test_nothing_else_is_pinned() -> None:
    assert set(pins()) == {canonicalize_name(requirement.name) for requirement in direct_dependencies()}


def test_the_base_install_brings_no_server_and_no_model_library() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert base.isdisjoint({"fastapi", "ray", "tokenizers", "transformers", "uvicorn"})
