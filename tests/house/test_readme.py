"""The README is true: its tree is the tree, each entry has a gloss; promises name their state and proof."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.house.sources import GENERATED, REPO, walk

README = (REPO / "README.md").read_text(encoding="utf-8")
GLOSS_WORDS = range(3, 9)
STATES = {"holds", "partly", "not yet"}
# Folders that speak for their files: generated code, and tests, which mirror the code.
GLOSSED_AS_ONE = (GENERATED, Path("tests"))
ENTRY = re.compile(r"^(?P<indent>(?:  )*)(?P<name>\S+)(?:\s{2,}(?P<gloss>\S.*))?$")


def section(title: str) -> str:
    _, _, rest = README.partition(f"\n## {title}\n")
    assert rest, f"README.md has no section {title!r}"
    return rest.partition("\n## ")[0]


def tree_entries() -> Iterator[tuple[Path, str]]:
    """(path, gloss) of every line of the tree: two blanks of indentation a level, folders end in a slash."""
    (block,) = re.findall(r"^```text\n(.*?)^```", section("The tree"), re.MULTILINE | re.DOTALL)
    parents: list[str] = []
    for line in block.splitlines():
        match = ENTRY.match(line)
        assert match, f"not an entry of the tree: {line!r}"
        depth = len(match["indent"]) // 2
        assert depth <= len(parents), f"{line!r} is indented below nothing"
        parents[depth:] = [match["name"].rstrip("/")]
        path = Path(*parents)
        assert (REPO / path).is_dir() == match["name"].endswith("/"), (
            f"{path}: not there, or its slash is wrong"
        )
        yield path, match["gloss"] or ""


def must_be_listed() -> set[Path]:
    """Every folder, and every file that is not empty, of a kind that a newcomer would open."""
    return {path for path in walk() if is_listed(path)}


def is_listed(path: Path) -> bool:
    inside = [folder for folder in GLOSSED_AS_ONE if path != folder and path.is_relative_to(folder)]
    full = REPO / path
    if inside:
        return full.is_dir() and Path("tests") in inside and path.parent == Path("tests")
    return full.is_dir() or (full.stat().st_size > 0 and path.name != "__init__.py")


def test_the_tree_names_everything_that_is_there_and_nothing_else() -> None:
    listed = [path for path, _ in tree_entries()]
    assert len(listed) == len(set(listed)), "an entry stands twice"
    assert {str(path) for path in must_be_listed() - set(listed)} == set(), "missing in the README's tree"
    assert [str(path) for path in listed if not (REPO / path).exists()] == [], "in the tree but not there"


def test_every_entry_has_a_gloss_of_three_to_eight_words() -> None:
    wrong = [f"{path}: {gloss!r}" for path, gloss in tree_entries() if len(gloss.split()) not in GLOSS_WORDS]
    assert wrong == []


def test_each_of_the_five_promises_has_a_state_and_links_its_proof() -> None:
    rows = [
        line.strip("|").split("|")
        for line in section("Five promises").splitlines()
        if line.startswith("| **")
    ]
    assert [row[0].strip()[2] for row in rows] == ["1", "2", "3", "4", "5"]
    for _, state, proof in rows:
        assert state.strip() in STATES
        assert state.strip() == "not yet" or "](tests/" in proof, (
            "a promise that holds links to the test that proves it"
        )
