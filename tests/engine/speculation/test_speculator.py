"""Promise: drafts take only what is left, are held back where they do not pay, and come back when they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from engine.batch import Chunk
from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.sequence import Sequence
from engine.speculation.speculator import RETRY_AFTER, Speculator
from tests.engine.conftest import request
from tests.engine.speculation.drafters import Guessing

RIGHT, WRONG = 5, 6


class Model:
    vocab_size = 100


def speculator(token: Callable[[], int] = lambda: RIGHT, **settings: int) -> Speculator:
    config = EngineConfig(**({"draft_tokens_max": 8} | settings))
    model = cast(ModelConfig, Model())
    return Speculator(lambda: Guessing(lambda _, count: [token()] * count), config, model)


def sequence(tokens: int = 10, *, slots: int = 100, tokens_max: int = 3000, hold: bool = False) -> Sequence:
    made = Sequence(
        request("s", [1] * tokens, 1),
        slots=tuple(range(slots)),
        lent=0,
        arrival=0,
        hold=hold,
        keep=False,
        tokens_max=tokens_max,
        eos_token_ids=(),
        detokenizer=None,
    )
    made.computed = tokens - 1
    return made


def step(spec: Speculator, decoding: Sequence) -> int:
    """What is drawn is always RIGHT. How many drafts were verified."""
    (chunk,) = spec.draft([Chunk(decoding, 1)])
    right = next((i for i, draft in enumerate(chunk.drafts) if draft != RIGHT), len(chunk.drafts))
    if chunk.drafts:
        spec.verified(chunk, [RIGHT] * (right + 1))
    decoding.tokens += [RIGHT] * (right + 1)
    decoding.computed += right + 1
    return len(chunk.drafts)


def test_what_comes_true_is_drafted_to_the_limit() -> None:
    spec, decoding = speculator(), sequence()
    lengths = [step(spec, decoding) for _ in range(20)]
    assert lengths[0] >= 1
    assert lengths[-1] == 8


def test_what_never_comes_true_is_tried_seldom_and_found_again_when_it_does() -> None:
    token = WRONG
    spec, decoding = speculator(lambda: token), sequence()
    first = sum(step(spec, decoding) for _ in range(200))
    later = sum(step(spec, decoding) for _ in range(1000))
    assert first < 40
    assert 0 < later <= 1000 // RETRY_AFTER
    token = RIGHT
    assert max(step(spec, decoding) for _ in range(10 * RETRY_AFTER)) == 8


def test_drafts_share_what_the_step_has_left() -> None:
    spec = speculator(step_tokens_max=64, running_max=32)
    chunks = [Chunk(sequence(), 1) for _ in range(3)]
    for _ in range(30):
        for chunk in spec.draft(chunks):
            spec.verified(chunk, [RIGHT] * (len(chunk.drafts) + 1))
    assert [len(chunk.drafts) for chunk in spec.draft(chunks)] == [8, 8, 8]
    prompt = sequence(50)
    prompt.computed = 0
    drafted = spec.draft([*chunks, Chunk(prompt, 50)])
    assert sum(chunk.rows + len(chunk.drafts) for chunk in drafted) == 64
    assert drafted[-1].drafts == ()
    prompt.tokens += [1] * 11
    assert not any(chunk.drafts for chunk in spec.draft([*chunks, Chunk(prompt, 61)]))


def test_a_crowd_gets_drafts_for_near_certainties_only() -> None:
    spec = speculator()
    assert any(chunk.drafts for chunk in spec.draft([Chunk(sequence(), 1)]))
    assert not any(chunk.drafts for chunk in spec.draft([Chunk(sequence(), 1) for _ in range(32)]))


def test_no_slot_is_asked_for_and_no_token_beyond_the_end_guessed() -> None:
    spec = speculator()
    for _ in range(20):
        step(spec, sequence())
    (full,) = spec.draft([Chunk(sequence(32, slots=1), 1)])
    assert full.drafts == ()
    (nearly,) = spec.draft([Chunk(sequence(29, slots=1), 1)])
    assert len(nearly.drafts) == 3, "positions 29, 30 and 31"
    (last,) = spec.draft([Chunk(sequence(32, slots=2, tokens_max=33), 1)])
    assert last.drafts == (), "the one token to come needs no guess"
    (held,) = spec.draft([Chunk(sequence(hold=True), 1)])
    assert held.drafts == ()
