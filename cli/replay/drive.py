"""A trace through the real core, in virtual time: what a shard would have answered, without bytes.

Each request matches its whole chain, offers what it missed in one transaction, commits it, and lets go of
all of it at once, as prefill does. Nothing else is simulated: matching, making room, leases and policies
are the ones a shard runs. About 25 us a block access.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cli.replay.trace import Request, Trace
from kvstore.core.seams import MakePolicy
from kvstore.core.shard import ShardCore
from kvstore.core.state import CoreConfig, CoreLimits, Namespace, Offer
from kvstore.nouns import (
    OFFERS_MAX,
    ROOT_KEY,
    BlockKey,
    Epoch,
    Incarnation,
    KVLayout,
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
_LEASE_S: Final = 60.0
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


class Replay:
    """One shard under one policy."""

    def __init__(self, make_policy: MakePolicy, capacity_nbytes: int, block_nbytes: int) -> None:
        slots = capacity_nbytes // block_nbytes
        limits = CoreLimits(slots_max=slots + 1, pause_s=float("inf"))
        config = CoreConfig(ShardId("replay"), Incarnation(1), capacity_nbytes, limits)
        self.core = ShardCore(config, make_policy)
        self.core.open_namespace(_NAMESPACE, Namespace(_MODEL, KVLayout(1, 0, 1, 1, "float16")))
        self.core.register_epoch(_MODEL, _EPOCH)
        self._block_nbytes = block_nbytes
        self._piece = max(1, slots // _PIECES)
        self._snapshot = Snapshot(_NAMESPACE, _EPOCH)

    def run(self, trace: Trace, *, by_block: bool = False) -> Tally:
        """All requests, from the first on."""
        tally, serve = Tally(), self.serve_by_block if by_block else self.serve
        for number, request in enumerate(trace.requests):
            tally.add(request, *serve(number, request))
        return tally

    def serve(self, number: int, request: Request) -> tuple[int, int]:
        """One request: blocks of its run, and blocks found at all."""
        keys = _keys(request.hash_ids)
        parents = [ROOT_KEY, *keys]
        offers = [Offer(key, parents[i], i, keys[0], self._block_nbytes) for i, key in enumerate(keys)]
        return self._piece_of(number, 0, keys, offers, request.at_s)

    def _piece_of(
        self, number: int, piece: int, keys: list[BlockKey], offers: list[Offer], now: float
    ) -> tuple[int, int]:
        core = self.core
        matched = core.match(self._snapshot, keys, "replay", _LEASE_S, now)
        run = resident = len(matched.slots)
        leases = [] if matched.lease is None else [matched.lease]
        for first in range(run, len(keys), OFFERS_MAX):
            request_id = b"".join(n.to_bytes(8, "little") for n in (number, piece, first))
            some = offers[first : first + OFFERS_MAX]
            txn = core.begin(_NAMESPACE, _EPOCH, Quality.LOSSLESS, some, "replay", _LEASE_S, request_id, now)
            resident += sum(refusal is Refusal.EXISTS for refusal in txn.refused.values())
            for i in list(txn.staged):
                core.written(txn, i, None, now)
            pinned = core.commit(txn.id, _LEASE_S, now).lease
            if pinned is not None:
                leases.append(pinned)
        core.release(leases)
        core.index.freed.clear()
        return run, resident

    def serve_by_block(self, number: int, request: Request) -> tuple[int, int]:
        """As cache studies replay it: blocks in the order of access, in small pieces, as if there were no
        prefixes: every block is its chain's first."""
        run = resident = 0
        ids = request.hash_ids
        for first in range(0, len(ids), self._piece):
            keys = _keys(ids[first : first + self._piece])
            offers = [Offer(key, ROOT_KEY, 0, key, self._block_nbytes) for key in keys]
            matched, found = self._piece_of(number, first, keys, offers, request.at_s)
            run += matched if run == first else 0
            resident += found
        return run, resident


def _keys(blocks: Sequence[int]) -> list[BlockKey]:
    return [BlockKey(hashlib.sha256(block.to_bytes(8, "little")).digest()) for block in blocks]
