"""The seam for what guesses tokens: n-grams of the text so far, a small model, anything.

A drafter can cost time and nothing else: a guess is taken only where it is the very token that would have
been drawn without it, so a bad drafter, or a hostile one, never shows in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

__all__ = ["Draft", "Drafter", "DrafterFactory"]


class Draft(NamedTuple):
    """Guessed tokens, in order, and of each a grade: how good the drafter thinks it is if those before it are
    right, or how it was made. How often guesses come true is learned for each grade by itself."""

    tokens: Sequence[int] = ()
    grades: Sequence[int] = ()


class Drafter(Protocol):
    """Guesses for one sequence, from its admission to its end. Called in the engine's thread, before each
    step that may verify drafts, so it holds up all sequences. What it raises fails the step."""

    @property
    def grades(self) -> int:
        """Grades are 0 to this, exclusive."""
        ...

    def propose(self, tokens: Sequence[int], tokens_max: int) -> Draft:
        """At most `tokens_max` (1 or more) tokens that may follow `tokens`, or none. `tokens` is the engine's
        own list: not to be kept or changed; from call to call it only grows."""
        ...

    def told(self, accepted: int, tried: int) -> None:
        """Of the last draft the first `tried` tokens were put to the test, and the first `accepted` of these
        were right: all, or all but the last. Not called for a draft of which none was tried."""
        ...


DrafterFactory = Callable[[], Drafter]
"""Makes the drafter of a sequence."""
