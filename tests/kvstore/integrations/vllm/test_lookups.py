"""Look-ups and their leases: renewed while they are held, released on every way out, or said to be lost."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvstore.clock import ManualClock
from kvstore.errors import Unavailable
from kvstore.integrations.vllm.lookups import Lookup, Question
from kvstore.nouns import Tier
from kvstore.session import StoreSession
from tests.kvstore.integrations.vllm.engine import FakeEngine, Output
from tests.kvstore.integrations.vllm.parts import PROMPT, counted, engine_of, serve, setup_of
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore, on_loop

TOKENS = np.array(PROMPT, "<u4")


class TickingClock(ManualClock):
    """Whoever looks is half a second later."""

    def now(self) -> float:
        self.advance(0.5)
        return super().now()


def looked_up(engine: FakeEngine, **question: object) -> Lookup:
    lookup = engine.scheduling.lookups.begin(Question(TOKENS, **question))  # type: ignore[arg-type]
    assert engine.side.settle()
    assert lookup.done
    return lookup


@pytest.fixture
def engine(store: LocalStore) -> FakeEngine:
    one = engine_of(store)
    serve(one, PROMPT)
    return one


def test_a_hit_is_held_until_it_is_dropped_and_dropping_twice_is_once(
    store: LocalStore, engine: FakeEngine
) -> None:
    lookup = looked_up(engine)
    assert lookup.hit is not None
    assert (lookup.hit.tokens, engine.scheduling.lookups.held) == (36, 1)
    assert store.leases() > 0
    for _ in range(2):
        engine.scheduling.lookups.drop(lookup)
    assert engine.side.settle()
    assert (store.leases(), engine.scheduling.lookups.held) == (0, 0)
    engine.close()


def test_what_only_counts_is_not_held(store: LocalStore, engine: FakeEngine) -> None:
    lookup = looked_up(engine, hold=False)
    assert (lookup.hit, lookup.found, store.leases()) == (None, 36, 0)
    engine.close()


def test_a_lease_that_is_gone_is_a_hit_of_nothing(store: LocalStore, engine: FakeEngine) -> None:
    request = FakeRequest("again", list(PROMPT))
    engine.cached.clear()
    engine.cached_as.clear()
    engine.add(request)
    engine.side.settle()
    tracked = engine.scheduling._requests["again"]
    assert tracked.lookup is not None
    hit = tracked.lookup.hit
    assert hit is not None
    on_loop(engine.scheduling.lookups.renew())
    assert engine.scheduling.lookups.held == 1, "renewed"
    on_loop(hit.session.release(tuple(lease for of_rank in hit.leases for lease in of_rank)))
    on_loop(engine.scheduling.lookups.renew())
    assert engine.scheduling.lookups.held == 0
    engine.run()
    assert request.loaded == 0
    assert counted(engine)["leases_lost"] == 1
    engine.close()


def test_a_step_without_work_leaves_the_interpreter_to_a_lookup(
    store: LocalStore, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.integrations.vllm.scheduling.IDLE_S", 20.0)
    request = FakeRequest("again", list(PROMPT))
    engine.scheduling.on_new_request(request)
    engine.scheduling.plan(Output())  # waits until it has answered, not longer
    tracked = engine.scheduling._requests["again"]
    assert tracked.lookup is not None
    assert tracked.lookup.done
    engine.scheduling.plan(Output())  # nothing to wait for
    engine.scheduling.finished(request)
    engine.close()


def test_a_handoff_is_waited_for(store: LocalStore) -> None:
    decode = engine_of(store)
    lookup = decode.scheduling.lookups.begin(Question(TOKENS, at_least=36, wait_s=20.0))
    prefill = engine_of(store)
    serve(prefill, PROMPT, max_tokens=1)
    assert decode.side.settle()
    assert lookup.found == 36
    decode.scheduling.lookups.drop(lookup)
    prefill.close()
    decode.close()


def test_a_handoff_that_never_comes_is_computed(store: LocalStore) -> None:
    decode = engine_of(store, clock=TickingClock())
    decode.side.settle()
    lookup = looked_up(decode, at_least=36, wait_s=3.0)
    assert lookup.hit is None
    assert counted(decode)["handoffs_incomplete"] == 1
    decode.close()


def test_prefill_tells_decode_and_its_blocks_stay_for_it(store: LocalStore) -> None:
    """As through a proxy: what the producer answers is what the consumer is given."""
    prefill = engine_of(store, setup=setup_of(loads=False))
    serve(prefill, PROMPT, "p", max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    told = prefill.finished["p"]
    assert told is not None
    assert (told["do_remote_prefill"], told["kvstrata_tokens"]) == (True, 36)
    assert all(save.pin_for_s == 30.0 for save in prefill.workers.saves)
    decode = engine_of(store, setup=setup_of(saves=False))
    assert serve(decode, PROMPT, "d", kv_transfer_params=told).loaded == 36
    other = engine_of(store, b"9" * 16)
    other.side.settle()
    stranger = serve(other, PROMPT, "x", kv_transfer_params=told)
    assert stranger.loaded == 0, "of other weights: neither waited for nor used"
    for each in (prefill, decode, other):
        each.close()


def test_what_prefill_found_stays_pinned_for_decode(store: LocalStore) -> None:
    serve(first := engine_of(store), PROMPT, "a")
    prefill = engine_of(store, setup=setup_of(loads=False))
    serve(prefill, PROMPT, "p", max_tokens=1, kv_transfer_params={"do_remote_decode": True})
    prefill.side.settle()
    assert prefill.workers.saves == []
    assert store.leases() > 0, "until it expires"
    store.expire(29.0)
    assert store.leases() > 0
    store.expire(2.0)
    assert store.leases() == 0
    first.close()
    prefill.close()


def lose(engine: FakeEngine, name: str) -> None:
    """Its lease, as when a shard restarts."""
    tracked = engine.scheduling._requests[name]
    assert tracked.lookup is not None
    hit = tracked.lookup.hit
    assert hit is not None
    on_loop(hit.session.release(tuple(lease for of_rank in hit.leases for lease in of_rank)))
    on_loop(engine.scheduling.lookups.renew())
    assert tracked.lookup.hit is None


def test_a_lease_lost_between_a_hit_and_its_blocks_is_loaded_all_the_same(
    store: LocalStore, engine: FakeEngine
) -> None:
    """vLLM waits for a load that it was promised: one that finds nothing ends it, none at all would not."""
    request = FakeRequest("again", list(PROMPT))
    engine.scheduling.on_new_request(request)
    engine.side.settle()
    assert engine.scheduling.matched(request, 0) == (36, True)
    lose(engine, "again")
    engine.scheduling.allocated("again", list(range(9)), 36)
    assert [load.end for load in engine.scheduling.plan(Output()).loads] == [36]
    engine.scheduling.loaded(["again"], set())
    engine.scheduling.finished(request)
    engine.close()


class Fading:
    """A look-up whose lease is lost as soon as it was looked at."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup, self._reads = lookup, 0

    @property
    def hit(self) -> object:
        self._reads += 1
        return self._lookup.hit if self._reads == 1 else None

    def __getattr__(self, name: str) -> object:
        return getattr(self._lookup, name)


def test_a_lease_lost_while_vllm_looks_raises_nothing(store: LocalStore, engine: FakeEngine) -> None:
    request = FakeRequest("again", list(PROMPT))
    engine.scheduling.on_new_request(request)
    engine.side.settle()
    tracked = engine.scheduling._requests["again"]
    lookup = tracked.lookup
    assert lookup is not None
    tracked.lookup = Fading(lookup)  # type: ignore[assignment]
    assert engine.scheduling.matched(request, 0) == (36, True)
    assert engine.scheduling.sources("again", 36) == {Tier.HOST: 36}
    tracked.lookup = lookup
    engine.scheduling.finished(request)
    engine.close()


def test_leases_are_renewed_side_by_side(
    store: LocalStore, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent shard costs each its bound, not each the sum."""
    lookups = [looked_up(engine) for _ in range(3)]
    meeting = asyncio.Barrier(len(lookups))

    async def renew(*_: object) -> bool:
        async with asyncio.timeout(5.0):
            await meeting.wait()
        return True

    with monkeypatch.context() as patch:
        patch.setattr(StoreSession, "renew", renew)
        on_loop(engine.scheduling.lookups.renew())
    assert engine.scheduling.lookups.held == 3
    for lookup in lookups:
        engine.scheduling.lookups.drop(lookup)
    engine.close()


@pytest.mark.parametrize("what", ["store", "shards", "epoch"])
def test_a_handoff_is_not_waited_for_where_nobody_can_see_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """No clock ticks here: who waits waits for ever."""

    async def refuse(*_: object, **__: object) -> None:
        raise Unavailable("gone")

    decode = engine_of(store, setup=setup_of(epoch="store" if what == "epoch" else "weights"))
    assert decode.side.settle()
    if what == "store":
        decode.side._client, store.is_down = None, True
    elif what == "shards":
        assert looked_up(decode).hit is None
        for driver in store.drivers:
            monkeypatch.setattr(driver, "match", refuse)
    lookup = looked_up(decode, at_least=36, wait_s=20.0)
    assert lookup.hit is None
    assert counted(decode)["handoffs_incomplete"] == 1
    decode.close()


def test_a_prefill_of_before_a_reset_announces_nothing(store: LocalStore) -> None:
    prefill = engine_of(store, setup=setup_of(loads=False))
    request = FakeRequest("p", list(PROMPT), 30, kv_transfer_params={"do_remote_decode": True})
    prefill.add(request)
    for _ in range(8):
        prefill.side.settle()
        prefill.step()
    assert prefill.workers.saves != []
    prefill.reset(b"9" * 16)
    prefill.run()
    assert prefill.finished["p"] is None, "its KV is of weights that are gone"
    store.expire(31.0)
    prefill.close()
