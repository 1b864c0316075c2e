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
    BlockKey,
    BlockMeta,
    Epoch,
    KVLayout,
    LeaseId,
    NamespaceId,
    PinnedBlock,
    Quality,
    Refusal,
    Tier,
    TxnId,
)
from kvstore.peers import ERRAND_TIMEOUT_S, Peers
from kvstore.retention import RetentionRange, of_block
from kvstore.transport.base import REQUEST_ID_NBYTES, BlockOffer, ShardTransport

TXN_LEASE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Publication:
    namespace: NamespaceId
    epoch: Epoch
    quality: Quality
    layout: KVLayout
    owner: str
    pin_for_s: float | None
    retention: Sequence[RetentionRange] = ()

    async def transact(
        self, peers: Peers, transport: ShardTransport, blocks: Sequence[PublishBlock], deadline: Deadline
    ) -> tuple[list[PinnedBlock | Refusal], LeaseId | None]:
        """One transaction; at most OFFERS_MAX blocks. Raises what the transport raises."""
        staged = await self.stage(peers, transport, blocks, TXN_LEASE_S, deadline)
        return await staged.commit(peers, self.pin_for_s, deadline)

    async def stage(
        self,
        peers: Peers,
        transport: ShardTransport,
        blocks: Sequence[PublishBlock],
        lease_s: float,
        deadline: Deadline,
    ) -> Staged:
        """Begin, and write what was granted: seen by nobody yet. Raises what the transport raises."""
        size = self.layout.block_tokens
        retentions = [of_block(self.retention, b.chain_index, size) for b in blocks]
        offers = [
            BlockOffer(b.key, b.parent, b.chain_index, b.placement, HEADER_NBYTES + b.payload.nbytes, said)
            for b, said in zip(blocks, retentions, strict=True)
        ]
        request_id = secrets.token_bytes(REQUEST_ID_NBYTES)
        opened = await transport.begin(
            self.namespace, self.epoch, self.quality, offers, self.owner, lease_s, request_id,
            timeout_s=deadline.left(),
        )  # fmt: skip
        staged = Staged(self, transport, opened.txn, [block.key for block in blocks], list(opened.outcomes))
        try:
            granted = [i for i, refusal in enumerate(opened.outcomes) if refusal is None]
            if granted:
                frames = [(i, self._header(blocks[i]), blocks[i].payload) for i in granted]
                refusals = await transport.write(opened.txn, frames, timeout_s=deadline.left())
                for i, refusal in zip(granted, refusals, strict=True):
                    staged.refused[i] = refusal
                    peers.counters["written_bytes"] += 0 if refusal else offers[i].nbytes
        except BaseException:
            staged.abort(peers)
            raise
        return staged

    def _header(self, block: PublishBlock) -> bytes:
        meta = BlockMeta(
            self.namespace,
            block.key,
            block.parent,
            block.chain_index,
            block.placement,
            self.epoch,
            self.quality,
            self.layout.fingerprint,
        )
        return encode_header(meta, block.payload)


@dataclass(frozen=True, slots=True)
class Staged:
    """A transaction of one shard that holds its blocks' bytes. `refused[i]`: why block i will not land."""

    publication: Publication
    transport: ShardTransport
    txn: TxnId
    keys: list[BlockKey]
    refused: list[Refusal | None]

    async def commit(
        self, peers: Peers, pin_for_s: float | None, deadline: Deadline
    ) -> tuple[list[PinnedBlock | Refusal], LeaseId | None]:
        """Visible from here on. Raises what the transport raises."""
        try:
            result = await self.transport.commit(self.txn, pin_for_s, timeout_s=deadline.left())
        except BaseException:
            self.abort(peers)
            raise
        epoch, quality = self.publication.epoch, self.publication.quality
        answers: list[PinnedBlock | Refusal] = [
            found if isinstance(found, Refusal) else PinnedBlock(key, found, epoch, quality, Tier.HOST)
            for key, found in zip(self.keys, result.blocks, strict=True)
        ]
        peers.counters["published_blocks"] += sum(not isinstance(a, Refusal) for a in answers)
        return answers, result.lease

    def abort(self, peers: Peers) -> None:
        """In the background, bounded: what the shard does not hear of expires."""
        peers.send("abort", self.transport.abort(self.txn, timeout_s=ERRAND_TIMEOUT_S))
