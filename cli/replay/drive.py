"""A trace through the real core, in virtual time: what a shard would have answered, without bytes.

Each request matches its whole chain, offers what it missed in one transaction, commits it, and lets go of
all of it at once, as prefill does. Nothing else is simulated: matching, making room, leases and policies
are the ones a shard runs. About 40 us a block access. With a tier below, and moves that take their time:
tiered.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cli.replay.trace import Request, Trace
from kvstore.core.seams import MakePolicy
from kvstore.core.shard import ShardCore
from kvstore.core.state import CoreConfig, CoreLimits, Matched, Namespace, Offer
from kvstore.nouns import (
    OFFERS_MAX,
    ROOT_KEY,
    BlockKey,
    Epoch,
    Incarnation,
    KVLayout,
    LeaseId,
    NamespaceId,
    Quality,
    Refusal,
    ShardId,
    Snapshot,
    WeightsDigest,
)

_MODEL: Final = "replay"
_NAMESPACE: Final = NamespaceId(bytes(16))
_EPOCH: Final = Epoch(1, WeightsDigest(bytes(16)))
_LEASE_S: Final = 600.0
_PIECES: Final = 10
"""By block, a request takes this share of the cache at a time at most, so that it can push itself out."""


@dataclass(slots=True)
class Tally:
    """What was hit of what was asked for."""

    requests: int = 0
    blocks: int = 0
    tokens: int = 0
    run_blocks: int = 0  # of matched prefix runs
    run_tokens: int = 0
    run_shares: float = 0.0  # summed over requests: tokens of the run by tokens of the request
    resident_blocks: int = 0  # found at all, behind a hole of their chain too

    def add(self, request: Request, run: int, resident: int) -> None:
        self.requests += 1
        self.blocks += len(request.hash_ids)
        self.tokens += request.input_tokens
        self.run_blocks += run
        self.run_tokens += request.tokens(run)
        self.run_shares += request.tokens(run) / request.input_tokens
        self.resident_blocks += resident


class Reader:
    """What a prefill worker does at a core: matches a prompt, writes what it computed, lets go."""

    def __init__(self, core: ShardCore, block_nbytes: int, min_quality: Quality = Quality.LOSSLESS) -> None:
        core.open_namespace(_NAMESPACE, Namespace(_MODEL, KVLayout(1, 0, 1, 1, "float16")))
        core.register_epoch(_MODEL, _EPOCH)
        self._core = core
        self._block_nbytes = block_nbytes
        self.snapshot = Snapshot(_NAMESPACE, _EPOCH, min_quality)

    def match(self, keys: Sequence[BlockKey], now: float) -> Matched:
        return self._core.match(self.snapshot, keys, "replay", _LEASE_S, now)

    def write(
        self,
        keys: Sequence[BlockKey],
        matched: Matched,
        named: tuple[int, int],
        now: float,
        *,
        are_chained: bool = True,
    ) -> int:
        """Publish what is behind the matched run, as good as the worst of the run, and let go of all.
        How many blocks of it were there. `named` is unlike that of any other request or piece."""
        core, run, resident = self._core, len(matched.slots), 0
        quality = Quality(min(matched.qualities, default=Quality.LOSSLESS))
        held: list[LeaseId] = [] if matched.lease is None else [matched.lease]
        for first in range(run, len(keys), OFFERS_MAX):
            request_id = b"".join(n.to_bytes(8, "little") for n in (*named, first))
            some = range(first, min(len(keys), first + OFFERS_MAX))
            offers = self._chained(keys, some) if are_chained else self._alone(keys, some)
            txn = core.begin(_NAMESPACE, _EPOCH, quality, offers, "replay", _LEASE_S, request_id, now)
            resident += sum(refusal is Refusal.EXISTS for refusal in txn.refused.values())
            for i in list(txn.staged):
                core.written(txn, i, None, now)
            pinned = core.commit(txn.id, _LEASE_S, now).lease
            if pinned is not None:
                held.append(pinned)
        core.release(held)
        core.index.freed.clear()
        return resident

    def _chained(self, keys: Sequence[BlockKey], some: range) -> list[Offer]:
        root, nbytes = keys[0], self._block_nbytes
        return [Offer(keys[i], keys[i - 1] if i else ROOT_KEY, i, root, nbytes) for i in some]

    def _alone(self, keys: Sequence[BlockKey], some: range) -> list[Offer]:
        return [Offer(keys[i], ROOT_KEY, 0, keys[i], self._block_nbytes) for i in some]


class Replay:
    """One shard of one tier under one policy."""

    def __init__(self, make_policy: MakePolicy, capacity_nbytes: int, block_nbytes: int) -> None:
        slots = capacity_nbytes // block_nbytes
        limits = CoreLimits(slots_max=slots + 1, pause_s=float("inf"))
        self.core = ShardCore(
            CoreConfig(ShardId("replay"), Incarnation(1), capacity_nbytes, limits), make_policy
        )
        self._reader = Reader(self.core, block_nbytes)
        self._piece = max(1, slots // _PIECES)

    def run(self, trace: Trace, *, by_block: bool = False) -> Tally:
        """All requests, from the first on."""
        tally, serve = Tally(), self.serve_by_block if by_block else self.serve
        for number, request in enumerate(trace.requests):
            tally.add(request, *serve(number, request))
        return tally

    def serve(self, number: int, request: Request) -> tuple[int, int]:
        """One request: blocks of its run, and blocks found at all."""
        keys = keys_of(request.hash_ids)
        matched = self._reader.match(keys, request.at_s)
        run = len(matched.slots)
        return run, run + self._reader.write(keys, matched, (number, 0), request.at_s)

    def serve_by_block(self, number: int, request: Request) -> tuple[int, int]:
        """As cache studies replay it: blocks in the order of access, in small pieces, as if there were no
        prefixes: every block is its chain's first."""
        run = resident = 0
        ids = request.hash_ids
        for first in range(0, len(ids), self._piece):
            keys = keys_of(ids[first : first + self._piece])
            matched = self._reader.match(keys, request.at_s)
            run += len(matched.slots) if run == first else 0
            written = self._reader.write(keys, matched, (number, first), request.at_s, are_chained=False)
            resident += len(matched.slots) + written
        return run, resident


def keys_of(blocks: Sequence[int]) -> list[BlockKey]:
    return [BlockKey(hashlib.sha256(block.to_bytes(8, "little")).digest()) for block in blocks]
