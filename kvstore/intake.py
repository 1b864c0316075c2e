"""Frames of open transactions on their way into a shard: copied, verified in the copy, stored.

Whatever is asked for while bytes are copied or stored may have changed when that is done: the core is asked
again before anything is believed.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from kvstore.arrival import arrive
from kvstore.clock import Clock
from kvstore.core.shard import ShardCore
from kvstore.core.transactions import Txn
from kvstore.core.versions import Version
from kvstore.errors import KVStrataError, Unavailable
from kvstore.nouns import Refusal, TxnId
from kvstore.tiers.base import TierStorage, place_of

log = structlog.get_logger(__name__)


class Intake:
    def __init__(self, core: ShardCore, storage: TierStorage, clock: Clock) -> None:
        self._core = core
        self._storage = storage
        self._clock = clock

    async def write(
        self, txn_id: TxnId, frames: Sequence[tuple[int, bytes, memoryview]]
    ) -> list[Refusal | None]:
        """One after the other. Raises LeaseExpired, and Unavailable when storage fails."""
        return [await self._write(txn_id, *frame) for frame in frames]

    async def _write(self, txn_id: TxnId, index: int, header: bytes, payload: memoryview) -> Refusal | None:
        txn = self._core.txn(txn_id, self._clock.now())
        if not 0 <= index < len(txn.slots):
            return Refusal.MISMATCH
        version = self._core.granted(txn, index)
        if version is None or version.written:
            return txn.refused.get(index)  # why it was not granted; None for a frame that is here already
        refusal, frame = await self._verified_copy(txn, version, header, payload)
        place = place_of(version.ref)
        try:
            if refusal is None:
                await self._storage.write(place, frame)
            # The transaction may have expired while we copied.
            self._core.written(self._core.txn(txn_id, self._clock.now()), index, refusal, self._clock.now())
        except OSError as error:
            shard = self._core.config.shard
            self._core.counters["storage_error:write"] += 1
            log.warning("storage failed", shard=shard, what="write", error=str(error))
            raise Unavailable(f"shard {shard} could not store the frame: {error}; try again") from error
        except KVStrataError:
            # Nobody waits for these bytes, unless a copy of them that came first was committed meanwhile.
            if self._core.index.at(place.slot, place.generation) is None:
                self._storage.discard(place)
            raise
        return refusal

    async def _verified_copy(
        self, txn: Txn, version: Version, header: bytes, payload: memoryview
    ) -> tuple[Refusal | None, memoryview]:
        nbytes = len(header) + payload.nbytes
        if nbytes != version.nbytes:
            return Refusal.MISMATCH, payload
        layout = self._core.namespace(txn.namespace).layout
        expected = version.meta(layout.fingerprint)
        return await arrive(self._storage, header, payload, expected, layout)
