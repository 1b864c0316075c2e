"""Blocks whose bytes follow from who they are: what a read answers is compared with what it must be."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kvstore.frame import decode_frame, encode_header
from kvstore.nouns import (
    ROOT_KEY,
    BlockKey,
    BlockMeta,
    Epoch,
    LayoutFingerprint,
    NamespaceId,
    Quality,
    WeightsDigest,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A block by what makes it one: namespace, key, epoch, quality. `nbytes` is of the payload."""

    key: int
    epoch: int = 1
    namespace: int = 0
    quality: Quality = Quality.LOSSLESS
    nbytes: int = 4096

    @property
    def meta(self) -> BlockMeta:
        return BlockMeta(
            namespace=namespace_of(self.namespace),
            key=key_of(self.key),
            parent=ROOT_KEY,
            chain_index=0,
            placement=key_of(self.key),
            epoch=epoch_of(self.epoch),
            quality=self.quality,
            fingerprint=LayoutFingerprint(bytes(16)),
        )

    def payload(self) -> bytes:
        """A function of the whole identity: an oracle."""
        name = f"{self.namespace}/{self.key}/{self.epoch}/{self.quality}/{self.nbytes}"
        return hashlib.shake_128(name.encode()).digest(self.nbytes)

    def frame(self) -> memoryview:
        payload = self.payload()
        return memoryview(bytearray(encode_header(self.meta, payload) + payload))


def namespace_of(number: int) -> NamespaceId:
    return NamespaceId(number.to_bytes(16, "little"))


def key_of(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(32, "little"))


def epoch_of(number: int) -> Epoch:
    return Epoch(number, WeightsDigest(number.to_bytes(16, "little")))


def block_of(meta: BlockMeta, payload_nbytes: int) -> Block:
    return Block(
        int.from_bytes(meta.key, "little"),
        meta.epoch.number,
        int.from_bytes(meta.namespace, "little"),
        meta.quality,
        payload_nbytes,
    )


def verified(frame: memoryview) -> Block:
    """Which block these bytes are. Raises CorruptBlock, and AssertionError for bytes that are not its own."""
    header, payload = decode_frame(frame)
    block = block_of(header.meta, payload.nbytes)
    assert header.meta == block.meta
    assert payload == block.payload(), f"wrong bytes for {block}"
    return block
