"""Blocks whose bytes tell where they come from: a keyed function of (key, epoch, quality).

Any wrong byte a test reads names its origin; a right block can be recomputed from its identity alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kvstore.driver import ShardDriver
from kvstore.driver_config import DriverConfig
from kvstore.frame import HEADER_NBYTES, decode_frame, encode_header
from kvstore.hashing import KeyChain
from kvstore.nouns import (
    BlockKey,
    BlockMeta,
    BlockRef,
    Epoch,
    Incarnation,
    KVLayout,
    MissReason,
    NamespaceId,
    NamespaceSpec,
    Quality,
    Refusal,
    ShardId,
    WeightsDigest,
)
from kvstore.tiers.host import HostTier
from kvstore.transport.base import BlockOffer, CommitResult, MatchResult

LAYOUT = KVLayout(layers=2, head_begin=0, head_end=1, head_dim=4, dtype="float32", block_tokens=2)
SPEC = NamespaceSpec("oracle", LAYOUT, tokenizer_digest=bytes(16))
FRAME_NBYTES = HEADER_NBYTES + LAYOUT.block_nbytes
SECRET = b"a cluster secret of some length"
TIMEOUT = 5.0


def epoch(number: int) -> Epoch:
    return Epoch(number, WeightsDigest(hashlib.sha256(b"weights%d" % number).digest()[:16]))


def payload(key: BlockKey, of: Epoch, quality: Quality = Quality.LOSSLESS) -> bytes:
    seed = hashlib.sha256(key + of.number.to_bytes(8, "little") + of.weights_digest + bytes([quality % 251]))
    return hashlib.shake_256(seed.digest()).digest(LAYOUT.block_nbytes)


def chain(namespace: NamespaceId, blocks: int, first_token: int = 0) -> KeyChain:
    made = KeyChain(namespace, LAYOUT.block_tokens)
    made.extend(range(first_token, first_token + blocks * LAYOUT.block_tokens))
    return made


def offer(made: KeyChain, i: int) -> BlockOffer:
    return BlockOffer(made.keys[i], made.parent(i), i, made.placement(i), FRAME_NBYTES)


def frame(made: KeyChain, i: int, of: Epoch, quality: Quality = Quality.LOSSLESS) -> tuple[bytes, memoryview]:
    meta = BlockMeta(
        made.namespace, made.keys[i], made.parent(i), i, made.placement(i), of, quality, LAYOUT.fingerprint
    )
    body = payload(made.keys[i], of, quality)
    return encode_header(meta, body), memoryview(body)


def new_driver(frames: int = 64, **changes: object) -> ShardDriver:
    config = DriverConfig(
        shard=ShardId("shard-0"),
        capacity_nbytes=frames * FRAME_NBYTES,
        cluster_secret=SECRET,
        incarnation=Incarnation(7),
        **changes,  # type: ignore[arg-type]
    )
    return ShardDriver(config, HostTier())


async def put(
    driver: ShardDriver,
    made: KeyChain,
    which: Sequence[int],
    of: Epoch,
    *,
    quality: Quality = Quality.LOSSLESS,
    pin_for_s: float | None = None,
    request_id: bytes = b"",
) -> CommitResult:
    """Begin, write what was granted, commit."""
    offers = [offer(made, i) for i in which]
    request_id = request_id or hashlib.sha256(repr((made.keys, which, of, quality)).encode()).digest()
    opened = await driver.begin(
        made.namespace, of, quality, offers, "writer", 10.0, request_id, timeout_s=TIMEOUT
    )
    granted = [n for n, refusal in enumerate(opened.outcomes) if refusal is None]
    frames = [(n, *frame(made, which[n], of, quality)) for n in granted]
    assert await driver.write(opened.txn, frames, timeout_s=TIMEOUT) == [None] * len(frames)
    return await driver.commit(opened.txn, pin_for_s, timeout_s=TIMEOUT)


async def get(
    driver: ShardDriver, namespace: NamespaceId, refs: Sequence[BlockRef]
) -> list[bytes | MissReason]:
    """Payloads as a reader sees them: verified, or the miss."""
    got: list[bytes | MissReason] = []
    async for item in driver.read(namespace, refs, timeout_s=TIMEOUT):
        if item.frame is None:
            assert item.miss is not None
            got.append(item.miss)
        else:
            got.append(bytes(decode_frame(item.frame)[1]))
    return got


def refs_in(matched: MatchResult) -> list[BlockRef]:
    """What a match of `new_driver`'s shard found."""
    incarnation = matched.revision.incarnation
    places = zip(matched.slots, matched.generations, strict=True)
    return [BlockRef(ShardId("shard-0"), incarnation, slot, generation) for slot, generation in places]


def refs_of(result: CommitResult) -> list[BlockRef]:
    assert not any(isinstance(block, Refusal) for block in result.blocks), result.blocks
    return [block for block in result.blocks if isinstance(block, BlockRef)]
