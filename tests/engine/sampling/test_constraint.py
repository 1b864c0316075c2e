"""A constraint's mask bounds every draw, guesses leave it where it stood, and a resumed one is a new one."""

from __future__ import annotations

from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from engine.sampling.constraint import allowed_after
from engine.sampling.rows import NOTHING_ALLOWED, Drawn, SamplingRow
from engine.sampling.sampler import Sampler
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams

VOCABULARY = 70
END = 2


class OneOf:
    """One of these outputs, then the end token."""

    def __init__(self, *choices: tuple[int, ...]) -> None:
        self.choices = [(*choice, END) for choice in choices]
        self.said: tuple[int, ...] = ()

    def _next(self) -> set[int]:
        n = len(self.said)
        return {choice[n] for choice in self.choices if choice[:n] == self.said and len(choice) > n}

    def fill_allowed(self, words: npt.NDArray[np.int32]) -> None:
        bits = words.view(np.uint32)
        for token_id in self._next():
            bits[token_id // 32] |= np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> bool:
        if token_id not in self._next():
            return False
        self.said += (token_id,)
        return True

    def rollback(self, tokens: int) -> None:
        self.said = self.said[: len(self.said) - tokens]

    def copy(self) -> Self:
        other = type(self)(*(choice[:-1] for choice in self.choices))
        other.said = self.said
        return other


def logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def sequence(constraint: OneOf, output: tuple[int, ...] = (), **sampling: float) -> Sequence:
    wanted = SamplingParams(max_tokens=9, seed=5, **sampling)  # type: ignore[arg-type]
    return Sequence(
        GenerationRequest("r", 0, (1, 4), wanted, output),
        slots=(0,),
        lent=0,
        arrival=0,
        hold=False,
        keep=False,
        tokens_max=11,
        eos_token_ids=(END,),
        detokenizer=None,
        constraint=constraint,
    )


def said(running: Sequence) -> list[int]:
    """Everything it draws until it ends, from the same logits at each position."""
    for _ in range(9):
        (drawn,) = Sampler.sample(logits(len(running.tokens)), running.sampling_rows(()))
        (event,) = running.accept([drawn], ())
        if event.finish is not None:
            return running.tokens[2:]
    raise AssertionError("it did not end")


def test_an_output_is_one_of_those_allowed_greedy_and_drawn() -> None:
    choices = ((33, 64), (33, 5), (69,))
    outputs = {tuple(said(sequence(OneOf(*choices), temperature=t))) for t in (0.0, 0.5, 1.0, 2.0)}
    assert outputs <= {(*choice, END) for choice in choices}


def test_one_that_goes_on_elsewhere_says_the_same() -> None:
    choices = tuple((a, b) for a in range(30, 60) for b in range(30, 60))
    whole = said(sequence(OneOf(*choices)))
    assert said(sequence(OneOf(*choices), tuple(whole[:1]))) == whole


def test_a_fork_goes_on_by_itself() -> None:
    one = OneOf((33, 64), (33, 5))
    one.accept(33)
    other = one.copy()
    other.accept(5)
    assert (one.said, other.said) == ((33,), (33, 5))


def test_guesses_leave_it_where_it_stood() -> None:
    one = OneOf((33, 64), (33, 5))
    mask = allowed_after(one, [33], VOCABULARY)
    assert mask is not None
    assert set(np.flatnonzero(mask).tolist()) == {5, 64}
    assert allowed_after(one, [33, 6, 7], VOCABULARY) is None
    assert one.said == ()
    row = SamplingRow(SamplingParams(1, 0.0), [1, 4, 33], 2, constraint=one, drafts=1)
    (drawn,) = Sampler.sample(logits(), [row])
    assert drawn.token_id in {5, 64}
    assert one.said == ()


def test_a_guess_that_is_not_allowed_is_drawn_over_freely() -> None:
    """Whoever verifies guesses stops before that row; it must not fail."""
    row = SamplingRow(SamplingParams(1, 0.0), [1, 4, 6], 2, constraint=OneOf((33,)), drafts=1)
    assert Sampler.sample(logits(), [row]) == [Drawn(int(logits().argmax()))]


def test_bits_behind_the_vocabulary_are_nobodys() -> None:
    class Everything(OneOf):
        def fill_allowed(self, words: npt.NDArray[np.int32]) -> None:
            words[:] = -1

    mask = allowed_after(Everything((3,)), [], VOCABULARY)
    assert mask is not None
    assert mask.shape == (VOCABULARY,)
    assert mask.all()


def test_a_bias_chooses_among_what_is_allowed_only() -> None:
    wanted = SamplingParams(1, 0.0, logit_bias=((9, 100.0), (64, 50.0)))
    row = SamplingRow(wanted, [1], 1, constraint=OneOf((33,), (64,)))
    assert Sampler.sample(logits(), [row])[0].token_id == 64


def test_nothing_allowed_is_told_from_nonsense() -> None:
    for temperature in (0.0, 1.0):
        wanted = SamplingParams(5, temperature, min_tokens=3)
        row = SamplingRow(wanted, [1], 1, frozenset({END}), constraint=OneOf(()))
        assert Sampler.sample(logits(), [row]) == [Drawn(NOTHING_ALLOWED)]
