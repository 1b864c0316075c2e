"""Promise 3 with weights that change under load: no token, block or hit is of two epochs unsaid."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.errors import ModelError
from engine.types import FinishReason, GenerationRequest, UpdateMode
from engine.updating import load_beside
from kvstore.errors import ConfigError, DeadlineExceeded, EpochConflict, Unavailable
from kvstore.nouns import Epoch, WeightsDigest
from prefill.role import PrefillRole
from tests.role_parts import ENGINE, WAIT_S, later, make_worker, over, prompt, request, shard
from tests.tiny_model import make_tiny_model
from tests.weights_parts import (
    Load,
    Oracle,
    assert_drawn_by_fresh_engines,
    assert_whole,
    inspect,
    prepare_both,
    roles_of,
    settled,
    stores_of,
    under_load,
    update_both,
)

DRAIN, ABORT, KEEP, RECOMPUTE = UpdateMode


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    root = tmp_path_factory.mktemp("epochs")
    return Oracle([make_tiny_model(root / str(seed), seed) for seed in range(3)])


def wave(name: str, n: int = 6, max_tokens: int = 24) -> list[GenerationRequest]:
    """Prompts that share their first blocks, drawn greedily and at random."""
    return [
        request(
            prompt(19) + prompt(3 + 7 * i, i),
            name=f"{name}{i}",
            max_tokens=max_tokens,
            temperature=0.7 * (i % 2),
            seed=i,
        )
        for i in range(n)
    ]


async def assert_clean(load: Load, oracle: Oracle) -> None:
    """Nothing tainted is stored, and nothing is held by anybody."""
    await settled(load.pair)
    await inspect(oracle, stores_of(load.pair), load.texts)
    await load.pair.assert_nothing_held()


@pytest.mark.parametrize("prefill_first", [True, False], ids=["prefill first", "decode first"])
@pytest.mark.parametrize("mode", [DRAIN, RECOMPUTE])
async def test_no_request_is_lost_and_each_token_is_its_epochs_own(
    oracle: Oracle, mode: UpdateMode, prefill_first: bool
) -> None:
    async with under_load(oracle) as load:
        await prepare_both(load, oracle, 2)
        load.begin(*wave("a"))
        await load.until_said(40)
        updating = asyncio.create_task(update_both(load, oracle, 2, mode, prefill_first=prefill_first))
        load.begin(*wave("b", 3))
        await updating
        load.begin(*wave("c", 3))
        await load.over()
        assert_whole(load)
        for name, said in load.said.items():
            assert_drawn_by_fresh_engines(oracle, load.asked[name], said)
        changed = [name for name, said in load.said.items() if len({e.epochs for e in said}) > 1]
        assert bool(changed) == (mode is RECOMPUTE)
        assert all({e.epochs for e in load.said[f"c{i}"]} == {(2,)} for i in range(3))
        await assert_clean(load, oracle)


async def test_keep_goes_on_over_old_kv_and_shares_none_of_it(oracle: Oracle) -> None:
    """As an engine does whose weights were changed between the same two tokens."""
    async with under_load(oracle) as load:
        await prepare_both(load, oracle, 2)
        load.begin(*wave("a", 4))
        await load.until_said(60)
        await update_both(load, oracle, 2, KEEP, prefill_first=False)
        load.begin(*wave("b", 3))
        await load.over()
        assert_whole(load)
        mixed = 0
        for name, said in load.said.items():
            asked, output = load.asked[name], load.output(name)
            over_both = [event for event in said if event.epochs == (1, 2)]
            mixed += bool(over_both)
            if not over_both:
                assert_drawn_by_fresh_engines(oracle, asked, said)
                continue
            assert over_both == said[-len(over_both) :], "a sequence never gets rid of old KV"
            before = output[: -len(over_both)]
            assert oracle.tokens(1, asked, [], len(before)) == before
            assert changed_between(oracle, asked, len(before)) == output
        assert mixed, "nobody was caught in the middle"
        counters = await load.pair.decode.counters()
        assert counters["publish:withheld"] > 0
        await assert_clean(load, oracle)


def changed_between(oracle: Oracle, asked: GenerationRequest, after: int) -> tuple[int, ...]:
    """What one engine says whose weights change from epoch 1 to 2 after so many tokens, over its old KV."""
    folder = Path(oracle.path(1))
    engine, output = Engine.load(folder, ENGINE), list[int]()
    engine.admit(asked)
    while len(output) < after:
        output += [event.token_id for event in engine.step().events]
    engine.swap_weights(load_beside(engine, Path(oracle.path(2))))
    while engine.has_work():
        output += [event.token_id for event in engine.step().events]
    return tuple(output)


async def test_abort_ends_what_runs_and_says_why(oracle: Oracle) -> None:
    async with under_load(oracle) as load:
        await prepare_both(load, oracle, 2)
        load.begin(*wave("a", 4, max_tokens=200))
        await load.until_said(40)
        await update_both(load, oracle, 2, ABORT, prefill_first=False)
        load.begin(*wave("b", 3))
        await load.over()
        for i in range(4):
            said = load.said[f"a{i}"]
            assert_drawn_by_fresh_engines(oracle, load.asked[f"a{i}"], said)
            assert {event.epochs for event in said} == {(1,)}
            assert said[-1].finish is FinishReason.ABORT
            assert said[-1].error is not None
            assert "weights changed to epoch 2" in said[-1].error
            assert len(said) < 200
        for i in range(3):
            assert_drawn_by_fresh_engines(oracle, load.asked[f"b{i}"], load.said[f"b{i}"])
        await assert_clean(load, oracle)


async def test_seventeen_updates_in_a_row_without_a_stale_hit(oracle: Oracle) -> None:
    """The same prompts under each epoch, three sets of weights taking turns: what comes from a cache is of
    the epoch that asks, or it would be other tokens."""
    modes = [DRAIN, RECOMPUTE, KEEP]
    async with under_load(oracle) as load:
        for epoch in range(1, 19):
            if epoch > 1:
                mode = modes[epoch % 3]
                await update_both(load, oracle, epoch, mode, prefill_first=epoch % 2 == 0)
            asked = wave(f"e{epoch}.", 2, max_tokens=9)
            load.begin(*asked)
            await load.over()
            again = wave(f"again{epoch}.", 1, max_tokens=9)
            first = await load.pair.prefill.prefill(again[0])
            assert first.stats.cached_tokens == 16, "and it does hit"
            assert first.epoch == Epoch(epoch, oracle.engine(epoch).weights_digest)
            await load.pair.prefill.abort(again[0].request_id, 1)
            for one in asked:
                said = load.said[one.request_id]
                assert {event.epochs for event in said} == {(epoch,)}
                assert_drawn_by_fresh_engines(oracle, one, said)
        assert_whole(load)
        await assert_clean(load, oracle)


async def test_a_parked_handoff_survives_the_update(oracle: Oracle) -> None:
    """It stays a whole handoff of its epoch. Decode of the new one computes it from its tokens."""
    async with under_load(oracle) as load:
        for mode in (RECOMPUTE, KEEP):
            number = load.pair.workers[0].store.epoch.number
            asked = request(prompt(43), name=f"parked {mode.value}", max_tokens=20)
            first = await load.pair.prefill.prefill(asked)
            await load.pair.prefill.update_weights(oracle.path(number + 1), number + 1, mode, WAIT_S)
            handoff = await load.pair.prefill.handoff(asked.request_id, 1)
            assert handoff is not None
            assert handoff.epoch.number == number
            assert first.event.epochs == (number,)
            await load.pair.decode.update_weights(oracle.path(number + 1), number + 1, mode, WAIT_S)
            load.asked[asked.request_id], load.said[asked.request_id] = asked, [first.event]
            output = await load.pair.decode_all(handoff)
            assert output[1:] == oracle.tokens(number + 1, asked, output[:1], 19)
        assert (await load.pair.decode.counters())["decode:begun_again"] == 2
        await settled(load.pair)
        await load.pair.assert_nothing_held()


async def test_a_handoff_of_weights_that_were_drained_or_aborted_is_refused(oracle: Oracle) -> None:
    async with under_load(oracle) as load:
        for number, mode in enumerate((ABORT, DRAIN), 1):
            asked = request(prompt(43), name=f"late {mode.value}", max_tokens=20)
            await load.pair.prefill.prefill(asked)
            handoff = await load.pair.prefill.handoff(asked.request_id, 1)
            assert handoff is not None
            await update_both(load, oracle, number + 1, mode)
            with pytest.raises(EpochConflict, match=f"of epoch {number}, this worker"):
                await load.pair.decode.start(handoff)
        await settled(load.pair)
        await load.pair.assert_nothing_held()


async def test_drain_that_takes_too_long_leaves_everything_as_it_was(oracle: Oracle) -> None:
    async with under_load(oracle) as load:
        await prepare_both(load, oracle, 2)
        load.begin(*wave("a", 2, max_tokens=150))
        await load.until_said(6)
        before = load.pair.workers[1].info
        with pytest.raises(DeadlineExceeded, match="the old weights stay"):
            await load.pair.decode.update_weights(oracle.path(2), 2, DRAIN, 0.01)
        assert load.pair.workers[1].info == before
        await load.over()
        assert_whole(load)
        assert {event.epochs for said in load.said.values() for event in said} == {(1,)}
        await assert_clean(load, oracle)


async def test_new_requests_wait_while_prefill_drains(oracle: Oracle) -> None:
    async with under_load(oracle) as load:
        parked = request(prompt(20), name="parked")
        await load.pair.prefill.prefill(parked)
        role = load.pair.prefill
        updating = asyncio.create_task(role.update_weights(oracle.path(2), 2, DRAIN, WAIT_S))
        while role._door.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0)
        waiting = asyncio.create_task(role.prefill(request(prompt(20), name="new")))
        with pytest.raises(Unavailable, match="being changed already"):
            await role.update_weights(oracle.path(3), 3, RECOMPUTE, WAIT_S)
        assert not waiting.done()
        handoff = await role.handoff("parked", 1)
        assert handoff is not None
        assert handoff.epoch.number == 1
        assert (await updating).epoch_number == 2
        first = await waiting
        assert first.stats.epochs == (2,)
        assert first.event.token_id == oracle.tokens(2, request(prompt(20)), [], 1)[0]
        await role.abort("new", 1)
        await load.pair.workers[1].store.session("default")
        load.pair.workers[1].store.release_for("default", handoff.leases)
        await settled(load.pair)
        await load.pair.assert_nothing_held()


async def test_a_prefill_that_is_aborted_may_be_sent_again(oracle: Oracle) -> None:
    async with under_load(oracle) as load:
        role = load.pair.prefill
        await prepare_both(load, oracle, 2)
        await role.prefill(request(prompt(20), name="parked"))
        long = request(prompt(430), name="long")
        running = asyncio.create_task(role.prefill(long))
        while not load.pair.workers[0].loop.holds("long", 1, running=True):  # noqa: ASYNC110
            await asyncio.sleep(0)
        await role.update_weights(oracle.path(2), 2, ABORT, WAIT_S)
        with pytest.raises(Unavailable, match="send it again"):
            await running
        first = await role.prefill(later(long))
        assert first.event.token_id == oracle.tokens(2, long, [], 1)[0]
        await role.abort("long", 2)
        await settled(load.pair)
        await load.pair.assert_nothing_held()


def broken(kind: str, path: Path) -> Path:
    """A folder that must not be taken."""
    if kind == "other shape":
        return make_tiny_model(path, num_hidden_layers=3)
    if kind == "too short":
        return make_tiny_model(path, max_position_embeddings=128)
    if kind == "missing":
        return path / "nowhere"
    make_tiny_model(path, 7)
    if kind == "truncated":
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "other tokenizer":
        settings = path / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace("assistant", "the assistant"))
    return path


async def test_an_update_that_fails_leaves_everything_as_it_was(oracle: Oracle, tmp_path: Path) -> None:
    async with under_load(oracle) as load:
        load.begin(*wave("a", 3))
        await load.until_said(20)
        for kind in ("other shape", "too short", "missing", "truncated", "other tokenizer"):
            path = broken(kind, tmp_path / kind)
            for role, worker in zip(roles_of(load.pair), load.pair.workers, strict=True):
                before = worker.info
                with pytest.raises((ConfigError, ModelError)):
                    await role.update_weights(str(path), 2, RECOMPUTE, WAIT_S)
                assert worker.info == before, kind
                assert worker.store.epoch.number == 1, kind
        load.begin(*wave("b", 2))
        await load.over()
        assert_whole(load)
        for name, said in load.said.items():
            assert {event.epochs for event in said} == {(1,)}
            assert_drawn_by_fresh_engines(oracle, load.asked[name], said)
        await assert_clean(load, oracle)


async def test_epochs_never_go_back_and_never_mean_two_sets_of_weights(oracle: Oracle) -> None:
    async with under_load(oracle) as load:
        role = load.pair.prefill
        with pytest.raises(ConfigError, match="never go back"):
            await role.update_weights(oracle.path(2), 0, KEEP, WAIT_S)
        with pytest.raises(EpochConflict, match="take the next number"):
            await role.update_weights(oracle.path(2), 1, KEEP, WAIT_S)
        assert (await role.update_weights(oracle.path(1), 1, KEEP, WAIT_S)).epoch_number == 1, "asked twice"
        # A number that the store knows as other weights'.
        await role.prefill(request(prompt(20)))
        other = Epoch(5, WeightsDigest(b"other weights..."))
        for store in load.pair.shards:
            await store.register_epoch("tiny", other, timeout_s=WAIT_S)
        with pytest.raises(EpochConflict, match="is bound to weights"):
            await role.update_weights(oracle.path(2), 5, KEEP, WAIT_S)
        assert load.pair.workers[0].info.epoch_number == 1
        await role.abort("r", 1)
        await settled(load.pair)
        await load.pair.assert_nothing_held()


async def test_old_blocks_in_the_pool_go_first_and_are_lent_to_nobody(oracle: Oracle) -> None:
    async with under_load(oracle) as load:
        load.begin(*wave("a", 3))
        await load.over()
        worker = load.pair.workers[0]
        assert worker.edge is not None
        old = len(worker.edge.tier.kept_slots())
        await update_both(load, oracle, 2, DRAIN)
        assert len(worker.edge.tier.kept_slots()) == old, "O(1): nothing is flushed"
        load.begin(*wave("b", 3))
        await load.over()
        assert worker.edge.make_room(len(worker.edge.slots) - 2, None)
        rows = [row.epoch.number for row in worker.edge.driver.core.index.rows()]
        assert rows
        assert set(rows) == {2}
        await assert_clean(load, oracle)


async def test_the_store_need_not_be_there(oracle: Oracle) -> None:
    """Weights change without it; the epoch is registered when it comes."""
    driver = shard()
    worker, _ = make_worker(Path(oracle.path(1)), over([driver]))
    role = PrefillRole(worker)
    await role.update_weights(oracle.path(2), 2, DRAIN, WAIT_S)
    first = await role.prefill(request(prompt(20)))
    assert first.event.token_id == oracle.tokens(2, request(prompt(20)), [], 1)[0]
    known = await driver.epochs("tiny", timeout_s=WAIT_S)
    assert known.registered == (Epoch(2, oracle.engine(2).weights_digest),)
    await role.close()
