"""A core to itself, with one namespace and three epochs, and helpers that speak in key numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest

from kvstore.core.moves import Move
from kvstore.core.retention import Retention
from kvstore.core.seams import MakeAdmission, MakePolicy
from kvstore.core.shard import ShardCore
from kvstore.core.state import CoreConfig, CoreLimits, Namespace, Offer, Tiering
from kvstore.core.transactions import Txn
from kvstore.core.uses import Use, Uses
from kvstore.core.versions import State, Version
from kvstore.nouns import (
    ROOT_KEY,
    BlockKey,
    BlockRef,
    Epoch,
    Incarnation,
    KVLayout,
    LeaseId,
    MissReason,
    NamespaceId,
    Quality,
    Refusal,
    Revision,
    ShardId,
    Snapshot,
    Tier,
    WeightsDigest,
)
from kvstore.policies import POLICIES

NBYTES = 100
LAYOUT = KVLayout(1, 0, 1, 1, "float16")
INCARNATION = Incarnation(7)
NAMESPACE = NamespaceId(bytes(16))
MODEL = "model"
LOSSLESS, INT8 = Quality.LOSSLESS, Quality.INT8


def epoch(number: int) -> Epoch:
    return Epoch(number, WeightsDigest(bytes([number] * 16)))


def key(n: int) -> BlockKey:
    return BlockKey(n.to_bytes(32, "big"))


E1, E2, E3 = epoch(1), epoch(2), epoch(3)


@dataclass(frozen=True)
class Found:
    """What a match answered, with the rows behind it."""

    versions: tuple[Version, ...]
    lease: LeaseId | None
    miss: MissReason | None


class NoPrediction:
    """A predictor that knows nothing: what an admission policy needs beside it."""

    def __init__(self, uses: Uses) -> None:
        self.uses = uses

    def observe(self, use: Use) -> None:
        """Of no interest."""

    def probability(self, slot: int, within_s: float, now: float) -> float:
        return 0.0


class Shard:
    """A core; `now` moves only when told to, in steps the core takes for running."""

    def __init__(
        self,
        blocks: int = 8,
        quotas: Mapping[str, int] | None = None,
        incarnation: Incarnation = INCARNATION,
        policy: MakePolicy = POLICIES["lru"],
        tiering: Tiering | None = None,
        make_admission: MakeAdmission | None = None,
        **limits: float,
    ) -> None:
        bounds = CoreLimits(**limits)  # type: ignore[arg-type]
        config = CoreConfig(
            ShardId("shard"), incarnation, blocks * NBYTES, bounds, quotas or {}, tiering=tiering or Tiering()
        )
        predictor = NoPrediction if make_admission else None
        self.core = ShardCore(config, policy, predictor, make_admission)
        self.now = 0.0
        self._requests = 0
        self.open(NAMESPACE, MODEL)

    def open(self, namespace: NamespaceId, model_id: str, tenant: str = "default") -> None:
        opened = Namespace(model_id, LAYOUT, tenant)
        self.core.open_namespace(namespace, opened)
        for known in (E1, E2, E3):
            self.core.register_epoch(model_id, known)

    def begin(
        self,
        keys: Sequence[int],
        of: Epoch = E1,
        quality: Quality = LOSSLESS,
        *,
        namespace: NamespaceId = NAMESPACE,
        nbytes: int = NBYTES,
        lease_s: float = 10.0,
        request: bytes | None = None,
        retention: Retention | None = None,
    ) -> Txn:
        """Offer the keys; key n is block n % 100 of the chain that starts at n - n % 100."""
        self._requests += 1
        request = self._requests.to_bytes(8, "big") if request is None else request
        offers = [_offer(n, nbytes, retention) for n in keys]
        return self.core.begin(namespace, of, quality, offers, "writer", lease_s, request, self.now)

    def write(self, txn: Txn) -> None:
        for i, refusal in enumerate(txn.refusals):
            if refusal is None:
                self.core.written(txn, i, None, self.now)

    def commit(self, txn: Txn, pin_for_s: float | None = None) -> tuple[BlockRef | Refusal, ...]:
        return self.core.blocks(self.core.commit(txn.id, pin_for_s, self.now))

    def put(
        self,
        keys: Sequence[int],
        of: Epoch = E1,
        quality: Quality = LOSSLESS,
        *,
        namespace: NamespaceId = NAMESPACE,
        retention: Retention | None = None,
    ) -> tuple[BlockRef | Refusal, ...]:
        """Begin, write what was granted, commit."""
        txn = self.begin(keys, of, quality, namespace=namespace, retention=retention)
        self.write(txn)
        return self.commit(txn)

    def match(
        self,
        keys: Sequence[int],
        of: Epoch = E1,
        *,
        namespace: NamespaceId = NAMESPACE,
        min_quality: Quality = LOSSLESS,
        at: Revision | None = None,
        lag: int = 0,
        lease_s: float = 10.0,
    ) -> Found:
        snapshot = Snapshot(namespace, of, min_quality, lag, at)
        matched = self.core.match(snapshot, [key(n) for n in keys], "reader", lease_s, self.now)
        assert all(map(self.core.index.versions.is_current, matched.slots, matched.generations))
        return Found(tuple(map(self.core.index.row, matched.slots)), matched.lease, matched.miss)

    def hits(self, keys: Sequence[int], of: Epoch = E1) -> int:
        """How many of the keys match; holds nothing afterwards."""
        matched = self.match(keys, of)
        self.release(matched.lease)
        return len(matched.versions)

    def present(self, keys: Sequence[int], of: Epoch = E1) -> set[int]:
        return {n for n in keys if self.hits([n], of)}

    def release(self, *leases: LeaseId | None) -> None:
        self.core.release([lease for lease in leases if lease is not None])

    # -- moves, as a mover sees them to their end ------------------------------------------------------

    def start(self, nbytes_max: int = 1 << 20) -> list[Move]:
        started = self.core.moves.start(self.now, nbytes_max)
        self.core.check_integrity()
        return started

    def move(self, nbytes_max: int = 1 << 20) -> int:
        """Perform all there is to move. How many of these moves stand."""
        stand = 0
        while (started := self.start(nbytes_max)) or self.core.moves.is_cut_short:
            for move in started:
                stand += self.core.moves.done(move)
                self.core.check_integrity()
        return stand

    def tiers(self, keys: Sequence[int], of: Epoch = E1, least: Quality = LOSSLESS) -> list[Tier | None]:
        """The fastest tier each of the keys lies on, one match a key; None: it is not seen."""
        found: list[Tier | None] = []
        for n in keys:
            matched = self.match([n], of, min_quality=least)
            found.append(matched.versions[0].tier if matched.versions else None)
            if matched.lease is not None:
                self.core.index.unpin(self.core._holds.end(matched.lease), used=False)
        return found

    def residences(self, n: int, quality: Quality = LOSSLESS) -> int:
        """Flags of the live version of a key; 0 when there is none."""
        table = self.core.index.versions
        rows = [r for r in self.core.index.rows() if r.key == key(n) and r.quality is quality]
        return next((table.residences[r.ref.slot] for r in rows if r.state is State.LIVE), 0)

    def revision(self) -> Revision:
        return Revision(INCARNATION, self.core.revision)

    def later(self, seconds: float) -> None:
        """Time passes as it does for a shard that runs: in small steps, with the reaper at each."""
        for _ in range(int(seconds)):
            self.now += 1.0
            self.core.reap(self.now)


def _offer(n: int, nbytes: int, retention: Retention | None) -> Offer:
    index = n % 100
    return Offer(key(n), key(n - 1) if index else ROOT_KEY, index, key(n - index), nbytes, retention)


@pytest.fixture
def shard() -> Iterator[Shard]:
    made = Shard()
    yield made
    made.core.check_integrity()
