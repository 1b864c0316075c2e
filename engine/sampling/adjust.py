"""What a request does to logits before its temperature: end tokens held back, biases, penalties.

In this order, which is vLLM's (and the formulas are; with repetition's also transformers'), so that a request
means the same here and there. c(t) is how often t was output, v the logit:

    min_tokens            v = -inf for what would end the output before it has so many tokens
    logit_bias            v + bias
    repetition_penalty    of tokens in prompt or output: v / r if v > 0, else v * r
    frequency_penalty     v - f c(t)
    presence_penalty      v - p if c(t) > 0

Constraints stand before it, temperature, min_p, top_k and top_p behind (`engine/sampling/sampler.py`).

All is a function of the request and the tokens before the one that is drawn. Counts are kept between draws
only because counting anew costs a millisecond for a long context: a token costs what it adds, plus one pass
over the distinct tokens so far (float32; 8,000 distinct ones: some 20 us).
Repetition penalty: arXiv:1909.05858, section 4.1; the other two: OpenAI's API reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.types import SamplingParams

__all__ = ["LogitAdjuster"]

Floats = npt.NDArray[np.float32]


class LogitAdjuster:
    """One sequence's. `end_token_ids` are all that would end its output."""

    __slots__ = ("_bias_ids", "_biases", "_counted", "_counts", "_end_ids", "_params", "_prompt_len")

    def __init__(self, params: SamplingParams, prompt_len: int, end_token_ids: Iterable[int]) -> None:
        self._params = params
        self._prompt_len = prompt_len
        self._end_ids = np.array(sorted(end_token_ids), np.int64)
        self._bias_ids = np.array([token_id for token_id, _ in params.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in params.logit_bias], np.float32)
        self._counts: _Counts | None = None  # made when first needed
        self._counted = 0  # tokens that _counts knows

    @staticmethod
    def changes_anything(params: SamplingParams) -> bool:
        """Are there logits that it would change for such a request?"""
        return bool(params.logit_bias or params.min_tokens or _penalises(params))

    def apply(self, logits: Floats, tokens: Sequence[int], drafts: int = 0) -> None:
        """Change `logits` (float32 [vocabulary]) in place. `tokens` are all before the one to be drawn; the
        last `drafts` of them are guesses, counted for this call alone. What was told before as no guess must
        still stand in `tokens`."""
        if len(tokens) - self._prompt_len < self._params.min_tokens:
            logits[self._end_ids[self._end_ids < logits.size]] = -np.inf
        if self._biases.size:
            known = self._bias_ids < logits.size
            logits[self._bias_ids[known]] += self._biases[known]
        if _penalises(self._params):
            certain = len(tokens) - drafts
            counts = self._counts_of(tokens, certain)
            guesses = [(token_id, counts.add(token_id)) for token_id in tokens[certain:]]
            self._penalise(logits, counts)
            for token_id, new in reversed(guesses):
                counts.take_back(token_id, new)

    def _penalise(self, logits: Floats, counts: _Counts) -> None:
        params, ids = self._params, counts.ids
        values = logits[ids]
        if (repetition := np.float32(params.repetition_penalty)) != 1.0:
            # Of v * r and v / r the lesser is the one for v's sign (for r < 1 the greater).
            lesser = np.minimum if repetition > 1.0 else np.maximum
            values = lesser(values * repetition, values / repetition)
        if params.frequency_penalty:
            values -= np.float32(params.frequency_penalty) * counts.outputs
        if params.presence_penalty:
            values -= np.float32(params.presence_penalty) * np.minimum(counts.outputs, np.float32(1.0))
        logits[ids] = values

    def _counts_of(self, tokens: Sequence[int], certain: int) -> _Counts:
        if certain < self._counted:
            raise ValueError(
                f"{self._counted} tokens were certain, now {certain} are: name guesses as drafts"
            )
        if self._counts is None:
            begin = 0 if self._params.repetition_penalty != 1.0 else self._prompt_len
            self._counts = _Counts(tokens[begin : self._prompt_len], tokens[self._prompt_len : certain])
        else:
            for token_id in tokens[self._counted : certain]:
                self._counts.add(token_id)
        self._counted = certain
        return self._counts


def _penalises(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
    )


class _Counts:
    """Distinct tokens, and how often each was output (0: it is the prompt's alone), side by side."""

    __slots__ = ("_ids", "_outputs", "_places")

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        counts = Counter(dict.fromkeys(prompt, 0))
        counts.update(output)
        ids = sorted(counts)  # so that a pass goes through the logits in one direction
        self._places = {token_id: place for place, token_id in enumerate(ids)}
        self._ids = np.array(ids, np.int64)
        self._outputs = np.array([counts[token_id] for token_id in ids], np.float32)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: len(self._places)]

    @property
    def outputs(self) -> Floats:
        return self._outputs[: len(self._places)]

    def add(self, token_id: int) -> bool:
        """One more output. Is the token new here?"""
        place = self._places.get(token_id)
        if place is not None:
            self._outputs[place] += 1.0
            return False
        place = self._places[token_id] = len(self._places)
        if place == self._ids.size:
            self._ids = np.concatenate((self._ids, np.empty(place + 64, np.int64)))
            self._outputs = np.concatenate((self._outputs, np.empty(place + 64, np.float32)))
        self._ids[place] = token_id
        self._outputs[place] = 1.0
        return True

    def take_back(self, token_id: int, new: bool) -> None:
        """The output that was added last; `new` is what `add` said of it."""
        if new:
            del self._places[token_id]  # its place was the last
        else:
            self._outputs[self._places[token_id]] -= 1.0
