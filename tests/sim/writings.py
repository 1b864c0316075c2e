"""Bytes that tell who wrote them, as what, and when: the oracle of simulated histories.

Every publication of a simulated client has a number. The first 8 bytes of a payload are that number, the
rest a function of everything its blocks are: namespace, key, epoch, quality, whether they were computed over
KV of other weights, and the number. So a reader tells the bytes of one writing from those that a later one
put in their place, and a wrong byte names its origin.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kvstore.nouns import BlockKey, Epoch, NamespaceId, Quality
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

    def payload(self, key: BlockKey) -> bytes:
        number = self.number.to_bytes(_NUMBER_NBYTES, "little")
        identity = self.epoch.number.to_bytes(8, "little") + self.epoch.weights_digest
        what = number + self.namespace + key + identity + bytes([self.quality % 251, self.foreign])
        return number + hashlib.shake_256(what).digest(LAYOUT.block_nbytes - _NUMBER_NBYTES)


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

    def origin(
        self, payload: memoryview, namespace: NamespaceId, key: BlockKey, epoch: Epoch, quality: Quality
    ) -> Writing:
        """The writing that these bytes are of. Raises Broken when they are not what they were read as."""
        asked = f"{key.hex()[:8]} (epoch {epoch.number}, {quality.name}) of {namespace.hex()[:8]}"
        number = int.from_bytes(payload[:_NUMBER_NBYTES], "little")
        if number >= len(self._all):
            raise Broken(f"wrong bytes for {asked}: nobody ever wrote them")
        found = self._all[number]
        is_what = found.namespace, found.epoch, found.quality, found.foreign
        if payload != found.payload(key) or is_what != (namespace, epoch, quality, False):
            raise Broken(f"a wrong hit: asked for {asked}, got bytes of {found}")
        return found
