"""Promise: a step computes what is most urgent within its budget and its slots; who finds none leaves with
all its tokens; a block is computed once for all who need it; nobody waits forever.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from engine.engine import Engine
from engine.monolithic import generate_all
from engine.prediction import OutputPrediction
from engine.sampling.rows import NO_TOKEN, Drawn
from engine.sampling.sampler import Sampler
from engine.types import FinishReason, GenerationRequest, StepResult
from tests.engine.conftest import EngineFactory, Logits, prompt, request, run, tokens_of

BLOCK = 8
SMALL = {"block_tokens": BLOCK, "step_tokens_max": 24, "running_max": 8}


@pytest.fixture
def optimism(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission expects hardly any output, so that too many run."""
    monkeypatch.setattr(OutputPrediction, "tokens", lambda _, known, longest: min(known + 1, longest))


def computed(results: list[StepResult]) -> int:
    return sum(result.tokens_computed for result in results)


def alone(make_engine: EngineFactory, *requests: GenerationRequest) -> list[tuple[int, ...]]:
    engine = make_engine(**SMALL)
    return [generate_all(engine, [one])[0] for one in requests]


# Slots as tokens come


def test_a_sequence_holds_what_its_tokens_fill_and_never_a_block_more(make_engine: EngineFactory) -> None:
    engine = make_engine(**SMALL)
    engine.admit(request("a", prompt(50), 30))
    assert engine.free_blocks == 64, "nothing before the first step"
    tokens = 0
    while engine.has_work():
        tokens += engine.step().tokens_computed
        held = 64 - engine.free_blocks
        if engine.has_work():
            assert held == -(-tokens // BLOCK)
        engine.check_integrity()
    assert engine.free_blocks == 64


def test_sequences_that_grow_side_by_side_stay_adjacent_where_there_is_room(
    make_engine: EngineFactory,
) -> None:
    """Attention reads what is adjacent in place."""
    engine = make_engine(**SMALL)
    for i in range(5):
        engine.admit(request(f"r{i}", prompt(20, i), 60))
    while len(engine._sequences) == 5:
        engine.step()
        for sequence in engine._sequences.values():
            taken = sequence.slots
            assert all(after == before + 1 for before, after in itertools.pairwise(taken))
        engine.check_integrity()


def test_admission_counts_on_what_ended_sequences_used(make_engine: EngineFactory) -> None:
    """Who ends early makes room for more; before the first has ended, all is expected to be used."""
    stop = alone(make_engine, request("a", prompt(8), 3))[0][2]
    early = request("early", prompt(8), 400, stop_token_ids=(stop,))
    engine = make_engine(**SMALL)
    asked = [replace(early, request_id=f"r{i}") for i in range(8)]
    engine.admit(asked[0])
    assert not engine.can_admit(asked[1]), "51 of 64 blocks are promised"
    run(engine)
    for _ in range(60):
        generate_all(engine, [early])
    for one in asked[:4]:
        engine.admit(one)
    assert [len(tokens_of(run(engine), one.request_id)) for one in asked[:1]] == [3]


def test_a_single_sequence_ends_where_the_pool_does(make_engine: EngineFactory) -> None:
    engine = make_engine(**SMALL, pool_blocks=6)
    engine.admit(request("a", prompt(20), 500))
    events = [event for result in run(engine) for event in result.events]
    assert events[-1].finish is FinishReason.LENGTH
    assert len(events) == 6 * BLOCK - 20


# Preemption


@pytest.mark.usefixtures("optimism")
def test_who_came_last_leaves_and_goes_on_bit_equal(make_engine: EngineFactory, seen_logits: Logits) -> None:
    asked = [request(f"r{i}", prompt(10 + 7 * i, seed=i), 60, seed=i) for i in range(5)]
    expected = alone(make_engine, *asked)
    logits = dict(seen_logits)
    seen_logits.clear()
    engine = make_engine(**SMALL, pool_blocks=20)
    assert generate_all(engine, asked) == expected
    assert len(seen_logits) == len(logits)
    assert all(torch.equal(seen_logits[key], logits[key]) for key in logits)
    assert engine.free_blocks == 20


@pytest.mark.usefixtures("optimism")
def test_a_preempted_sequence_leaves_with_all_its_tokens(make_engine: EngineFactory) -> None:
    engine = make_engine(**SMALL, pool_blocks=8)
    first, last = request("first", prompt(20), 40), request("last", prompt(20, 1), 40)
    engine.admit(first)
    engine.admit(last)
    said: dict[str, list[int]] = {"first": [], "last": []}
    for _ in range(100):
        result = engine.step()
        for event in result.events:
            said[event.request_id].append(event.token_id)
        engine.check_integrity()
        if result.preempted:
            break
    (left,) = result.preempted
    assert (left.request_id, list(left.output_ids)) == ("last", said["last"])
    assert "last" not in {event.request_id for event in result.events}
    assert tokens_of([result], "first"), "and the first goes on in the same step"


@pytest.mark.usefixtures("optimism")
def test_priority_decides_who_leaves(make_engine: EngineFactory) -> None:
    engine = make_engine(**SMALL, pool_blocks=8)
    engine.admit(replace(request("lower", prompt(20), 40), priority=1))
    engine.admit(replace(request("urgent", prompt(20, 1), 40), priority=-1))
    preempted: list[str] = []
    while engine.has_work():
        preempted += [left.request_id for left in engine.step().preempted]
    assert preempted == ["lower"]


def test_a_sequence_whose_room_others_park_on_leaves_instead_of_spinning(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parked sequences give nothing back: who lacks their slots leaves, and its caller waits for them."""
    engine = make_engine(**SMALL, pool_blocks=8)
    engine.admit(request("parked", prompt(40), 4), hold=True)
    run(engine)
    monkeypatch.setattr(engine._demand, "promised", lambda _: 0)
    monkeypatch.setattr(engine._demand, "of", lambda *_: 0)
    engine.admit(request("needy", prompt(30, 1), 4))
    results = run(engine)
    assert [left.request_id for result in results for left in result.preempted] == ["needy"]
    assert engine.take_tail("parked") is None
    engine.release("parked")
    assert engine.free_blocks == 8


# Prompts: budget, order, sharing


def test_prompts_go_by_priority_and_none_starves(make_engine: EngineFactory) -> None:
    engine = make_engine(**SMALL)
    engine.admit(request("decoding", prompt(8), 100))
    engine.step()
    engine.admit(request("first", prompt(100, 1), 2))
    engine.admit(replace(request("urgent", prompt(60, 2), 2), priority=-1))
    order: list[str] = []
    for _ in range(20):
        order += [event.request_id for event in engine.step().events if event.request_id != "decoding"]
    assert order == ["urgent", "urgent", "first", "first"]


@pytest.mark.parametrize("others", [1, 4])
@pytest.mark.parametrize("length", [8, 9, 30, 64, 65])
def test_the_same_prompt_is_computed_once(
    length: int, others: int, make_engine: EngineFactory, seen_logits: Logits
) -> None:
    """All at once; of the others, the last token alone is computed, and the partial block is copied."""
    asked = [request(f"r{i}", prompt(length), 12, temperature=0.9, seed=i) for i in range(1 + others)]
    expected = alone(make_engine, *asked)
    logits = dict(seen_logits)
    seen_logits.clear()
    engine = make_engine(**SMALL)
    for one in asked:
        engine.admit(one)
    results = run(engine)
    assert [tuple(tokens_of(results, one.request_id)) for one in asked] == expected
    assert all(torch.equal(seen_logits[key], logits[key]) for key in logits)
    assert computed(results) == length + others + (1 + others) * 11
    for one in asked:
        told = [b.chain_index for r in results for b in r.blocks if b.request_id == one.request_id]
        assert told == [*range((length + 11) // BLOCK)], "a shared block is complete for each"
    assert engine.free_blocks == 64


def test_a_later_request_takes_over_what_a_running_one_has(make_engine: EngineFactory) -> None:
    common = prompt(40)
    first, later = request("first", common + prompt(5, 1), 30), request("later", common + prompt(9, 2), 6)
    expected = alone(make_engine, first, later)
    engine = make_engine(**SMALL)
    engine.admit(first)
    for _ in range(6):
        engine.step()
    engine.admit(later)
    before = engine.free_blocks
    result = engine.step()
    assert result.tokens_computed == 1 + 9
    assert before - engine.free_blocks == 2, "five of its seven blocks are the first one's"
    engine.check_integrity()
    assert tuple(tokens_of([result, *run(engine)], "later")) == expected[1]


def test_a_shared_block_stays_when_the_first_one_goes(make_engine: EngineFactory) -> None:
    asked = [request(f"r{i}", prompt(30), 12, temperature=0.9, seed=i) for i in range(3)]
    expected = alone(make_engine, *asked)
    engine = make_engine(**SMALL)
    for one in asked:
        engine.admit(one)
    results = [engine.step() for _ in range(4)]
    engine.release("r0")
    engine.check_integrity()
    results += run(engine)
    assert tuple(tokens_of(results, "r1")) == expected[1]
    assert tuple(tokens_of(results, "r2")) == expected[2]
    assert engine.free_blocks == 64


def test_where_a_shared_block_must_be_copied_it_is_enough_that_one_of_two_leaves(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nobody shares it any more, and the other needs no copy."""
    engine = make_engine(block_tokens=8, step_tokens_max=24, running_max=8, pool_blocks=3, max_model_len=24)
    monkeypatch.setattr(engine._demand, "promised", lambda _: 0)
    monkeypatch.setattr(engine._demand, "of", lambda *_: 0)
    for name in "ab":
        engine.admit(request(name, prompt(21), 3))
        result = engine.step()
    assert [left.request_id for left in result.preempted] == ["b"]
    assert [event.request_id for event in result.events] == ["a"]


def test_tenants_share_nothing(make_engine: EngineFactory) -> None:
    engine = make_engine(**SMALL)
    for tenant in ("one", "other"):
        engine.admit(replace(request(tenant, prompt(40), 2), tenant=tenant))
    assert computed(run(engine)) == 2 * 41


def test_what_was_onboarded_is_its_owners_alone(make_engine: EngineFactory) -> None:
    """It may be lossy or stale: its owner knows, and nobody else would."""
    engine: Engine = make_engine(**SMALL)
    engine.admit(request("a", prompt(24), 2))
    payloads = [block.payload for result in run(engine) for block in result.blocks]
    engine.admit(request("onboarded", prompt(40), 2), blocks=payloads[:2])
    engine.step()
    engine.admit(request("computes", prompt(40), 2))
    assert computed(run(engine)) == 41 + 1


def test_slots_that_a_peer_takes_behind_the_plan_cost_a_step_and_no_sequence(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks pulled from another worker come into free slots from another thread."""
    expected = alone(make_engine, request("a", prompt(20), 4))
    engine = make_engine(**SMALL, pool_blocks=8)
    engine.admit(request("a", prompt(20), 4))
    assert engine.shortage() is None
    arrived = engine.slots.take_kept(8)
    assert engine.step() == StepResult()
    for slot in arrived:
        engine.slots.drop(slot)
    assert [tuple(tokens_of(run(engine), "a"))] == expected


def test_nothing_is_taken_over_from_a_damaged_sequence(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(**SMALL)
    engine.admit(request("damaged", prompt(24), 4), hold=True)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", staticmethod(lambda logits, *_: [Drawn(NO_TOKEN)] * len(logits)))
        run(engine)
    engine.admit(request("sound", prompt(24), 2))
    assert computed(run(engine)) == 25
