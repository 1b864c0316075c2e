"""Promise: the n-gram drafter finds the longest earlier occurrence, and looks at each token once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.speculation.ngram import CANDIDATES_MAX, GRADES, MATCH_MAX, NGramDrafter


def guess(text: list[int], count: int = 4) -> list[int]:
    return list(NGramDrafter().propose(text, count).tokens)


def test_it_continues_what_was_there_before() -> None:
    assert guess([1, 2, 3, 4, 1, 9, 1, 2, 3]) == [4, 1, 9, 1]
    assert guess([1, 2, 3, 4, 5]) == []
    assert guess([7]) == []
    assert guess([4, 7, 5, 6, 7]) == [5, 6, 7, 5], "one token, if no more"
    assert guess([7, 7], 2) == [7, 7]


def test_the_longest_match_wins_and_of_equals_the_latest() -> None:
    assert guess([1, 2, 3, 10, 9, 2, 3, 20, 1, 2, 3], 1) == [10]
    assert guess([2, 3, 10, 2, 3, 20, 2, 3], 1) == [20]


def test_a_guess_runs_on_into_itself() -> None:
    assert guess([5, 6, 5, 6], 7) == [5, 6, 5, 6, 5, 6, 5]
    assert guess([8, 8, 8], 3) == [8, 8, 8]


def test_longer_matches_are_of_higher_grades() -> None:
    grades = []
    for length in range(GRADES[0], MATCH_MAX + 1):
        text = list(range(length))
        grades.append(list(NGramDrafter().propose([*text, 99, *text], 16).grades))
    assert [first for first, *_ in grades] == grades[0][: len(grades)], "each token lengthens the match"
    assert grades[0] == sorted(grades[0])
    assert set(grades[0]) == set(range(NGramDrafter.grades))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9), st.data())
def test_it_equals_a_scan_of_the_text_however_it_grew(
    text: list[int], count: int, data: st.DataObject
) -> None:
    drafter = NGramDrafter()
    for known in sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=4))):
        drafter.propose(text[:known], 1)
    assert list(drafter.propose(text, count).tokens) == _scan(text, count)


def _scan(text: list[int], count: int) -> list[int]:
    """The definition: of the last occurrences of the text's last pair the one with the longest match; without
    any, the last occurrence of its last token."""
    ends = [end for end in range(1, len(text) - 1) if text[end - 1 : end + 1] == text[-2:]]
    best, longest = max((end for end in range(len(text) - 1) if text[end] == text[-1]), default=None), 1
    for end in ends[::-1][:CANDIDATES_MAX]:
        length = 2
        while length < min(MATCH_MAX, end + 1) and text[end - length] == text[-1 - length]:
            length += 1
        if length > longest:
            best, longest = end, length
    if best is None:
        return []
    grown = list(text)
    for offset in range(count):
        grown.append(grown[best + 1 + offset])
    return grown[len(text) :]
