"""The core alone, in a process of its own: no bytes, no network, a million versions.

Nothing but the core is imported, so that the growth of the process is the core's. Writers commit whole
transactions, as the driver does. Matches are of 64 keys and timed one by one; between them a writer
commits, and every commit pushes old versions out. Then the epoch advances and all that is older is dropped:
the same work again, and the core's sweep besides, one slice of it between any two matches, as its driver
runs it. A match that arrives while a slice runs waits for the rest of it: each match is timed from a
moment drawn at random within its slice.

All is timed in CPU time of this one thread: the core waits for nothing, so that on an idle machine this is
the wall clock, and on a busy one the turns of other processes (milliseconds) are not taken for the core's.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import time
from collections.abc import Sequence
from typing import Any, Final

from cli.bench.figures import Spread
from cli.bench.jsonlines import answer
from kvstore.core.shard import ShardCore
from kvstore.core.state import CoreConfig, CoreLimits, Namespace, Offer
from kvstore.frame import HEADER_NBYTES
from kvstore.nouns import (
    DROP,
    OFFERS_MAX,
    ROOT_KEY,
    BlockKey,
    Epoch,
    Incarnation,
    KVLayout,
    NamespaceId,
    Quality,
    ShardId,
    Snapshot,
    WeightsDigest,
)
from kvstore.policies import POLICIES

MODEL: Final = "bench"
NAMESPACE: Final = NamespaceId(bytes(16))
LAYOUT: Final = KVLayout(32, 0, 4, 64, "bfloat16")  # a block of 1 MiB
FRAME_NBYTES: Final = LAYOUT.block_nbytes + HEADER_NBYTES
MATCH_KEYS: Final = 64
PROBE_CHAINS: Final = 64
OFFERS_BETWEEN: Final = 16  # blocks committed between two timed matches
WINDOWS: Final = 5
STRIPE_BLOCKS: Final = 16
REAP_INTERVAL_S: Final = 0.5  # as the driver's


class GcPauses:
    """The longest stop the collector makes, asked or not, while it is in force."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._started = 0.0

    def __enter__(self) -> GcPauses:
        gc.callbacks.append(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._heard)

    def _heard(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._started = time.thread_time()
        else:
            self.longest_s = max(self.longest_s, time.thread_time() - self._started)


class LoadedCore:
    """A core that is full of `versions` versions of epoch 1."""

    def __init__(self, versions: int, sweep_slots: int = 0) -> None:
        limits = CoreLimits(slots_max=versions + 2 * OFFERS_MAX)
        config = CoreConfig(ShardId("bench"), Incarnation(7), versions * FRAME_NBYTES, limits)
        self.core = ShardCore(config, POLICIES["default"])
        self.core.open_namespace(NAMESPACE, Namespace(MODEL, LAYOUT))
        self._chains = 0
        self._sweep_slots = sweep_slots
        self._reaped = 0.0
        for first in range(0, versions, OFFERS_MAX):
            self.commit(1, min(OFFERS_MAX, versions - first))

    def commit(self, epoch: int, blocks: int) -> list[BlockKey]:
        """One transaction of a new chain; its keys."""
        keys = chain_keys(self._chains, blocks)
        offers = [
            Offer(key, keys[i - 1] if i else ROOT_KEY, i, keys[i - i % STRIPE_BLOCKS], FRAME_NBYTES)
            for i, key in enumerate(keys)
        ]
        request = self._chains.to_bytes(16, "little")
        self._chains += 1
        core, now, of = self.core, time.monotonic(), epoch_of(epoch)
        core.register_epoch(MODEL, of)
        txn = core.begin(NAMESPACE, of, Quality.LOSSLESS, offers, "bench", 60.0, request, now)
        for i in range(blocks):
            core.written(txn, i, None, now)
        assert not core.commit(txn.id, None, now).refused
        core.index.freed.clear()  # what a driver does
        return keys

    def slice_us(self) -> float:
        """What a driver runs between two calls: a slice of the sweep, and its ticks. How long it took."""
        started, now = time.thread_time(), time.monotonic()
        self.core.sweep(self._sweep_slots)
        if now - self._reaped > REAP_INTERVAL_S:
            self._reaped = now
            self.core.reap(now)
        return (time.thread_time() - started) * 1e6

    def match_us(self, keys: Sequence[BlockKey], epoch: int) -> float | None:
        """One match of all of `keys`. None when the policy gave some up."""
        snapshot = Snapshot(NAMESPACE, epoch_of(epoch))
        started = time.thread_time()
        found = self.core.match(snapshot, keys, "bench", 60.0, time.monotonic())
        taken = time.thread_time() - started
        if found.lease is not None:
            self.core.release([found.lease])
        return taken * 1e6 if found.miss is None else None

    def match_resident_us(self, chains: list[list[BlockKey]], i: int, epoch: int) -> float:
        """One match of all of the i-th chain, which is committed again when it is no longer whole."""
        taken = self.match_us(chains[i], epoch)
        if taken is None:
            chains[i] = self.commit(epoch, MATCH_KEYS)
            taken = self.match_us(chains[i], epoch)
        assert taken is not None, "what was committed just now is not found"
        return taken

    def match_p99_us(self, epoch: int, probes: int) -> float:
        """The median over WINDOWS windows, so that one bad moment of the machine is not taken for ours."""
        chains = [self.commit(epoch, MATCH_KEYS) for _ in range(PROBE_CHAINS)]
        arrival = random.Random(7)  # noqa: S311
        windows = []
        for _ in range(WINDOWS):
            taken = []
            for i in range(probes // WINDOWS):
                self.commit(epoch, OFFERS_BETWEEN)
                waited = self.slice_us() * arrival.random()
                taken.append(waited + self.match_resident_us(chains, i % PROBE_CHAINS, epoch))
            windows.append(sorted(taken)[int(len(taken) * 0.99)])
        return Spread.of(windows).median


def epoch_of(number: int) -> Epoch:
    return Epoch(number, WeightsDigest(number.to_bytes(16, "little")))


def chain_keys(chain: int, blocks: int) -> list[BlockKey]:
    return [BlockKey(hashlib.sha256(b"%d/%d" % (chain, i)).digest()) for i in range(blocks)]


def resident_nbytes() -> int:
    """Of this process, everything."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def match64(versions: int, matches: int) -> dict[str, Any]:
    """Median of a match of 64 keys among as many resident versions."""
    loaded = LoadedCore(versions)
    chains = [loaded.commit(1, MATCH_KEYS) for _ in range(PROBE_CHAINS)]
    taken = Spread.of(loaded.match_resident_us(chains, i % PROBE_CHAINS, 1) for i in range(matches))
    return {"median": taken.median, "least": taken.least, "most": taken.most}


def epoch(versions: int, probes: int, sweep_slots: int) -> dict[str, Any]:
    gc.collect()
    before = resident_nbytes()
    with GcPauses() as pauses:
        loaded = LoadedCore(versions, sweep_slots)
        gc.collect()  # on the record: it has to come at some time
        grown = resident_nbytes() - before
        p99_before = loaded.match_p99_us(1, probes)
        loaded.core.register_epoch(MODEL, epoch_of(2))
        started = time.thread_time()
        loaded.core.advance_epoch(MODEL, 2, DROP)
        advanced = time.thread_time() - started
        p99_during = loaded.match_p99_us(2, probes)
    return {
        "versions": versions,
        "advance_ms": advanced * 1000,
        "bytes_per_version": grown / versions,
        "match_p99_before_us": p99_before,
        "match_p99_during_us": p99_during,
        "gc_pause_ms_max": pauses.longest_s * 1000,
    }


def flush(versions: int, sweep_slots: int) -> dict[str, Any]:
    """What dropping as many costs: a purge of their namespace, until the last of them is freed."""
    loaded = LoadedCore(versions)
    core = loaded.core
    started = time.thread_time()
    core.purge(NAMESPACE, None, None)
    while core.sweep(sweep_slots):
        core.index.freed.clear()
    taken = time.thread_time() - started
    assert not len(core.index), f"{len(core.index)} versions outlived the purge of their namespace"
    return {"flush_ms": taken * 1000}


if __name__ == "__main__":
    answer({"match64": match64, "epoch": epoch, "flush": flush})
