"""Faults by hand: kill and stop clients and shards of a real store, and look what is left.

    python -m tests.cli.store_faults --pause-s 60        all four, a minute's SIGSTOP; prints what was seen

    kill -9 a client that writes     what it staged is gone within two lease periods
    kill -9 a client that reads      so are its pins, and the bytes that only they held
    kill -9 a shard that streams     a bounded wait and misses; the shard comes back, empty and clean
    SIGSTOP a shard                  no live lease is lost, calls meanwhile end in time

test_store_faults.py runs each with short waits.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore import Epoch, KVLayout, MissReason, NamespaceSpec, digest16
from kvstore.sync import StoreClient, StoreSession
from tests.cli.stores import RunningStore, running_store

LAYOUT: Final = KVLayout(layers=8, head_begin=0, head_end=4, head_dim=64, dtype="float32")  # 512 KiB a block
SPEC: Final = NamespaceSpec("faults", LAYOUT, digest16("tokenizer"))
EPOCH: Final = Epoch(1, digest16("weights"))
PROMPT: Final = list(range(64 * 32))  # 64 blocks, 32 MiB
LEASE_S: Final = 2.0
CALL_S: Final = 1.0
BACK_S: Final = 30.0
TICK_S: Final = 0.05

Report = dict[str, Any]


def kv_of(tokens: int, seed: int = 1) -> np.ndarray[Any, np.dtype[Any]]:
    return np.full((8, 2, tokens, 4, 64), seed, dtype=np.float32)


def open_session(client: StoreClient) -> StoreSession:
    return client.open(SPEC, EPOCH)


def until(what: str, found: Callable[[], bool], bound_s: float) -> float:
    """Seconds until it was so. Raises AssertionError after the bound."""
    began, tick = time.monotonic(), threading.Event()
    while not found():
        assert time.monotonic() - began < bound_s, f"not within {bound_s} s: {what}"
        tick.wait(TICK_S)
    return time.monotonic() - began


def usage() -> Report:
    """What the shard says of itself, as `kvstrata status --store default --json` has it."""
    with StoreClient.connect_running() as client:
        (answer,) = client.try_status().values()
    return {"state": "down"} if isinstance(answer, Exception) else {"state": "running"} | asdict(answer)


def client_process(store: RunningStore, what: str) -> subprocess.Popen[str]:
    """A client of its own, in the midst of `what`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.store_faults", "--as", what],
        stdout=subprocess.PIPE,
        text=True,
        env=store.env,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == what
    return process


def kill_client(store: RunningStore, what: str) -> tuple[Report, Report, float]:
    """Usage just before and at the end, and how long it took until nothing of the client was left."""
    process = client_process(store, what)
    before = usage()
    process.kill()
    process.communicate()

    def clean() -> bool:
        row = usage()
        assert row["ownerless_nbytes"] == 0
        return not (row["leases"] or row["staged_nbytes"] or row["retired_nbytes"])

    took_s = until("nothing of the client is left", clean, 2 * LEASE_S)
    return before, usage(), took_s


def client_killed_mid_write(store: RunningStore) -> Report:
    before, after, took_s = kill_client(store, "writing")
    assert before["staged_nbytes"] > 0
    assert before["leases"] > 0
    return {
        "staged_before": before["staged_nbytes"],
        "staged_after": after["staged_nbytes"],
        "took_s": took_s,
    }


def client_killed_mid_read(store: RunningStore) -> Report:
    before, after, took_s = kill_client(store, "reading")
    assert before["leases"] > 0
    assert before["retired_nbytes"] > 0, "it was purged while the client had it pinned"
    assert before["oldest_pin_s"] > 0
    return {"pinned_before": before["retired_nbytes"], "left": after["retired_nbytes"], "took_s": took_s}


def shard_killed_mid_stream(store: RunningStore) -> Report:
    with StoreClient.connect_running() as client:
        session = open_session(client)
        assert session.put(PROMPT, kv_of(len(PROMPT))).n_tokens == len(PROMPT)
        incarnation, pid = usage()["incarnation"], store.shards[0]["pid"]
        began = client.counters["verified_blocks"]
        with session.pin(PROMPT, lease_s=30) as pin, ThreadPoolExecutor(1) as pool:
            reads = pool.submit(_read_until_cut, pin)
            until("the stream runs", lambda: client.counters["verified_blocks"] > began, 10)
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            got, reason = reads.result(BACK_S)
        cut_s = time.monotonic() - killed

        def back() -> bool:
            row = usage()
            return bool(row["state"] == "running" and row["incarnation"] != incarnation)

        back_s = until("the shard is back", back, BACK_S)
        assert session.get(PROMPT, timeout_s=5).n_tokens == 0, "what it held is a miss"
        until("it takes blocks again", lambda: _put_again(session), BACK_S)
        assert session.get(PROMPT).n_tokens == len(PROMPT)
        row = usage()
        assert (row["ownerless_nbytes"], row["staged_nbytes"], row["leases"]) == (0, 0, 0)
    return {"blocks_before_the_cut": got, "reason": reason.value, "cut_s": cut_s, "back_s": back_s}


def _read_until_cut(pin: Any) -> tuple[int, MissReason]:
    """Read again and again, verified each time; the answer that was cut short."""
    while True:
        hit = pin.get(timeout_s=5)
        assert np.array_equal(hit.kv, kv_of(hit.n_tokens))
        if hit.misses:
            return hit.n_tokens // LAYOUT.block_tokens, next(iter(hit.misses))


def _put_again(session: StoreSession) -> bool:
    return session.put(PROMPT, kv_of(len(PROMPT))).n_tokens == len(PROMPT)


def shard_stopped(store: RunningStore, pause_s: float) -> Report:
    pid = store.shards[0]["pid"]
    with StoreClient.connect_running() as client:
        session = open_session(client)
        session.put(PROMPT, kv_of(len(PROMPT)))
        with session.pin(PROMPT, lease_s=LEASE_S) as pin:
            os.kill(pid, signal.SIGSTOP)
            stopped = time.monotonic()
            try:
                began = time.monotonic()
                hit = session.get(PROMPT, timeout_s=CALL_S)
                waited_s = time.monotonic() - began
                assert hit.n_tokens == 0
                assert set(hit.misses) <= {MissReason.DEADLINE, MissReason.SHARD_UNAVAILABLE}
                assert waited_s < CALL_S + 2.0
                threading.Event().wait(max(0.0, pause_s - (time.monotonic() - stopped)))  # the pause itself
            finally:
                os.kill(pid, signal.SIGCONT)
            until("it answers again", lambda: usage()["state"] == "running", BACK_S)
            assert pin.renew(LEASE_S), "a live lease was lost to the pause"
            assert pin.renew(CALL_S + BACK_S)  # longer than the command below takes on a busy machine
            row = usage()
            assert row["oldest_pin_s"] > 0, "its age, the pause left out"
            assert "oldest pin" in store.run("status", "--store", "default").stdout
            assert pin.renew(LEASE_S)
            assert pin.get().n_tokens == len(PROMPT)
        until("the pin is given back", lambda: usage()["leases"] == 0, 2 * LEASE_S)
    return {"pause_s": pause_s, "call_meanwhile_s": waited_s, "oldest_pin_s": row["oldest_pin_s"]}


# -- the clients that are killed -----------------------------------------------------------------------


def write_for_ever() -> None:
    """Stage block after block, and never commit."""
    with StoreClient.connect_running() as client:
        session = open_session(client)
        with session.transaction(lease_s=LEASE_S) as txn:
            for seed in range(1_000_000):
                ids = [seed, *PROMPT[1:]]
                txn.put(ids, kv_of(len(ids)))
                if seed == 0:
                    print("writing", flush=True)


def read_for_ever() -> None:
    """Pin, have it purged, and read what only the pin holds; renew until killed."""
    with StoreClient.connect_running() as client, StoreClient.connect_running(admin=True) as admin:
        session = open_session(client)
        session.put(PROMPT, kv_of(len(PROMPT)))
        with session.pin(PROMPT, lease_s=LEASE_S) as pin:
            admin.purge(session.namespace, keys=session.keys(PROMPT))
            while pin.renew(LEASE_S):
                assert pin.get().n_tokens == len(PROMPT)
                print("reading", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pause-s", type=float, default=60.0, help="how long the shard is stopped")
    parser.add_argument("--as", dest="part", choices=["writing", "reading"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        (write_for_ever if chosen.part == "writing" else read_for_ever)()
        return
    faults: list[Callable[[RunningStore], Report]] = [
        client_killed_mid_write,
        client_killed_mid_read,
        shard_killed_mid_stream,
        lambda store: shard_stopped(store, chosen.pause_s),
    ]
    for fault, name in zip(faults, ("mid-write", "mid-read", "mid-stream", "stopped"), strict=True):
        with tempfile.TemporaryDirectory() as state:
            os.environ["KVSTRATA_STATE"] = state
            with running_store(Path(state), "--shards", "1", "--capacity", "256MiB") as store:
                print(json.dumps({name: fault(store)}), flush=True)


if __name__ == "__main__":
    main()
