"""One publication: what its blocks are published as, and the transaction that does it on one shard.

Begin, write what was granted, commit. Whatever goes wrong on the way, the caller's cancellation included,
the shard is told to abort: staged bytes go, and so do the pins of a commit whose answer was lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.answers import PublishBlock
from kvstore.deadline import Deadline
from kvstore.frame import HEADER_NBYTES, encode_header
from kvstore.nouns import (
    BlockMeta,
    Epoch,
    LayoutFingerprint,
    LeaseId,
    NamespaceId,
    PinnedBlock,
    Quality,
    Refusal,
    Tier,
)
from kvstore.peers import ERRAND_TIMEOUT_S, Peers
from kvstore.transport.base import REQUEST_ID_NBYTES, BlockOffer, ShardTransport

TXN_LEASE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Publication:
    namespace: NamespaceId
    epoch: Epoch
    quality: Quality
    fingerprint: LayoutFingerprint
    owner: str
    pin_for_s: float | None

    async def transact(
        self, peers: Peers, transport: ShardTransport, blocks: Sequence[PublishBlock], deadline: Deadline
    ) -> tuple[list[PinnedBlock | Refusal], LeaseId | None]:
        """One transaction; at most OFFERS_MAX blocks. Raises what the transport raises."""
        offers = [
            BlockOffer(b.key, b.parent, b.chain_index, b.placement, HEADER_NBYTES + b.payload.nbytes)
            for b in blocks
        ]
        request_id = secrets.token_bytes(REQUEST_ID_NBYTES)
        opened = await transport.begin(
            self.namespace, self.epoch, self.quality, offers, self.owner, TXN_LEASE_S, request_id,
            timeout_s=deadline.left(),
        )  # fmt: skip
        try:
            granted = [i for i, refusal in enumerate(opened.outcomes) if refusal is None]
            if granted:
                frames = [(i, self._header(blocks[i]), blocks[i].payload) for i in granted]
                refusals = await transport.write(opened.txn, frames, timeout_s=deadline.left())
                stored = [i for i, refusal in zip(granted, refusals, strict=True) if refusal is None]
                peers.counters["written_bytes"] += sum(offers[i].nbytes for i in stored)
            result = await transport.commit(opened.txn, self.pin_for_s, timeout_s=deadline.left())
        except BaseException:
            peers.send("abort", transport.abort(opened.txn, timeout_s=ERRAND_TIMEOUT_S))
            raise
        answers: list[PinnedBlock | Refusal] = [
            found
            if isinstance(found, Refusal)
            else PinnedBlock(block.key, found, self.epoch, self.quality, Tier.HOST)
            for block, found in zip(blocks, result.blocks, strict=True)
        ]
        peers.counters["published_blocks"] += sum(not isinstance(a, Refusal) for a in answers)
        return answers, result.lease

    def _header(self, block: PublishBlock) -> bytes:
        meta = BlockMeta(
            self.namespace,
            block.key,
            block.parent,
            block.chain_index,
            block.placement,
            self.epoch,
            self.quality,
            self.fingerprint,
        )
        return encode_header(meta, block.payload)
