"""Encoded frames: made of lossless ones, judged by their headers, decoded into a reader's memory.

A frame whose header names a codec has that codec's digest for the layout, just its encoded size, and claims
no better quality than the codec's. A frame that no codec touched has the layout's size, whatever it claims
to be: KV that was computed over lossy KV is published at that floor. Anything else is no block of ours.
"""

from __future__ import annotations

import dataclasses
import functools

from kvstore.codecs import BY_NUMBER, Codec
from kvstore.codecs.exact import can_decode
from kvstore.errors import CorruptBlock
from kvstore.frame import HEADER_NBYTES, LOSSLESS_CODEC, Frame, decode_frame, encode_header
from kvstore.nouns import KVLayout, MissReason, Quality
from kvstore.tiers.copying import join

__all__ = [
    "decode_payload",
    "encode_frame",
    "encoded_frame_nbytes",
    "encoded_sizes",
    "is_true_to_codec",
    "why_unreadable",
]


def encoded_frame_nbytes(codec: Codec, layout: KVLayout) -> int:
    """Of the whole frame that `encode_frame` answers."""
    return HEADER_NBYTES + codec.encoded_nbytes(layout)


def encode_frame(frame: memoryview, codec: Codec, layout: KVLayout) -> memoryview | None:
    """The block of a whole frame as a frame of the codec's quality, or None: this KV is to stay lossless.

    The new frame differs in codec, digest, payload, checksums, and quality: the codec's, or what the frame
    was published at if that is less. Costs what encoding costs; torch works in threads of its own. Raises
    CorruptBlock for a frame that does not verify, ValueError for one that a codec went through already or
    that is of another layout.
    """
    decoded, payload = decode_frame(frame)
    meta = decoded.meta
    if decoded.codec != LOSSLESS_CODEC or meta.fingerprint != layout.fingerprint:
        raise ValueError(
            f"a frame of codec {decoded.codec}, layout {meta.fingerprint.hex()}: not to be encoded"
        )
    if payload.nbytes != layout.block_nbytes:
        raise CorruptBlock(MissReason.OTHER_LAYOUT, f"{payload.nbytes} bytes of {layout.block_nbytes}")
    encoded = codec.encode(layout, payload)
    if encoded is None:
        return None
    meta = dataclasses.replace(meta, quality=min(meta.quality, codec.quality))
    return join(encode_header(meta, encoded, codec.number, codec.digest(layout)), encoded)


def is_true_to_codec(frame: Frame, layout: KVLayout) -> bool:
    """Whether codec, digest, size and quality of a header go together."""
    codec = BY_NUMBER.get(frame.codec)
    if codec is None or (codec.number != LOSSLESS_CODEC and not codec.fits(layout)):
        return False
    return (
        frame.meta.quality <= codec.quality
        and frame.codec_digest == codec.digest(layout)
        and frame.payload_nbytes == codec.encoded_nbytes(layout)
    )


def why_unreadable(frame: Frame, layout: KVLayout) -> MissReason | None:
    """Why the payload of a frame of this layout is none that a reader here can use; None: it can."""
    if frame.codec == LOSSLESS_CODEC:
        return None if frame.payload_nbytes == layout.block_nbytes else MissReason.OTHER_LAYOUT
    return None if can_decode() and is_true_to_codec(frame, layout) else MissReason.BAD_HEADER


def decode_payload(frame: Frame, payload: memoryview, layout: KVLayout, out: memoryview) -> None:
    """Fill `out` from a verified payload of a frame that is true to its codec. Raises CorruptBlock."""
    BY_NUMBER[frame.codec].decode(layout, payload, out)


@functools.lru_cache(maxsize=256)
def encoded_sizes(layout: KVLayout, min_quality: Quality) -> frozenset[int]:
    """Sizes of payloads that a reader decodes who takes blocks of `min_quality` and better.

    Nothing where torch is not installed: what is encoded is a miss there.
    """
    if not can_decode():
        return frozenset()
    return frozenset(
        codec.encoded_nbytes(layout)
        for codec in BY_NUMBER.values()
        if codec.number != LOSSLESS_CODEC and codec.quality >= min_quality and codec.fits(layout)
    )
