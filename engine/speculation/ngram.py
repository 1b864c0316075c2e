"""Prompt lookup: what followed the last few tokens when they occurred before is what may follow them now.

Right where text is copied: summaries, extractions, edits, code, and loops. The longest suffix counts that
occurred before, its latest occurrence first. Occurrences are found as deflate finds them, by chains through
positions of equal hash (here: of equal pairs of tokens):

    position    0  1  2  3  4  5  6  7  8  9        tokens      a b c d a b x a b c
    latest      (b, c) -> 9                         pair that ends at 9
    earlier[9]  2                                   the same pair ended there before
    match       ends at 2 and 9, 3 tokens long      so the guess is tokens 3, 4, ...: d a b x a b c

Where no pair was there before, the last occurrence of the last token has to do. A guess may run on past the
end into itself, as a copy of LZ77 may: after "x y x y" it is "x y x y ...".

Every token is indexed once, about 0.5 us, and a look costs 2 to 20 us, whatever the length of the text: at
most `CANDIDATES_MAX` occurrences are compared. Memory: some 40 bytes a token and 150 a distinct pair.
Prompt lookup decoding: Saxena 2023. Hash chains: RFC 1951, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from engine.speculation.base import Draft

__all__ = ["NGramDrafter"]

CANDIDATES_MAX: Final = 24
"""Occurrences that are compared."""
MATCH_MAX: Final = 12
"""A match that long is taken at once: longer ones foretell no better."""
GRADES: Final = (1, 2, 3, 4, 6, 9, 13)
"""Matches from so many tokens on are a grade of their own: the longer, the better they foretell."""
_NONE: Final = -1


class NGramDrafter:
    """See the module. Holds positions, not tokens."""

    __slots__ = ("_before", "_earlier", "_latest")

    grades = len(GRADES)

    def __init__(self) -> None:
        self._before: dict[int, int] = {}  # where each token stood last before the end
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []  # by position of a pair's second token

    def propose(self, tokens: Sequence[int], tokens_max: int) -> Draft:
        self._index(tokens)
        end, length = self._longest(tokens)
        if end == _NONE:
            return Draft()
        # If the first is right, the match is longer by one.
        lengths = range(length, length + tokens_max)
        return Draft(_copy(tokens, end + 1, tokens_max), [_grade(each) for each in lengths])

    def told(self, accepted: int, tried: int) -> None:
        """Nothing to learn: the text says it all."""

    def _index(self, tokens: Sequence[int]) -> None:
        latest, earlier = self._latest, self._earlier
        if not earlier:
            earlier.append(_NONE)
        for position in range(len(earlier), len(tokens)):
            self._before[tokens[position - 1]] = position - 1
            pair = tokens[position - 1], tokens[position]
            earlier.append(latest.get(pair, _NONE))
            latest[pair] = position

    def _longest(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Where the longest earlier occurrence of the text's end ends, the latest of equals; its length."""
        last = len(tokens) - 1
        candidate, best, longest = self._earlier[last], self._before.get(tokens[last], _NONE), 1
        for _ in range(CANDIDATES_MAX):
            if candidate == _NONE:
                break
            length, longest_possible = 2, min(MATCH_MAX, candidate + 1)
            while length < longest_possible and tokens[candidate - length] == tokens[last - length]:
                length += 1
            if length > longest:
                best, longest = candidate, length
                if length == MATCH_MAX:
                    break
            candidate = self._earlier[candidate]
        return best, longest


def _grade(length: int) -> int:
    return sum(length >= least for least in GRADES) - 1


def _copy(tokens: Sequence[int], begin: int, count: int) -> list[int]:
    """`count` tokens from `begin`, on into the copy itself where the text ends."""
    copied = list(tokens[begin : begin + count])
    period = len(tokens) - begin
    while len(copied) < count:
        copied.append(copied[-period])
    return copied
