"""The store without await: the same methods and answers, bounded, and nothing left when it is closed."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading

import numpy as np
import pytest

import kvstore.client
import kvstore.session
from kvstore.errors import ConfigError, DeadlineExceeded
from kvstore.merged_watch import Changed
from kvstore.nouns import KVLayout, NamespaceSpec
from kvstore.sync import StoreClient, StoreSession, _thread_of
from tests.kvstore.oracle import epoch

SPEC = NamespaceSpec("m", KVLayout(2, 0, 1, 4, "float32", block_tokens=4), bytes(16))
KV = np.arange(2 * 2 * 8 * 4, dtype=np.float32).reshape(2, 2, 8, 1, 4)
IDS = list(range(8))
INTERNAL = {"update_topology", "connect", "over", "register"}  # of services that are asynchronous themselves


def test_it_does_what_the_asynchronous_one_does() -> None:
    with StoreClient.in_process(1 << 20) as client:
        session = client.open(SPEC, epoch(1))
        with client.watch([session.namespace], for_s=5.0) as watch:
            events = iter(watch)
            assert isinstance(next(events), Changed)
            with session.transaction() as txn:
                txn.put(IDS, KV)
                assert session.get(IDS).n_tokens == 0
            assert txn.committed == ((8, {}),)
            assert len(next(events).changes) == 2  # type: ignore[union-attr]
        with session.pin(IDS) as pin:
            assert pin.n_tokens == 8
            assert np.array_equal(pin.get().kv, KV)
        assert [len(page.versions) for page in client.listing(session.namespace)] == [2]
        (shard,) = client.advance_epoch("m", 1)
        assert client.purge(session.namespace)[shard].versions == 2
        assert client.status()[0].leases == 0


def test_an_exception_aborts_the_transaction_and_comes_out() -> None:
    with StoreClient.in_process(1 << 20) as client:
        session = client.open(SPEC, epoch(1))

        def stage_and_fail() -> None:
            with session.transaction() as txn:
                txn.put(IDS, KV)
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            stage_and_fail()
        assert client.status()[0].staged_nbytes == 0


def test_all_clients_share_one_thread_and_a_failed_opening_is_told() -> None:
    StoreClient.in_process(1 << 20).close()
    before = threading.active_count()
    with StoreClient.in_process(1 << 20), StoreClient.in_process(1 << 20):
        assert threading.active_count() == before
    with pytest.raises(ConfigError):
        StoreClient.in_process(1 << 20, policy="none")


def test_what_never_answers_ends_in_a_bounded_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.sync.GRACE_S", 0.05)
    thread = _thread_of(os.getpid())
    with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
        thread.run(asyncio.Event().wait(), 0.1)


@pytest.mark.parametrize(
    ("asynchronous", "synchronous"),
    [(kvstore.client.StoreClient, StoreClient), (kvstore.session.StoreSession, StoreSession)],
)
def test_it_offers_everything_that_the_asynchronous_one_does(asynchronous: type, synchronous: type) -> None:
    offered = {name for name, _ in inspect.getmembers(asynchronous) if not name.startswith("_")}
    missing = {name for name in offered - INTERNAL if not hasattr(synchronous, name)}
    assert missing == set()
