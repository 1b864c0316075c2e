"""Promise of `store`, `epoch`, `purge`: what is wrong is told with its cure, what is done by shard."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from kvstore import Epoch, KVLayout, NamespaceSpec, digest16
from kvstore.sync import StoreClient
from tests.cli.stores import RunningStore, running_store
from tests.serving import command

SPEC = NamespaceSpec("m", KVLayout(2, 0, 1, 4, "float32", block_tokens=4), bytes(16))
E1, E2 = Epoch(1, digest16("w1")), Epoch(2, digest16("w2"))
KV = np.zeros((2, 2, 800, 1, 4), dtype=np.float32)
BLOCKS = 200


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStore]:
    with running_store(tmp_path_factory.mktemp("state"), "--shards", "2", "--capacity", "64MiB") as running:
        yield running


@pytest.fixture
def filled(store: RunningStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningStore]:
    monkeypatch.setenv("KVSTRATA_STATE", str(store.state))
    with StoreClient.connect_running() as client:
        assert client.open(SPEC, E1).put(range(800), KV).n_tokens == 800
    yield store
    with StoreClient.connect_running(admin=True) as admin:
        admin.purge(admin_namespace(admin))


def admin_namespace(admin: StoreClient) -> Any:
    return next(known.id for known in next(iter(admin.namespaces().values())) if known.model_id == "m")


def answer(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    assert done.returncode == code, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def told(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_status_shows_shards_namespaces_and_the_oldest_pin(filled: RunningStore) -> None:
    document = answer(filled.run("status", "--store", "default", "--json"))
    assert [row["state"] for row in document["shards"]] == ["running", "running"]
    assert sum(row["versions"] for row in document["shards"]) == BLOCKS
    assert [row["model"] for row in document["namespaces"]] == ["m"]
    assert {"oldest_pin_s", "ownerless_nbytes"} <= document["shards"][0].keys()
    shown = filled.run("status", "--store", "default").stdout
    assert "oldest pin" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_an_epoch_is_registered_advanced_and_shown(filled: RunningStore) -> None:
    assert "epoch register m 7 WEIGHTS" in told(filled.run("epoch", "advance", "m", "7"))
    digest = E2.weights_digest.hex()
    assert answer(filled.run("epoch", "register", "m", "2", digest, "--json"))["failed"] == {}
    done = answer(filled.run("epoch", "advance", "m", "2", "--policy", "allow-stale=1", "--json"))
    assert done["done"] == ["shard-0", "shard-1"]
    shown = answer(filled.run("epoch", "show", "m", "--json"))
    assert shown["agree"]
    assert {(s["current"], s["stale_lag_max"]) for s in shown["shards"].values()} == {(2, 1)}
    assert "stale reads up to 1 back" in filled.run("epoch", "show", "m").stdout
    assert "never go back" in told(filled.run("epoch", "advance", "m", "1"))
    assert "is bound to" in told(filled.run("epoch", "register", "m", "2", "0" * 32))


def test_a_purge_asks_and_says_what_went(filled: RunningStore) -> None:
    with StoreClient.connect_running() as client:
        session = client.open(SPEC, E1)
        keys = [key.hex() for key in session.keys(range(16))]
    namespace = session.namespace.hex()
    assert "say --yes" in told(filled.run("purge", "--model", "m"))
    (row,) = answer(
        filled.run("purge", "--namespace", namespace, "--keys", ",".join(keys), "--yes", "--json")
    )["purged"]
    assert (row["versions"], row["failed"]) == (4, {})
    (row,) = answer(filled.run("purge", "--model", "m", "--epoch", "1", "--yes", "--json"))["purged"]
    assert (row["versions"], row["namespace"]) == (BLOCKS - 4, namespace)


def test_addresses_and_a_token_file_do_from_elsewhere(filled: RunningStore) -> None:
    token = ("--token-file", filled.document["token_file"])
    admins = ",".join(shard["admin"] for shard in filled.shards)
    anyone = filled.shards[1]["address"]
    assert len(answer(filled.run("status", "--store", anyone, *token, "--json"))["shards"]) == 2
    assert "admin addresses" in told(filled.run("epoch", "advance", "m", "1", "--store", anyone, *token))
    assert "--token-file" in told(filled.run("epoch", "show", "m", "--store", anyone))
    answer(filled.run("epoch", "register", "m", "3", "0" * 32, "--store", admins, *token, "--json"))
    answer(filled.run("epoch", "show", "m", "--store", admins, *token, "--json"))


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (("store", "--host", "0.0.0.0"), "--insecure"),
        (("store", "--capacity", "much"), "512MiB"),
        (("store", "--name", "a/b"), "letters, digits"),
        (("store", "--shards", "9", "--port", "65530"), "choose a lower one"),
        (("store", "nowhere.toml"), "give the path of a TOML file"),
        (("status", "--store", "nobody"), "kvstrata store"),
        (("epoch", "show", "m", "--store", "127.0.0.1:9"), "is it running"),
        (("epoch", "advance", "m", "1", "--policy", "maybe"), "allow-stale=1"),
        (("epoch", "register", "m", "1", "beef"), "32 hex digits"),
        (("purge",), "--model ID"),
        (("purge", "--namespace", "beef", "--yes"), "32 hex digits"),
        (("purge", "--namespace", "0" * 32, "--keys", "beef", "--yes"), "64 hex digits"),
    ],
)
def test_an_error_is_one_line_with_its_cure(
    store: RunningStore, tmp_path: Path, arguments: tuple[str, ...], cure: str
) -> None:
    state = tmp_path if arguments[0] == "store" else store.state
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"KVSTRATA_STATE": str(state)},
    )  # fmt: skip
    assert cure in told(done)


def test_a_taken_port_and_a_taken_name_are_told_before_anything_starts(store: RunningStore) -> None:
    assert "runs already" in told(store.run("store"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = told(store.run("store", "--name", "other", "--port", port, "--shards", "1"))
    assert line == f"error: port {port} is taken: stop what listens there or choose another with --port"


@pytest.mark.parametrize(
    ("signals", "end_s"),
    [((signal.SIGINT,), 15), ((signal.SIGTERM,), 15), ((signal.SIGINT, signal.SIGINT), 5)],
)
def test_ctrl_c_drains_and_leaves_no_process_and_no_file(
    tmp_path: Path, signals: tuple[signal.Signals, ...], end_s: float
) -> None:
    with running_store(tmp_path, "--shards", "2", "--capacity", "64MiB", "--drain", "10") as store:
        children = psutil.Process(store.process.pid).children(recursive=True)
        assert len(children) == 2
        for sent in signals:
            store.process.send_signal(sent)
        assert store.process.wait(end_s) == 128 + signals[0]
        assert [child for child in children if child.is_running()] == []
        assert not Path(store.document["file"]).exists()


def test_shards_end_with_a_store_that_was_killed(tmp_path: Path) -> None:
    with running_store(tmp_path, "--shards", "2", "--capacity", "64MiB", "--drain", "0") as store:
        children = psutil.Process(store.process.pid).children(recursive=True)
        store.process.kill()
        assert psutil.wait_procs(children, timeout=15)[1] == []


def test_the_secret_is_kept_so_that_a_namespace_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_STATE", str(tmp_path))
    seen = set()
    for _ in range(2):
        with (
            running_store(tmp_path, "--shards", "1", "--capacity", "64MiB"),
            StoreClient.connect_running() as c,
        ):
            seen.add(c.open(SPEC, E1).namespace)
    assert len(seen) == 1
