"""Promise 1: a frame says what it is, and any bytes give a value or CorruptBlock."""

from __future__ import annotations

from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import CorruptBlock
from kvstore.frame import (
    HEADER_NBYTES,
    decode_frame,
    decode_header,
    encode_header,
    payload_checksum,
    verify_identity,
)
from kvstore.nouns import (
    BlockKey,
    BlockMeta,
    Epoch,
    LayoutFingerprint,
    MissReason,
    NamespaceId,
    Quality,
    Snapshot,
    WeightsDigest,
)

META = BlockMeta(
    namespace=NamespaceId(bytes(range(16))),
    key=BlockKey(bytes.fromhex("1f7c68fccf8996cf396d9b7a84ebe1b9fe1a819bb053dbe56e78ad6c60d7c611")),
    parent=BlockKey(bytes.fromhex("f3935ae2d656627e23d7d6e9ca5c5c3f78064abcc96dd7de62afb9c62ce0207b")),
    chain_index=1,
    placement=BlockKey(bytes.fromhex("f3935ae2d656627e23d7d6e9ca5c5c3f78064abcc96dd7de62afb9c62ce0207b")),
    epoch=Epoch(7, WeightsDigest(bytes(range(100, 116)))),
    quality=Quality.LOSSLESS,
    fingerprint=LayoutFingerprint(bytes.fromhex("161a947e9cd8951b45bc09cf8f10907a")),
)
PAYLOAD = b"payload bytes"
GOLDEN = bytes.fromhex(
    "4b565346" "0100" "0000" "e803" "0000" "01000000"  # magic, version, codec, quality, zero, chain index
    "00000000000000000000000000000000"  # codec digest
    "000102030405060708090a0b0c0d0e0f"  # namespace
    "1f7c68fccf8996cf396d9b7a84ebe1b9fe1a819bb053dbe56e78ad6c60d7c611"  # key
    "f3935ae2d656627e23d7d6e9ca5c5c3f78064abcc96dd7de62afb9c62ce0207b"  # parent
    "f3935ae2d656627e23d7d6e9ca5c5c3f78064abcc96dd7de62afb9c62ce0207b"  # placement
    "0700000000000000" "6465666768696a6b6c6d6e6f70717273"  # epoch
    "161a947e9cd8951b45bc09cf8f10907a"  # layout
    "0d00000000000000" "81cf1439f171f805"  # payload's size and checksum
    + "00" * 48
    + "ba72152ae484072c"  # checksum of all before it
)  # fmt: skip
FRAME = GOLDEN + PAYLOAD


def decoded(data: bytes) -> BlockMeta | MissReason:
    try:
        return decode_frame(data)[0].meta
    except CorruptBlock as error:
        return error.reason


def sealed(body: bytes) -> bytes:
    """A header with a true checksum over whatever stands in it."""
    return body[:248] + xxhash.xxh3_64_intdigest(body[:248]).to_bytes(8, "little")


def test_header_golden_vector() -> None:
    assert encode_header(META, PAYLOAD) == GOLDEN
    assert len(GOLDEN) == HEADER_NBYTES


def test_a_frame_is_read_back_as_it_was_written() -> None:
    frame, payload = decode_frame(FRAME)
    assert frame.meta == META
    assert bytes(payload) == PAYLOAD
    assert (frame.payload_nbytes, frame.payload_xxh3) == (len(PAYLOAD), payload_checksum(PAYLOAD))


@settings(derandomize=True, max_examples=300)
@given(st.binary(max_size=2 * HEADER_NBYTES))
def test_any_bytes_are_refused_by_a_reason(data: bytes) -> None:
    assert isinstance(decoded(data), MissReason)


@settings(derandomize=True, max_examples=300)
@given(st.binary(min_size=248, max_size=248), st.booleans(), st.binary(max_size=32))
def test_any_sealed_header_gives_a_value_or_a_reason(body: bytes, ours: bool, payload: bytes) -> None:
    """A checksum that holds proves nothing about who made it: fields are still looked at one by one."""
    data = sealed(GOLDEN[:6] + body[6:] if ours else body)
    assert isinstance(decoded(data + payload), BlockMeta | MissReason)


@pytest.mark.parametrize("position", range(len(FRAME)))
def test_no_flipped_bit_gets_through(position: int) -> None:
    for bit in (1, 0x80):
        torn = bytearray(FRAME)
        torn[position] ^= bit
        assert decoded(bytes(torn)) in (MissReason.CHECKSUM, MissReason.BAD_HEADER)


@pytest.mark.parametrize("nbytes", [0, 1, 255, 256, len(FRAME) - 1, len(FRAME) + 1])
def test_a_frame_of_another_length_is_no_frame(nbytes: int) -> None:
    assert decoded((FRAME + b"\0")[:nbytes]) is MissReason.BAD_HEADER


FORGED = [
    ("version 2", 4, b"\x02\x00"),
    ("unknown quality", 8, b"\xe9\x03"),
    ("reserved not zero", 10, b"\x01\x00"),
    ("payload over 1 GiB", 184, (2**30 + 1).to_bytes(8, "little")),
]


@pytest.mark.parametrize(("what", "offset", "field"), FORGED, ids=[name for name, *_ in FORGED])
def test_what_we_do_not_read_is_refused_although_sealed(what: str, offset: int, field: bytes) -> None:
    forged = sealed(GOLDEN[:offset] + field + GOLDEN[offset + len(field) :])
    assert decoded(forged + PAYLOAD) is MissReason.BAD_HEADER, what


OTHER_DIGEST = WeightsDigest(bytes(16))
SNAPSHOT = Snapshot(META.namespace, META.epoch)
IDENTITIES = [
    ("itself", META, SNAPSHOT, None),
    ("namespace", replace(META, namespace=NamespaceId(bytes(16))), SNAPSHOT, MissReason.OTHER_NAMESPACE),
    ("key", replace(META, key=META.parent), SNAPSHOT, MissReason.OTHER_KEY),
    ("layout", replace(META, fingerprint=LayoutFingerprint(bytes(16))), SNAPSHOT, MissReason.OTHER_LAYOUT),
    ("weights", replace(META, epoch=Epoch(7, OTHER_DIGEST)), SNAPSHOT, MissReason.OTHER_WEIGHTS),
    ("older epoch", replace(META, epoch=Epoch(6, OTHER_DIGEST)), SNAPSHOT, MissReason.OTHER_EPOCH),
    ("newer epoch", replace(META, epoch=Epoch(8, OTHER_DIGEST)), SNAPSHOT, MissReason.OTHER_EPOCH),
    ("within the lag", replace(META, epoch=Epoch(6, OTHER_DIGEST)), replace(SNAPSHOT, stale_lag_max=1), None),
    ("quality", replace(META, quality=Quality.INT8), SNAPSHOT, MissReason.LOW_QUALITY),
    (
        "quality allowed",
        replace(META, quality=Quality.INT8),
        replace(SNAPSHOT, min_quality=Quality.FP8),
        None,
    ),
]


@pytest.mark.parametrize(("what", "meta", "snapshot", "miss"), IDENTITIES, ids=[row[0] for row in IDENTITIES])
def test_only_the_block_that_was_asked_for_is_used(
    what: str, meta: BlockMeta, snapshot: Snapshot, miss: MissReason | None
) -> None:
    frame = decode_header(encode_header(meta, PAYLOAD))
    assert verify_identity(frame, snapshot, META.key, META.fingerprint) is miss, what
