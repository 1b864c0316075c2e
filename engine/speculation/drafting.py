"""What speculation knows of one sequence: its drafter, and how its guesses fared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from engine.speculation.base import Draft, Drafter
from engine.speculation.payoff import Acceptance

__all__ = ["Drafting", "Experience"]

_OWN_MEMORY: Final = 0.95  # of guesses: the last twenty or so count
_SHARED_MEMORY: Final = 0.995
_CHANCE_PRIOR: Final = 0.5
_PRIOR_WEIGHT: Final = 2.0
_SHARED_WEIGHT: Final = 4.0
"""All sequences' experience counts as much as so many guesses of a sequence's own."""


class Experience:
    """How guesses of each grade fared over all sequences: what a new one starts with."""

    __slots__ = ("_by_grade",)

    def __init__(self) -> None:
        self._by_grade: defaultdict[int, Acceptance] = defaultdict(lambda: Acceptance(_SHARED_MEMORY))

    def learn(self, grade: int, came_true: bool) -> None:
        self._by_grade[grade].learn(came_true)

    def chance(self, grade: int) -> float:
        return self._by_grade[grade].chance(_CHANCE_PRIOR, _PRIOR_WEIGHT)


class Drafting:
    """`passed_over`: chances to draft that were let go since the last draft, because none would have paid."""

    __slots__ = ("_drafter", "_experience", "_grades", "_own", "passed_over")

    def __init__(self, drafter: Drafter, experience: Experience) -> None:
        self.passed_over = 0
        self._drafter = drafter
        self._experience = experience
        self._own = [Acceptance(_OWN_MEMORY) for _ in range(drafter.grades)]
        self._grades: Sequence[int] = ()  # of the last draft

    def propose(self, tokens: Sequence[int], tokens_max: int, vocab_size: int) -> Draft:
        """What the drafter guesses, cut where it is no token, or of no grade, or too long."""
        sound: list[tuple[int, int]] = []
        for token, grade in zip(*self._drafter.propose(tokens, tokens_max), strict=False):
            if len(sound) == tokens_max or not (0 <= token < vocab_size and 0 <= grade < len(self._own)):
                break
            sound.append((token, grade))
        draft = Draft([token for token, _ in sound], [grade for _, grade in sound])
        self._grades = draft.grades
        return draft

    def learn(self, verdicts: Sequence[bool]) -> None:
        """So many tokens of the last draft were tried, and came true or not."""
        for grade, came_true in zip(self._grades, verdicts, strict=False):
            self._own[grade].learn(came_true)
            self._experience.learn(grade, came_true)
        self._drafter.told(sum(verdicts), len(verdicts))

    def chances(self, grades: Iterable[int]) -> list[float]:
        """That guesses of these grades come true, each if those before it in its draft did."""
        shared = self._experience
        return [self._own[grade].chance(shared.chance(grade), _SHARED_WEIGHT) for grade in grades]

    @property
    def best_chance(self) -> float:
        return max(self.chances(range(len(self._own))))
