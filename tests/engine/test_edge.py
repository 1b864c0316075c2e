"""Promises of the pool's cache at the engine: bit-equal in place, never written, leased, conserved."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from engine.edge import LEASE_S, EdgeShard
from engine.engine import Engine
from engine.local_run import LocalRun
from engine.types import GenerationRequest, Shortage
from kvstore.clock import ManualClock
from kvstore.core.shrinking import evict_idle
from kvstore.core.versions import State
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage
from kvstore.nouns import Epoch, NamespaceSpec, Quality
from tests.engine.conftest import EngineFactory, Logits, prompt, request, run, tokens_of
from tests.engine.edge_source import BLOCKS, NAMESPACE, chain_of, edge_of, fill, payload_of

SIZE = 8


def edge_over(engine: Engine, clock: ManualClock | None = None) -> EdgeShard:
    spec = NamespaceSpec("tiny", engine.layout, engine.tokenizer.digest)
    epoch = Epoch(1, engine.weights_digest)
    edge = EdgeShard("w", spec, epoch, engine.pool, engine.slots, clock or ManualClock())
    edge.open(NAMESPACE, "default")
    return edge


def lend(edge: EdgeShard, tokens: tuple[int, ...]) -> LocalRun:
    chain = KeyChain(NAMESPACE, SIZE)
    chain.extend(tokens)
    return edge.lend(NAMESPACE, "default", chain, (len(tokens) - 1) // SIZE, "test")


def generate(edge: EdgeShard, engine: Engine, asked: GenerationRequest) -> tuple[list[int], int]:
    """As the worker loop does it, in one thread; the tokens, and how many blocks were lent."""
    local = lend(edge, asked.prompt_ids)
    edge.make_room(engine.blocks_needed(asked) - len(local.slots), local)
    chain_end = len(asked.prompt_ids) // SIZE
    lent = len(local.blocks)
    local.will_keep(local.over(Lineage(edge.epoch)), ())
    local.admitted(engine.admit(asked, lent=local.slots, keep=True))
    results = run(engine)
    for result in results:
        for block in result.blocks:
            if (
                block.request_id == asked.request_id and block.chain_index < chain_end
            ):  # this chain knows the prompt's blocks only
                local.filled(block.chain_index, block.slot)
    engine.release(asked.request_id)
    local.end()
    check(edge, engine)
    return tokens_of(results, asked.request_id), lent


def check(edge: EdgeShard, engine: Engine) -> None:
    edge.check_integrity()
    engine.check_integrity(edge.lent_slots(), edge.tier.kept_slots())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_the_same_bits_with_lent_blocks(
    make_engine: EngineFactory, seen_logits: Logits, dtype: str
) -> None:
    """Promise: over blocks in place, in one run of slots or in many, next to others, bit by bit."""
    plain = make_engine(block_tokens=SIZE, dtype=dtype)
    asked = [request(f"r{i}", prompt(300)[: 90 + 70 * i] + prompt(9, i + 1), 12, seed=i) for i in range(4)]
    expected: list[dict[int, torch.Tensor]] = []
    for one in asked:
        seen_logits.clear()
        plain.admit(one)
        run(plain)
        expected.append({at: row for (_, at), row in seen_logits.items()})
    engine = make_engine(block_tokens=SIZE, dtype=dtype, pool_blocks=80)
    edge = edge_over(engine)
    # Scatter: a sequence in the way of every second piece.
    for i in range(6):
        engine.admit(request(f"wall-{i}", prompt(20, 50 + i), 1), hold=True)
        generate(edge, engine, request(f"warm-{i}", prompt(300)[: 40 + 40 * i], 1))
    pieces = []
    for one, logits in zip(asked, expected, strict=True):
        seen_logits.clear()
        local = lend(edge, one.prompt_ids)
        pieces.append(sum(1 for a, b in zip(local.slots, local.slots[1:], strict=False) if b != a + 1) + 1)
        local.end()
        _, lent = generate(edge, engine, one)
        assert lent >= 88 // SIZE
        seen = {at: row for (seed, at), row in seen_logits.items() if seed == one.sampling.seed}
        for at, row in logits.items():
            assert torch.equal(seen[at], row), f"position {at}"
    assert max(pieces) > 1, "every prefix lay in one piece: nothing was scattered"


def test_a_kept_block_is_not_written_by_who_shares_it_and_its_last_token_is_not_recomputed_there(
    make_engine: EngineFactory,
) -> None:
    engine = make_engine(block_tokens=SIZE)
    edge = edge_over(engine)
    generate(edge, engine, request("a", prompt(48), 4))
    before = {slot: engine.pool.read_block(slot).tobytes() for slot in edge.tier.kept_slots()}
    assert len(before) == 6
    for i in range(3):  # word for word the same: all but the last block is lent, and that one computed anew
        _, lent = generate(edge, engine, request(f"again-{i}", prompt(48), 20))
        assert lent == 5
    assert {slot: engine.pool.read_block(slot).tobytes() for slot in before} == before
    local = lend(edge, (*prompt(48), 5))
    assert len(local.slots) == 6
    with pytest.raises(ValueError, match="last block lent"):
        engine.admit(request("bad", prompt(48), 4), lent=local.slots)
    local.end()
    check(edge, engine)


def test_two_that_compute_the_same_keep_one_and_the_other_copy_goes(make_engine: EngineFactory) -> None:
    engine = make_engine(block_tokens=SIZE)
    edge = edge_over(engine)
    runs = []
    for name in "ab":
        local = lend(edge, prompt(40))
        assert local.slots == []
        local.will_keep(Lineage(edge.epoch), ())
        local.admitted(engine.admit(request(name, prompt(40), 4), keep=True))
        engine._sequences[name].shares = False  # in one batch they would compute it once
        runs.append(local)
    for result in run(engine):
        for block in result.blocks:
            runs["ab".index(block.request_id)].filled(block.chain_index, block.slot)
    check(edge, engine)
    for name, local in zip("ab", runs, strict=True):
        engine.release(name)
        local.end()
        idle = edge.driver.core.index.rooms.idle_versions
        assert idle == 5, "the copy that lost must not hold the one that won: two slots for one block"
    check(edge, engine)
    assert len(edge.tier.kept_slots()) == 5
    assert engine.free_blocks == 64 - 5


def test_an_ended_sequence_holds_its_slots_until_released_when_asked_to(make_engine: EngineFactory) -> None:
    engine = make_engine(block_tokens=SIZE)
    engine.admit(request("a", prompt(20), 3), keep=True)
    run(engine)
    assert (engine.running, engine.has_work(), engine.free_blocks) == (0, False, 61)
    engine.release("a")
    assert engine.free_blocks == 64


def test_slots_of_a_conversation_stay_adjacent(make_engine: EngineFactory) -> None:
    """What a turn is lent and what it takes besides is one run where the pool allows: read as one view."""
    engine = make_engine(block_tokens=SIZE)
    edge = edge_over(engine)
    spoken = prompt(40)
    for turn in range(3):
        local = lend(edge, spoken)
        engine.admit(request("probe", spoken, 4), lent=local.slots)
        engine.step()
        slots = engine._sequences["probe"].slots
        assert len(slots) == -(-len(spoken) // SIZE)
        assert slots == tuple(range(slots[0], slots[0] + len(slots)))
        engine.release("probe")
        local.end()
        generate(edge, engine, request(f"turn {turn}", spoken, 4))
        spoken += prompt(24, turn + 1)


# -- leases --------------------------------------------------------------------------------------------


def test_leases_of_what_runs_are_renewed_and_those_of_what_ended_are_gone() -> None:
    clock = ManualClock()
    edge, pool = edge_of("w", 30, clock=clock)
    chain = fill(edge, pool, BLOCKS)
    local = edge.lend(NAMESPACE, "default", chain, 10, "running")
    local.admitted(tuple(local.slots))
    for _ in range(int(3 * LEASE_S)):
        clock.advance(1.0)
        edge.driver.reap()
        if clock.now() % (LEASE_S / 3) < 1:
            edge.renew()
    assert edge.counters["edge:leases_lost"] == 0
    assert not edge.make_room(30, None), "lent blocks are not idle"
    local.end()
    assert edge.make_room(30, None)
    assert edge.driver.core.leases == 0


def test_a_lost_lease_costs_the_cache_a_block_and_no_reader_its_bytes() -> None:
    """Even if nobody renews: the block goes, its slot does not, until who reads it lets go."""
    clock = ManualClock()
    edge, pool = edge_of("w", BLOCKS, clock=clock)
    chain = fill(edge, pool, BLOCKS)
    local = edge.lend(NAMESPACE, "default", chain, 10, "running")
    local.admitted(tuple(local.slots))
    for _ in range(int(LEASE_S) + 2):
        clock.advance(1.0)
        edge.driver.reap()
    edge.make_room(10, None)
    assert edge.driver.core.index.rooms.idle_versions == 10
    evict_idle(edge.driver.core, 10)
    edge.driver.reap()
    taken = edge.slots.allocate(edge.slots.n_free, "other")
    assert not {*taken} & {*local.slots}
    for key, slot in zip(chain.keys, local.slots, strict=False):
        assert pool.read_block(slot).tobytes() == payload_of(key).tobytes()
    edge.renew()
    assert edge.counters["edge:leases_lost"] == 1
    local.end()
    edge.slots.give_back(taken)
    edge.slots.check_integrity({}, ())


def test_recalled_loans_are_those_who_came_last_and_only_as_many_as_needed() -> None:
    edge, pool = edge_of("w", 30)
    chains = [fill(edge, pool, 8, tokens_seed=seed) for seed in range(3)]
    waiting = [edge.lend(NAMESPACE, "default", chain, 8, "waits") for chain in chains]
    assert edge.slots.n_free == 6
    assert not edge.make_room(31, None), "not even all of them would do"
    assert [local.recalled for local in waiting] == [False] * 3
    assert edge.make_room(12, waiting[2])
    assert [local.recalled for local in waiting] == [False, True, False]
    for local in waiting:
        local.abandon()
    assert edge.driver.core.leases == 0
    edge.slots.check_integrity({}, edge.tier.kept_slots())


def test_a_step_recalls_even_too_little_before_a_sequence_leaves() -> None:
    edge, pool = edge_of("w", 30)
    waiting = [
        edge.lend(NAMESPACE, "default", fill(edge, pool, 8, tokens_seed=i), 8, "waits") for i in (1, 2)
    ]
    edge.give_room(Shortage(40, None), None)
    assert [local.recalled for local in waiting] == [False, False], "nobody would have left"
    edge.give_room(Shortage(40, (0, 1)), waiting[0])
    assert [local.recalled for local in waiting] == [False, True]
    assert edge.slots.n_free == 22
    for local in waiting:
        local.abandon()
    edge.slots.check_integrity({}, edge.tier.kept_slots())


# -- lineage and purge ---------------------------------------------------------------------------------


def test_a_better_block_takes_the_place_of_a_lesser_one() -> None:
    edge, pool = edge_of("w", 30)
    fill(edge, pool, 5, Quality.INT8)
    fill(edge, pool, 5)
    live = [v.quality for v in edge.driver.core.index.rows() if v.state is State.LIVE]
    assert live == [Quality.LOSSLESS] * 5
    assert len(edge.tier.kept_slots()) == 5
    fill(edge, pool, 5, Quality.INT8)
    assert Counter(v.quality for v in edge.driver.core.index.rows()) == {Quality.LOSSLESS: 5}


def test_a_lossless_worker_is_not_lent_what_it_keeps_of_lesser_quality() -> None:
    """Kept because a handoff's floor was lower; a snapshot at lossless sees none of it."""
    edge, pool = edge_of("w", 30)
    chain = fill(edge, pool, 5, Quality.INT8)
    local = edge.lend(NAMESPACE, "default", chain, 5, "lossless")
    assert local.blocks == ()
    local.end()
    edge.min_quality = Quality.INT8
    local = edge.lend(NAMESPACE, "default", chain, 5, "lossy")
    assert {block.quality for block in local.blocks} == {Quality.INT8}
    local.end()


def test_an_onboarded_block_of_another_epoch_is_not_kept() -> None:
    edge, pool = edge_of("w", 30)
    chain = chain_of(4)
    local = edge.lend(NAMESPACE, "default", chain, 0, "test")
    slots = edge.slots.allocate(4, "test")
    for key, slot in zip(chain.keys, slots, strict=True):
        pool.write_block(slot, payload_of(key))
    old = Epoch(0, edge.epoch.weights_digest)
    own = edge.epoch
    origins = [(own, Quality.LOSSLESS), (old, Quality.LOSSLESS), (own, Quality.INT8)]
    local.will_keep(Lineage(own, foreign=True), origins)
    local.admitted(tuple(slots))
    local.filled(3, slots[3])  # computed over a stale one: nobody else's
    kept = sorted((v.chain_index, v.quality) for v in edge.driver.core.index.rows())
    assert kept == [(0, Quality.LOSSLESS), (2, Quality.INT8)]
    edge.slots.give_back(slots)
    local.end()


async def test_what_was_deleted_is_not_lent_and_what_runs_goes_on() -> None:
    edge, pool = edge_of("w", 30)
    chain = fill(edge, pool, 8)
    running = edge.lend(NAMESPACE, "default", chain, 8, "running")
    await edge.forget(NAMESPACE)
    late = edge.lend(NAMESPACE, "default", chain, 8, "late")
    assert late.blocks == ()
    for key, slot in zip(chain.keys, running.slots, strict=False):
        assert pool.read_block(slot).tobytes() == payload_of(key).tobytes()
    running.end()
    late.end()
    assert edge.slots.n_free == 30
    edge.check_integrity()
