"""The core alone, in a process of its own: no bytes, no network, a million versions.

Nothing but the core is imported, so that the growth of the process is the core's. Writers commit whole
transactions, as the driver does. Matches are of 64 keys and timed one by one; between them a writer
commits, and every commit pushes old versions out: the same work before and after the epoch advances, which
is when it turns into reclaiming the past epoch. Whatever step of reclamation the core asks its driver to
take is on the clock of the match that waits for it.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Sequence
from typing import Any, Final

from cli.bench.figures import Spread
from cli.bench.jsonlines import answer
from kvstore.core.shard import ShardCore
from kvstore.core.state import CoreConfig, CoreLimits, Namespace, Offer
from kvstore.nouns import (
    OFFERS_MAX,
    ROOT_KEY,
    BlockKey,
    Epoch,
    Incarnation,
    LayoutFingerprint,
    NamespaceId,
    Quality,
    ShardId,
    Snapshot,
    WeightsDigest,
)
from kvstore.policies import POLICIES

MODEL: Final = "bench"
NAMESPACE: Final = NamespaceId(bytes(16))
FRAME_NBYTES: Final = (1 << 20) + 256
MATCH_KEYS: Final = 64
PROBE_CHAINS: Final = 64
OFFERS_BETWEEN: Final = 16  # blocks committed between two timed matches
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
            self._started = time.perf_counter()
        else:
            self.longest_s = max(self.longest_s, time.perf_counter() - self._started)


class LoadedCore:
    """A core that is full of `versions` versions of epoch 1."""

    def __init__(self, versions: int) -> None:
        limits = CoreLimits(slots_max=versions + 2 * OFFERS_MAX)
        config = CoreConfig(ShardId("bench"), Incarnation(7), versions * FRAME_NBYTES, limits)
        self.core = ShardCore(config, POLICIES["lru"])
        self.core.open_namespace(
            NAMESPACE, Namespace(MODEL, LayoutFingerprint(bytes(16)), FRAME_NBYTES - 256)
        )
        self._chains = 0
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
        committed = core.commit(txn.id, None, now)
        assert len(committed.blocks) == blocks
        core.index.freed.clear()  # what a driver does
        return keys

    def reclaim(self) -> None:
        """What a driver does between calls, on the clock: the core's own step, and its ticks."""
        step: Any = getattr(self.core, "reclaim", None)
        if step is not None:
            step(time.monotonic())
        if time.monotonic() - self._reaped > REAP_INTERVAL_S:
            self._reaped = time.monotonic()
            self.core.reap(self._reaped)

    def match_us(self, keys: Sequence[BlockKey], epoch: int) -> float:
        """One match of all of `keys`, with whatever it has to wait for."""
        snapshot = Snapshot(NAMESPACE, epoch_of(epoch))
        started = time.perf_counter()
        self.reclaim()
        found = self.core.match(snapshot, keys, "bench", 60.0, time.monotonic())
        taken = time.perf_counter() - started
        assert found.miss is None, found.miss
        if found.lease is not None:
            self.core.release([found.lease])
        return taken * 1e6

    def match_p99_us(self, epoch: int, probes: int) -> float:
        chains = [self.commit(epoch, MATCH_KEYS) for _ in range(PROBE_CHAINS)]
        taken = []
        for i in range(probes):
            self.commit(epoch, OFFERS_BETWEEN)
            taken.append(self.match_us(chains[i % PROBE_CHAINS], epoch))
        return sorted(taken)[int(len(taken) * 0.99)]


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
    taken = Spread.of(loaded.match_us(chains[i % PROBE_CHAINS], 1) for i in range(matches))
    return {"median": taken.median, "least": taken.least, "most": taken.most}


def epoch(versions: int, probes: int) -> dict[str, Any]:
    gc.collect()
    before = resident_nbytes()
    with GcPauses() as pauses:
        loaded = LoadedCore(versions)
        gc.collect()  # on the record: it has to come at some time
        grown = resident_nbytes() - before
        p99_before = loaded.match_p99_us(1, probes)
        loaded.core.register_epoch(MODEL, epoch_of(2))
        started = time.perf_counter()
        loaded.core.advance_epoch(MODEL, 2)
        advanced = time.perf_counter() - started
        p99_during = loaded.match_p99_us(2, probes)
    return {
        "versions": versions,
        "advance_ms": advanced * 1000,
        "bytes_per_version": grown / versions,
        "match_p99_before_us": p99_before,
        "match_p99_during_us": p99_during,
        "gc_pause_ms_max": pauses.longest_s * 1000,
    }


def flush(versions: int) -> dict[str, Any]:
    """What dropping as many costs: a purge of their namespace. None where the core cannot purge."""
    purge: Any = getattr(ShardCore, "purge", None)
    if purge is None:
        return {"flush_ms": None}
    loaded = LoadedCore(versions)
    started = time.perf_counter()
    purge(loaded.core, NAMESPACE)
    return {"flush_ms": (time.perf_counter() - started) * 1000}


if __name__ == "__main__":
    answer({"match64": match64, "epoch": epoch, "flush": flush})
