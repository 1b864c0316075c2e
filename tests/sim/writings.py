"""Bytes that tell who wrote them, as what, and when: the oracle of simulated histories.

Every publication of a simulated client has a number. The first 8 bytes of a payload are that number, the
rest a function of everything its blocks are: namespace, key, epoch, quality, whether they were computed over
KV of other weights, and the number. So a reader tells the bytes of one writing from those that a later one
put in their place, and a wrong byte names its origin.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from kvstore.frame import decode_frame, encode_header
from kvstore.nouns import BlockKey, Epoch, KVLayout, NamespaceId, Quality
from tests.kvstore.oracle import LAYOUT

_NUMBER_NBYTES = 8


class Broken(AssertionError):
    """A promise that did not hold, in words."""


@dataclass(frozen=True, slots=True)
class Writing:
    """What the blocks of one publication truly are, whatever they are published as."""

    number: int
    by: str
    namespace: NamespaceId
    epoch: Epoch
    quality: Quality
    foreign: bool  # computed over KV of other weights: true of no epoch at all

    def payload(self, key: BlockKey, quality: Quality | None = None) -> bytes:
        """Of the block as it was written, or as a tier below encoded it."""
        number = self.number.to_bytes(_NUMBER_NBYTES, "little")
        identity = self.epoch.number.to_bytes(8, "little") + self.epoch.weights_digest
        kind = bytes([(quality or self.quality) % 251, self.foreign])
        what = number + self.namespace + key + identity + kind
        return number + hashlib.shake_256(what).digest(LAYOUT.block_nbytes - _NUMBER_NBYTES)


def encoded_quality(quality: Quality) -> Quality:
    """What the toy codec makes of it."""
    return Quality.INT8 if quality is Quality.LOSSLESS else quality


class Writings:
    """All of one history."""

    def __init__(self) -> None:
        self._all: list[Writing] = []

    def new(
        self, by: str, namespace: NamespaceId, epoch: Epoch, quality: Quality, *, foreign: bool = False
    ) -> Writing:
        writing = Writing(len(self._all), by, namespace, epoch, quality, foreign)
        self._all.append(writing)
        return writing

    def encode(self, frame: memoryview, layout: KVLayout) -> memoryview | None:
        """The toy codec: as good as any lossy one, and whose bytes they are can still be told."""
        found, payload = decode_frame(frame)
        writing = self._all[int.from_bytes(payload[:_NUMBER_NBYTES], "little")]
        quality = encoded_quality(found.meta.quality)
        body = writing.payload(found.meta.key, quality)
        made = encode_header(dataclasses.replace(found.meta, quality=quality), body) + body
        return memoryview(bytearray(made))

    def origin(
        self, payload: memoryview, namespace: NamespaceId, key: BlockKey, epoch: Epoch, quality: Quality
    ) -> Writing:
        """The writing that these bytes are of. Raises Broken when they are not what they were read as."""
        asked = f"{key.hex()[:8]} (epoch {epoch.number}, {quality.name}) of {namespace.hex()[:8]}"
        number = int.from_bytes(payload[:_NUMBER_NBYTES], "little")
        if number >= len(self._all):
            raise Broken(f"wrong bytes for {asked}: nobody ever wrote them")
        found = self._all[number]
        is_what = found.namespace, found.epoch, found.foreign
        as_written = quality in (found.quality, encoded_quality(found.quality))
        if payload != found.payload(key, quality) or is_what != (namespace, epoch, False) or not as_written:
            raise Broken(f"a wrong hit: asked for {asked}, got bytes of {found}")
        return found
