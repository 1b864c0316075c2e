"""Who reads decodes: lossy blocks over every transport, verified as any other, at what they really are."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack

import pytest

from kvstore.answers import BlockMiss, Match, VerifiedBlock
from kvstore.client import StoreClient
from kvstore.codecs import CODECS, Codec
from kvstore.codecs.frames import encode_frame
from kvstore.driver import ShardDriver
from kvstore.errors import CorruptBlock
from kvstore.frame import HEADER_NBYTES, decode_frame, encode_header
from kvstore.hashing import KeyChain
from kvstore.nouns import BlockMeta, KVLayout, MissReason, NamespaceId, NamespaceSpec, Quality, Refusal
from kvstore.session import StoreSession
from kvstore.tensors import KVArray
from kvstore.topology import ShardEntry, Topology
from kvstore.transport.base import BlockOffer
from tests.kvstore.codecs.matrix import LOSSY, decoded, kv_like, payload_of
from tests.kvstore.conftest import TOKEN, Served
from tests.kvstore.oracle import TIMEOUT, epoch, new_driver

LAYOUT = KVLayout(1, 0, 2, 32, "float32", 8)
SPEC = NamespaceSpec("lossy", LAYOUT, tokenizer_digest=bytes(16))
E1 = epoch(1)
INT8 = CODECS["int8"]
BLOCKS = 3


class Place:
    """One shard and a client of it."""

    def __init__(self, driver: ShardDriver, client: StoreClient) -> None:
        self.driver, self.client = driver, client

    async def session(self, min_quality: Quality) -> StoreSession:
        return await self.client.open(SPEC, E1, min_quality=min_quality)

    async def write(self, quality: Quality, frames: Sequence[memoryview]) -> list[Refusal | None]:
        """Publish whole frames, one transaction, through the client's own transport."""
        (transport,) = self.client._peers.transports.values()
        metas = [meta_of(frame) for frame in frames]
        offers = [
            BlockOffer(meta.key, meta.parent, meta.chain_index, meta.placement, frame.nbytes)
            for meta, frame in zip(metas, frames, strict=True)
        ]
        opened = await transport.begin(
            metas[0].namespace, E1, quality, offers, "w", 10.0, secrets.token_bytes(16), timeout_s=TIMEOUT
        )
        assert set(opened.outcomes) == {None}
        parts = [(i, bytes(f[:HEADER_NBYTES]), f[HEADER_NBYTES:]) for i, f in enumerate(frames)]
        refusals = await transport.write(opened.txn, parts, timeout_s=TIMEOUT)
        await transport.commit(opened.txn, None, timeout_s=TIMEOUT)
        return refusals


@pytest.fixture(params=["local", "shm", "grpc"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        if request.param == "local":
            driver = new_driver(256, faults=True)
            yield Place(driver, StoreClient.over([driver]))
            return
        served = await Served.start("shard-0")
        stack.push_async_callback(served.stop)
        topology = Topology(1, (ShardEntry(served.driver.shard, served.address),))
        shared = request.param == "shm"
        connecting = await StoreClient.connect(topology, token=TOKEN, shared_memory=shared)
        yield Place(served.driver, await stack.enter_async_context(connecting))


def meta_of(frame: memoryview) -> BlockMeta:
    return decode_frame(frame)[0].meta


def chain(session: StoreSession) -> KeyChain:
    made = KeyChain(session.namespace, LAYOUT.block_tokens)
    made.extend(range(BLOCKS * LAYOUT.block_tokens))
    return made


def lossless(made: KeyChain, i: int, quality: Quality = Quality.LOSSLESS) -> memoryview:
    meta = BlockMeta(
        made.namespace, made.keys[i], made.parent(i), i, made.placement(i), E1, quality, LAYOUT.fingerprint
    )
    payload = payload_of(kv_like(LAYOUT, i), LAYOUT)
    return memoryview(encode_header(meta, payload) + bytes(payload))


def lossy(made: KeyChain, i: int, codec: Codec) -> memoryview:
    frame = encode_frame(lossless(made, i), codec, LAYOUT)
    assert frame is not None
    return frame


def as_read(frame: memoryview, codec: Codec) -> bytes:
    return bytes(decoded(codec, LAYOUT, frame[HEADER_NBYTES:]))


async def matched(session: StoreSession) -> Match:
    return await session.match(chain(session).keys, owner="r", lease_s=10.0, timeout_s=TIMEOUT)


async def both_ways(session: StoreSession, found: Match) -> list[tuple[bytes, Quality] | MissReason]:
    """By `read` and by `read_into`, which must answer alike."""
    streamed = [item async for item in session.read(found.blocks, timeout_s=TIMEOUT)]
    buffers = [bytearray(LAYOUT.block_nbytes) for _ in found.blocks]
    landed = await session.read_into(found.blocks, buffers, timeout_s=TIMEOUT)
    answers = [_said(item) for item in streamed]
    assert [_said(item) for item in landed] == answers
    for item, buffer in zip(landed, buffers, strict=True):
        assert isinstance(item, BlockMiss) or bytes(buffer) == bytes(item.payload)
    return answers


def _said(item: VerifiedBlock | BlockMiss) -> tuple[bytes, Quality] | MissReason:
    return item.reason if isinstance(item, BlockMiss) else (bytes(item.payload), item.quality)


@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
async def test_a_reader_who_opted_in_gets_decoded_blocks(place: Place, codec: Codec) -> None:
    session = await place.session(codec.quality)
    made = chain(session)
    frames = [lossy(made, i, codec) for i in range(BLOCKS)]
    assert await place.write(codec.quality, frames) == [None] * BLOCKS
    answers = await both_ways(session, await matched(session))
    assert answers == [(as_read(frame, codec), codec.quality) for frame in frames]
    assert place.client.counters["decoded_blocks"] == 2 * BLOCKS


async def test_a_reader_who_did_not_opt_in_never_sees_them(place: Place) -> None:
    session = await place.session(Quality.LOSSLESS)
    await place.write(Quality.INT8, [lossy(chain(session), 0, INT8)])
    assert ((await matched(session)).miss, len((await matched(session)).blocks)) == (
        MissReason.LOW_QUALITY,
        0,
    )
    better = await place.session(Quality.FP8)
    assert len((await matched(better)).blocks) == 1, "int8 is better than what was asked for"


async def test_lossless_bytes_at_a_lesser_floor_are_read_as_they_are(place: Place) -> None:
    session = await place.session(Quality.INT4)
    made = chain(session)
    frames = [lossless(made, 0, Quality.INT4), lossless(made, 1, Quality.INT4)]
    await place.write(Quality.INT4, frames)
    answers = await both_ways(session, await matched(session))
    assert answers == [(bytes(frame[HEADER_NBYTES:]), Quality.INT4) for frame in frames]


async def test_get_by_token_ids_floors_what_is_computed_over_it(place: Place) -> None:
    session = await place.session(Quality.INT4)
    made = chain(session)
    await place.write(Quality.INT8, [lossy(made, 0, INT8)])
    tokens = list(range(BLOCKS * LAYOUT.block_tokens))
    hit = await session.get(tokens)
    assert (hit.n_tokens, hit.lineage.publishable) == (LAYOUT.block_tokens, Quality.INT8)
    rest: KVArray = kv_like(LAYOUT, 1)
    put = await session.put(tokens[:16], rest, start=8, over=hit.lineage)
    assert put.n_tokens == 16
    found = await matched(session)
    assert [block.quality for block in found.blocks] == [Quality.INT8] * 2


@pytest.mark.parametrize(
    ("spoil", "quality"),
    [
        ("digest", Quality.INT8),
        ("number", Quality.INT8),
        ("size", Quality.INT8),
        ("quality", Quality.K4V4),
        ("codec of lossless", Quality.LOSSLESS),
    ],
)
async def test_a_shard_takes_no_frame_that_its_codec_never_made(
    place: Place, spoil: str, quality: Quality
) -> None:
    session = await place.session(Quality.INT4)
    assert await place.write(quality, [spoiled(chain(session), spoil, quality)]) == [Refusal.MISMATCH]


def spoiled(made: KeyChain, how: str, quality: Quality) -> memoryview:
    """An encoded frame whose header and payload do not go together, though all checksums hold."""
    codec = CODECS["int4"] if how == "quality" else INT8
    frame, payload = decode_frame(lossy(made, 0, codec))
    digest, number, body = frame.codec_digest, frame.codec, bytes(payload)
    if how == "digest":
        digest = bytes(16)
    if how == "number":
        number = 77
    if how == "size":
        body = body[:-1]
    meta = dataclasses.replace(frame.meta, quality=quality)
    return memoryview(encode_header(meta, body, number, digest) + body)


@pytest.mark.parametrize("how", ["digest", "number"])
async def test_a_reader_who_cannot_decode_it_has_a_miss(
    place: Place, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of another version may hold what this reader does not know."""
    session = await place.session(Quality.INT4)
    monkeypatch.setattr("kvstore.arrival.is_true_to_codec", lambda *_: True)
    assert await place.write(Quality.INT8, [spoiled(chain(session), how, Quality.INT8)]) == [None]
    assert await both_ways(session, await matched(session)) == [MissReason.BAD_HEADER]


async def test_a_flipped_byte_of_an_encoded_block_is_a_miss(place: Place) -> None:
    session = await place.session(Quality.INT8)
    await place.write(Quality.INT8, [lossy(chain(session), 0, INT8)])
    found = await matched(session)
    assert place.driver.flip_stored_byte() is not None
    (answer,) = await session.read_into(found.blocks, [bytearray(LAYOUT.block_nbytes)], timeout_s=TIMEOUT)
    assert isinstance(answer, BlockMiss)
    assert answer.reason is MissReason.CHECKSUM


async def test_a_checksummed_payload_that_does_not_decode_is_a_miss(place: Place) -> None:
    """The scales are NaN, and so they were when the frame was made."""
    session = await place.session(Quality.INT8)
    frame, payload = decode_frame(lossy(chain(session), 0, INT8))
    body = b"\xff" * 64 + bytes(payload[64:])
    made = memoryview(encode_header(frame.meta, body, frame.codec, frame.codec_digest) + body)
    assert await place.write(Quality.INT8, [made]) == [None]
    assert await both_ways(session, await matched(session)) == [MissReason.BAD_HEADER]


def test_an_encoded_frame_differs_in_what_it_went_through_only() -> None:
    made = KeyChain(NamespaceId(bytes(16)), LAYOUT.block_tokens)
    made.extend(range(LAYOUT.block_tokens))
    before, after = meta_of(lossless(made, 0)), decode_frame(lossy(made, 0, INT8))[0]
    assert after.meta == dataclasses.replace(before, quality=Quality.INT8)
    assert (after.codec, after.codec_digest) == (INT8.number, INT8.digest(LAYOUT))
    floored = encode_frame(lossless(made, 0, Quality.INT4), INT8, LAYOUT)
    assert floored is not None
    assert meta_of(floored).quality is Quality.INT4, "no codec makes a block better"


def test_only_an_intact_lossless_frame_of_the_layout_is_encoded() -> None:
    made = KeyChain(NamespaceId(bytes(16)), LAYOUT.block_tokens)
    made.extend(range(LAYOUT.block_tokens))
    with pytest.raises(ValueError, match="not to be encoded"):
        encode_frame(lossy(made, 0, INT8), INT8, LAYOUT)
    with pytest.raises(ValueError, match="not to be encoded"):
        encode_frame(lossless(made, 0), INT8, dataclasses.replace(LAYOUT, layers=2))
    torn = bytearray(lossless(made, 0))
    torn[-1] ^= 1
    with pytest.raises(CorruptBlock):
        encode_frame(memoryview(torn), INT8, LAYOUT)
