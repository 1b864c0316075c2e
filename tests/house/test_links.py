"""The documents point at things that exist: every relative link and every anchor in every Markdown file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.sources import REPO, walk

DOCUMENTS = [path for path in walk() if path.suffix == ".md"]
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#+\s+(.*?)\s*$", re.MULTILINE)
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:")


def relative_links(text: str) -> Iterator[str]:
    for match in LINK.finditer(CODE.sub("", text)):
        target = match[1] or match[2]
        if not ELSEWHERE.match(target):
            yield target


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = HEADING.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_dead(link: str, document: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = (REPO / document).parent / path if path else REPO / document
    if not target.exists() or not target.resolve().is_relative_to(REPO):
        return True
    return bool(anchor) and anchor not in anchors(target.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_no_link_is_dead(document: Path) -> None:
    links = relative_links((REPO / document).read_text(encoding="utf-8"))
    assert [link for link in links if is_dead(link, document)] == []


def test_the_rule_sees_a_dead_link() -> None:
    text = "[a](docs/design.md) [b](docs/gone.md) [c](https://x.org/y) `[d](no)` [e](docs/design.md#no-such)"
    links = list(relative_links(text))
    assert links == ["docs/design.md", "docs/gone.md", "docs/design.md#no-such"]
    assert [is_dead(link, Path("README.md")) for link in links] == [False, True, True]
