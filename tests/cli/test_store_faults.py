"""Promise: who dies or stands still costs the others a bounded wait, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import store_faults
from tests.cli.stores import RunningStore, running_store

pytestmark = [pytest.mark.timeout(120)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningStore]:
    monkeypatch.setenv("KVSTRATA_STATE", str(tmp_path))
    with running_store(tmp_path, "--shards", "1", "--capacity", "256MiB") as running:
        yield running


def test_a_client_killed_while_it_writes_leaves_no_bytes(store: RunningStore) -> None:
    report = store_faults.client_killed_mid_write(store)
    assert report["staged_after"] == 0


def test_a_client_killed_while_it_reads_leaves_no_pins(store: RunningStore) -> None:
    report = store_faults.client_killed_mid_read(store)
    assert report["left"] == 0


def test_a_shard_killed_while_it_streams_is_a_miss_and_comes_back(store: RunningStore) -> None:
    report = store_faults.shard_killed_mid_stream(store)
    assert report["cut_s"] < 10


def test_a_shard_that_was_stopped_lost_no_live_lease(store: RunningStore) -> None:
    report = store_faults.shard_stopped(store, pause_s=2 * store_faults.LEASE_S)
    assert report["oldest_pin_s"] > 0
