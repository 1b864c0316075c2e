"""Promise: ranks use no more of a prefix than every one of them has, and claim no more than the worst."""

from __future__ import annotations

import copy

from engine.parallel.agreement import RankedBlock, joined_block, shortest_match, whole_publication
from engine.parallel.session import RankedChain
from kvstore.answers import BlockMiss, Match, Published, VerifiedBlock
from kvstore.hashing import KeyChain
from kvstore.nouns import (
    BlockKey,
    BlockRef,
    Epoch,
    Incarnation,
    LeaseId,
    MissReason,
    NamespaceId,
    PinnedBlock,
    Quality,
    Refusal,
    ShardId,
    Tier,
    WeightsDigest,
)

OURS = Epoch(7, WeightsDigest(bytes(16)))
OLDER = Epoch(6, WeightsDigest(bytes(16)))
SHARD = ShardId("s0")


def pinned(slot: int) -> PinnedBlock:
    return PinnedBlock(
        BlockKey(bytes([slot]) * 32),
        BlockRef(SHARD, Incarnation(1), slot, 0),
        OURS,
        Quality.LOSSLESS,
        Tier.HOST,
    )


def verified(payload: bytes, epoch: Epoch = OURS, quality: Quality = Quality.LOSSLESS) -> VerifiedBlock:
    return VerifiedBlock(3, memoryview(payload), epoch, quality)


def test_the_shortest_match_is_what_there_is() -> None:
    first = Match([pinned(1), pinned(2), pinned(3)], ((SHARD, LeaseId(1)),), None)
    second = Match([pinned(4), pinned(5)], ((SHARD, LeaseId(2)),), MissReason.ABSENT)
    found = shortest_match([first, second])
    assert [block.ref.slot for block in found.blocks] == [1, 2]
    assert [block.others[0].ref.slot for block in found.blocks if isinstance(block, RankedBlock)] == [4, 5]
    assert found.leases == ((SHARD, 1), (SHARD, 2)), "what was pinned beyond it must be given back, too"
    assert found.miss is MissReason.ABSENT


def test_a_block_is_no_better_than_its_worst_part() -> None:
    joined = joined_block([verified(b"a0"), verified(b"a1", OLDER), verified(b"a2", quality=Quality.INT8)])
    assert isinstance(joined, VerifiedBlock)
    assert bytes(joined.payload) == b"a0a1a2"
    assert (joined.index, joined.epoch, joined.quality) == (3, OLDER, Quality.INT8)


def test_a_part_that_is_missing_is_a_miss() -> None:
    miss = BlockMiss(3, BlockKey(bytes(32)), MissReason.CHECKSUM)
    assert joined_block([verified(b"a0"), miss]) == miss


def test_a_block_is_published_when_all_parts_are() -> None:
    first = Published((pinned(1), pinned(2), Refusal.EXISTS), ())
    second = Published((pinned(4), Refusal.NO_SPACE, pinned(6)), ((SHARD, LeaseId(9)),))
    both = whole_publication([first, second])
    assert both.blocks == (pinned(1), Refusal.NO_SPACE, Refusal.EXISTS)
    assert both.leases == ((SHARD, 9),)


def test_a_block_of_a_handoff_keeps_its_parts_on_the_way() -> None:
    block = RankedBlock.of([pinned(1), pinned(2)])
    assert copy.deepcopy(block).others == (pinned(2),)


def test_keys_are_each_namespaces_own() -> None:
    names = [NamespaceId(bytes([rank]) * 16) for rank in (1, 2)]
    ranked, alone = RankedChain(names, 4), [KeyChain(name, 4) for name in names]
    for tokens in ([1, 2, 3], [4, 5, 6, 7, 8, 9]):
        for chain in (ranked, *alone):
            chain.extend(tokens)
    assert ranked.keys == alone[0].keys
    assert [key.others for key in ranked.keys] == [(key,) for key in alone[1].keys]  # type: ignore[attr-defined]
    assert ranked.pending == alone[0].pending == [9]
