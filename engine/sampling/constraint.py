"""The seam of constrained output: which tokens a grammar, a schema or a list of choices allows next.

Where it stands: the constraint's mask is the first thing that happens to a row's logits, so whatever else a
request asks for chooses among what is allowed. It is a function of the output's tokens alone: a sequence that
goes on elsewhere makes a new one and has it accept the output so far.

    fill_allowed(words)   token t is bit t % 32 of word t // 32, as grammar libraries lay their masks out
    accept, rollback      as tokens are drawn; and over guesses, which are taken back
    copy                  for a fork: the two go on apart
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

__all__ = ["TokenConstraint", "allowed_after"]


class TokenConstraint(Protocol):
    """One sequence's. End tokens are its own to allow: when it is complete, most often they alone."""

    def fill_allowed(self, words: npt.NDArray[np.int32]) -> None:
        """Set the bit of every token that may come next. `words` (int32 [vocabulary / 32, rounded up]) is
        zero before; bits behind the vocabulary are ignored."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take the next token. False, and nothing changed, if it is not allowed."""
        ...

    def rollback(self, tokens: int) -> None:
        """Take back so many of the tokens accepted last."""
        ...

    def copy(self) -> Self:
        """One that goes on from here by itself."""
        ...


def allowed_after(
    constraint: TokenConstraint, drafts: list[int], vocabulary: int
) -> npt.NDArray[np.bool_] | None:
    """Which tokens may follow if `drafts` are accepted first: bool [vocabulary]; it stands afterwards where
    it stood. None if the drafts are not allowed themselves: whoever verifies them stops before that row."""
    taken = 0
    try:
        for token_id in drafts:
            if not constraint.accept(token_id):
                return None
            taken += 1
        words = np.zeros(-(-vocabulary // 32), np.int32)
        constraint.fill_allowed(words)
    finally:
        if taken:
            constraint.rollback(taken)
    return np.unpackbits(words.view(np.uint8), count=vocabulary, bitorder="little").view(np.bool_)
