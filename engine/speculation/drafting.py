"""What speculation knows of one sequence: its drafter, and how its guesses fared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
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
        self._by_grade: defaultdict[int, Acceptance] = defaultdict(partial(Acceptance, _SHARED_MEMORY))

    def learn(self, grade: int, accepted: int, tried: int) -> None:
        self._by_grade[grade].learn(accepted, tried)

    def chance(self, grade: int) -> float:
        return self._by_grade[grade].chance(_CHANCE_PRIOR, _PRIOR_WEIGHT)


class Drafting:
    """`passed_over`: chances to draft that were let go since the last draft, because none would have paid."""

    __slots__ = ("_drafter", "_experience", "_grade", "_own", "passed_over")

    def __init__(self, drafter: Drafter, experience: Experience) -> None:
        self.passed_over = 0
        self._drafter = drafter
        self._experience = experience
        self._own: defaultdict[int, Acceptance] = defaultdict(partial(Acceptance, _OWN_MEMORY))
        self._grade = 0  # of the last draft

    def propose(self, tokens: Sequence[int], tokens_max: int, vocab_size: int) -> Draft:
        """What the drafter guesses, cut where it is no token or too long; of a grade that it said it has."""
        guessed, grade = self._drafter.propose(tokens, tokens_max)
        sound: list[int] = []
        for token in guessed[:tokens_max]:
            if not 0 <= token < vocab_size:
                break
            sound.append(token)
        self._grade = min(max(grade, 0), self._drafter.grades - 1)
        return Draft(sound, self._grade)

    def learn(self, accepted: int, tried: int) -> None:
        """Of the last draft so many tokens were tried, and all of these accepted but perhaps the last."""
        self._own[self._grade].learn(accepted, tried)
        self._experience.learn(self._grade, accepted, tried)
        self._drafter.told(accepted, tried)

    def chance(self, grade: int) -> float:
        """That a guess of this grade comes true, if those before it in its draft did."""
        return self._own[grade].chance(self._experience.chance(grade), _SHARED_WEIGHT)

    @property
    def best_chance(self) -> float:
        return max(self.chance(grade) for grade in range(self._drafter.grades))
