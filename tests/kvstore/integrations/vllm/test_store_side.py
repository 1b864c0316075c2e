"""The way to the store: a store that is away costs nobody a wait, and is tried again in steps."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import pytest

from kvstore.clock import ManualClock
from kvstore.errors import EpochConflict
from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.integrations.vllm.keys import chain_keys, salt_digest, tokens_of
from kvstore.integrations.vllm.store_side import RETRY_S_MAX, StoreSide
from kvstore.nouns import ROOT_KEY, Epoch, KVLayout, NamespaceSpec, WeightsDigest
from tests.kvstore.integrations.vllm.store import LocalStore, on_loop

SPEC = NamespaceSpec("m", KVLayout(1, 0, 1, 1, "float32", 4), bytes(16))
EPOCH = Epoch(0, WeightsDigest(b"1" * 16))


def side_of(store: LocalStore, clock: ManualClock) -> tuple[StoreSide, Counter[str]]:
    counted: Counter[str] = Counter()
    side = store.side(ConnectorConfig(), clock)
    side.count = lambda name: counted.update([name])
    return side, counted


def test_a_store_that_is_away_is_tried_again_in_steps_that_double(store: LocalStore) -> None:
    clock = ManualClock()
    side, counted = side_of(store, clock)
    store.is_down = True
    tried = []
    for _ in range(400):
        before = counted["store_unreachable"]
        assert on_loop(side.session(SPEC, EPOCH)) is None
        if counted["store_unreachable"] > before:
            tried.append(clock.now())
        clock.advance(0.25)
    gaps = [later - sooner for sooner, later in itertools.pairwise(tried)]
    assert gaps[:4] == [1.0, 2.0, 4.0, 8.0]
    assert set(gaps[4:]) == {RETRY_S_MAX}
    store.is_down = False
    clock.advance(RETRY_S_MAX)
    session = on_loop(side.session(SPEC, EPOCH))
    assert session is not None
    assert on_loop(side.session(SPEC, EPOCH)) is session
    side.close()


def test_a_number_of_other_weights_is_an_error_and_no_reason_to_wait(store: LocalStore) -> None:
    side, counted = side_of(store, ManualClock())
    assert on_loop(side.session(SPEC, EPOCH)) is not None
    with pytest.raises(EpochConflict):
        on_loop(side.session(SPEC, Epoch(0, WeightsDigest(b"2" * 16))))
    assert on_loop(side.session(SPEC, Epoch(1, WeightsDigest(b"2" * 16)))) is not None
    assert counted == {}
    side.close()


def test_work_that_fails_is_counted_and_whoever_asks_has_the_error(store: LocalStore) -> None:
    side, counted = side_of(store, ManualClock())

    async def fail() -> None:
        raise RuntimeError("a bug")

    future = side.begin(fail())
    assert side.settle()
    assert isinstance(future.exception(1.0), RuntimeError)
    assert counted == {"unexpected_errors": 1}
    side.close()


def test_closing_ends_what_does_not_end(store: LocalStore) -> None:

    side, _ = side_of(store, ManualClock())
    future = side.begin(asyncio.Event().wait())
    side.close(timeout_s=0.1)
    assert future.cancelled()


def test_keys_are_our_own_chain_and_a_salt_changes_all_of_it(store: LocalStore) -> None:
    side, _ = side_of(store, ManualClock())
    session = on_loop(side.session(SPEC, EPOCH))
    assert session is not None
    tokens = tokens_of(b"".join(n.to_bytes(4, "little") for n in range(13)))
    plain = chain_keys(session.namespace, tokens, 4)
    assert plain == list(session.keys(list(range(13)))), "what our own engine makes of them"
    salted = chain_keys(session.namespace, tokens, 4, "mine")
    assert len(plain) == len(salted) == 3
    assert set(plain).isdisjoint(salted)
    assert chain_keys(session.namespace, tokens[8:], 4, "mine", salted[1]) == salted[2:]
    assert chain_keys(session.namespace, tokens[:4], 4, "", ROOT_KEY) == plain[:1]
    assert salt_digest("\ud800") != salt_digest("?"), "any string that JSON can carry"
    side.close()
