"""Headers judged as columns are judged as they are one by one: the same reasons, for any bytes."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codecs.frames import why_unreadable
from kvstore.errors import CorruptBlock
from kvstore.frame import HEADER_NBYTES, LOSSLESS_CODEC, decode_frame, encode_header, verify_identity
from kvstore.frame_columns import identities, verdicts
from kvstore.nouns import (
    BlockKey,
    BlockMeta,
    Epoch,
    MissReason,
    NamespaceId,
    Quality,
    Snapshot,
    WeightsDigest,
)
from tests.kvstore.oracle import LAYOUT, epoch

NAMESPACE = NamespaceId(bytes(range(16)))
SNAPSHOT = Snapshot(NAMESPACE, epoch(5), Quality.INT8, stale_lag_max=2)
KEYS = [BlockKey(hashlib.sha256(b"%d" % i).digest()) for i in range(4)]

metas = st.builds(
    BlockMeta,
    namespace=st.sampled_from([NAMESPACE, NAMESPACE, NamespaceId(bytes(16))]),
    key=st.sampled_from(KEYS),
    parent=st.sampled_from(KEYS),
    chain_index=st.integers(0, 2**32 - 1),
    placement=st.sampled_from(KEYS),
    epoch=st.sampled_from(
        [epoch(5), epoch(5), epoch(4), epoch(2), epoch(6), Epoch(5, WeightsDigest(bytes(16)))]
    ),
    quality=st.sampled_from(list(Quality)),
    fingerprint=st.sampled_from(
        [LAYOUT.fingerprint, LAYOUT.fingerprint, dataclasses.replace(LAYOUT, layers=1).fingerprint]
    ),
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """A frame that is right, or nearly, or not at all; some are resealed: only their sense is wrong."""
    payload = bytes([draw(st.integers(0, 255))]) * (LAYOUT.block_nbytes - draw(st.sampled_from([0, 0, 0, 1])))
    codec = draw(st.sampled_from([LOSSLESS_CODEC, LOSSLESS_CODEC, LOSSLESS_CODEC, 3]))
    frame = bytearray(encode_header(draw(metas), payload, codec) + payload)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(
            st.one_of(st.integers(0, HEADER_NBYTES - 1), st.integers(0, len(frame) - 1), st.integers(4, 11))
        )
        frame[at] ^= 1 << draw(st.integers(0, 7))
        if draw(st.booleans()):
            frame[248:256] = xxhash.xxh3_64_intdigest(bytes(frame[:248])).to_bytes(8, "little")
    return bytes(frame)


def one_by_one(frame: bytes, key: BlockKey) -> MissReason | None:
    """What a session does with a frame that came over a stream."""
    try:
        decoded, _ = decode_frame(frame)
        reason = verify_identity(decoded, SNAPSHOT, key, LAYOUT.fingerprint)
    except CorruptBlock as error:
        return error.reason
    return reason or why_unreadable(decoded, LAYOUT)


def judged(some: list[bytes], keys: list[BlockKey]) -> list[MissReason | None]:
    headers = np.stack([np.frombuffer(f[:HEADER_NBYTES], dtype=np.uint8) for f in some])
    sizes = np.array([len(f) - HEADER_NBYTES for f in some], dtype=np.int64)
    sums = np.array([xxhash.xxh3_64_intdigest(f[HEADER_NBYTES:]) for f in some], dtype=np.uint64)
    return verdicts(headers, sizes, sums, keys, SNAPSHOT, LAYOUT)


@given(st.lists(st.tuples(frames(), st.sampled_from(KEYS)), min_size=1, max_size=6))
def test_columns_and_single_headers_are_judged_alike(some: list[tuple[bytes, BlockKey]]) -> None:
    keys = [key for _, key in some]
    got = judged([frame for frame, _ in some], keys)
    for (frame, key), reason in zip(some, got, strict=True):
        expected = one_by_one(frame, key)
        if len(frame) - HEADER_NBYTES != LAYOUT.block_nbytes and expected is MissReason.CHECKSUM:
            assert reason is not None  # the bytes of a payload of another size are not looked at
        else:
            assert reason is expected


def test_a_right_row_among_wrong_ones_is_accepted_with_its_own_epoch_and_quality() -> None:
    payload = bytes(LAYOUT.block_nbytes)
    rows = []
    for i, (of, quality) in enumerate(
        [(epoch(5), Quality.INT8), (epoch(4), Quality.LOSSLESS), (epoch(1), Quality.INT8)]
    ):
        meta = BlockMeta(NAMESPACE, KEYS[i], KEYS[0], i, KEYS[0], of, quality, LAYOUT.fingerprint)
        rows.append(encode_header(meta, payload) + payload)
    assert judged(rows, KEYS[:3]) == [None, None, MissReason.OTHER_EPOCH]
    headers = np.stack([np.frombuffer(row[:HEADER_NBYTES], dtype=np.uint8) for row in rows])
    assert identities(headers, SNAPSHOT)[:2] == [(epoch(5), Quality.INT8), (epoch(4), Quality.LOSSLESS)]
