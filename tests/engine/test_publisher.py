"""Publishing's promises: it never holds up computing, its memory is bounded, no pin is anybody's loss."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import pytest

from engine.background import Background
from engine.parallel.session import Session
from engine.publisher import Publication, Publisher, PublishLimits
from engine.store_link import StoreLink
from engine.types import CompletedBlock
from kvstore.answers import VerifiedBlock
from kvstore.clock import MonotonicClock
from kvstore.hashing import KeyChain
from kvstore.lineage import Lineage
from kvstore.nouns import BlockKey, Epoch, KVLayout, NamespaceSpec, Quality, WeightsDigest
from kvstore.topology import Topology
from tests.gates import GatedShard
from tests.role_parts import WAIT_S, assert_store_is_free, over

LAYOUT = KVLayout(1, 0, 1, 4, "float32", block_tokens=4)
EPOCH = Epoch(1, WeightsDigest(b"weights of a day"))


@dataclass
class Scene:
    shard: GatedShard
    session: Session
    background: Background
    publisher: Publisher

    def open(self, lineage: Lineage | None = None, *, blocks: int = 8) -> Publication:
        chain = KeyChain(self.session.namespace, LAYOUT.block_tokens)
        chain.extend(range(blocks * LAYOUT.block_tokens))
        return self.publisher.open(self.session, chain, lineage or Lineage(EPOCH), owner="me", pin_for_s=60.0)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    driver, background = GatedShard(), Background()
    spec = NamespaceSpec("m", LAYOUT, bytes(16))
    link = StoreLink(over([driver]), Topology(0, ()), spec, EPOCH, background, MonotonicClock())
    session = await link.session("default")
    assert session is not None
    limits = PublishLimits(inflight_nbytes_max=3 * LAYOUT.block_nbytes, batch_blocks_max=2)
    yield Scene(driver, session, background, Publisher(link, background, limits))
    driver.gate.open()
    await background.settle(WAIT_S)
    await link.close()


def block(index: int) -> CompletedBlock:
    return CompletedBlock("r", 1, index, np.full(LAYOUT.block_nbytes, index, np.uint8))


async def test_published_blocks_are_pinned_and_readable(scene: Scene) -> None:
    publication = scene.open()
    for index in range(3):
        publication.offer(block(index))
    assert await publication.settle(WAIT_S)
    assert sorted(publication.pins) == [0, 1, 2]
    (read,) = [one async for one in scene.session.read([publication.pins[2]], timeout_s=WAIT_S)]
    assert isinstance(read, VerifiedBlock)
    assert bytes(read.payload) == block(2).payload.tobytes()
    publication.close()
    await scene.background.settle(WAIT_S)
    await assert_store_is_free([scene.shard])


async def test_beyond_the_bound_blocks_are_dropped_counted_and_the_chain_stays_gapless(scene: Scene) -> None:
    scene.shard.gate.at = "begin before"
    publication = scene.open()
    for index in range(5):
        publication.offer(block(index))  # returns at once, though the store stands still
    assert scene.publisher.inflight_nbytes == 3 * LAYOUT.block_nbytes
    assert scene.publisher.counters["publish:dropped"] == 2
    scene.shard.gate.open()
    assert await publication.settle(WAIT_S)
    publication.offer(block(5))  # there is room again, but nobody could reach it
    assert scene.publisher.counters["publish:dropped"] == 6
    assert scene.publisher.inflight_nbytes == 0
    assert sorted(publication.pins) == []  # the gap was known before the first batch was sent
    publication.close()


async def test_a_bounded_wait_that_is_not_enough_leaves_the_rest_to_the_background(scene: Scene) -> None:
    scene.shard.gate.at = "commit after"
    publication = scene.open()
    publication.offer(block(0))
    await scene.shard.gate.reached()
    assert await publication.settle(0.001) is False
    publication.close()  # the pins that are on their way are nobody's from here on
    scene.shard.gate.open()
    assert await scene.background.settle(WAIT_S)
    await assert_store_is_free([scene.shard])
    match = await scene.session.match(_keys(scene, 1), owner="you", lease_s=9, timeout_s=WAIT_S)
    assert len(match.blocks) == 1, "what was computed is published all the same"
    await scene.session.release(match.leases)


@pytest.mark.parametrize(
    ("lineage", "quality"),
    [
        (Lineage(EPOCH), Quality.LOSSLESS),
        (Lineage(EPOCH).absorb(EPOCH, Quality.INT8), Quality.INT8),
        (Lineage(EPOCH).absorb(Epoch(0, WeightsDigest(bytes(16))), Quality.LOSSLESS), None),
    ],
    ids=["exact", "lossy", "foreign"],
)
async def test_blocks_are_published_at_their_lineages_floor_or_not_at_all(
    scene: Scene, lineage: Lineage, quality: Quality | None
) -> None:
    """Promise 3: nothing computed over old or lesser KV is ever published as new."""
    publication = scene.open(lineage)
    publication.offer(block(0))
    assert await publication.settle(WAIT_S)
    versions = [*scene.shard.core.index.rows()]
    assert [version.quality for version in versions] == ([] if quality is None else [quality])
    assert scene.publisher.counters["publish:withheld"] == (quality is None)
    publication.close()


async def test_what_is_discarded_is_not_published_but_what_is_on_its_way(scene: Scene) -> None:
    scene.shard.gate.at = "begin before"
    publication = scene.open()
    for index in range(3):
        publication.offer(block(index))
    await scene.shard.gate.reached()  # a batch of two is on its way
    publication.discard()
    publication.offer(block(3))
    scene.shard.gate.open()
    assert await publication.settle(WAIT_S)
    assert sorted(publication.pins) == [0, 1]
    counters = scene.publisher.counters
    assert (counters["publish:dropped"], counters["publish:withheld"]) == (1, 1)
    publication.close()


async def test_a_store_that_fails_costs_the_publication_only(scene: Scene) -> None:
    await scene.shard.close()
    publication = scene.open()
    publication.offer(block(0))
    assert await publication.settle(WAIT_S)
    assert publication.pins == {}
    assert scene.publisher.counters["publish:refused"] == 1
    assert scene.publisher.inflight_nbytes == 0


def _keys(scene: Scene, blocks: int) -> list[BlockKey]:
    chain = KeyChain(scene.session.namespace, LAYOUT.block_tokens)
    chain.extend(range(blocks * LAYOUT.block_tokens))
    return chain.keys
