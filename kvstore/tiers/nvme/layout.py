"""The bytes of a segment file: header, records, footer. Drawn in docs/design.md ("Segments on disk").

A record is a 64-byte prefix and a frame, padded to `BLOCK_NBYTES`. Its first 320 bytes, prefix and frame
header, stand within one sector, so that they are torn together or not at all, and one checksum covers both.
A footer is those 320 bytes of every record once more: what reads one reads the other. Checksums are seeded
by the store's random id: bytes that a tenant chose cannot pass for ours, nor another store's files.

Packing a prefix costs about 2 us. Little-endian throughout.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore.errors import ConfigError
from kvstore.frame import HEADER_NBYTES

FORMAT_VERSION: Final = 1
READABLE_VERSIONS: Final = frozenset({1})  # our own and, once there is one, the one before
BLOCK_NBYTES: Final = 4096
"""What offsets and sizes are multiples of: the largest logical block of disks in use."""
PREFIX_NBYTES: Final = 64
HEAD_NBYTES: Final = PREFIX_NBYTES + HEADER_NBYTES
FRAMES_AT: Final = BLOCK_NBYTES  # records begin behind the segment's header
FRAME_NBYTES_MAX: Final = (1 << 30) + HEADER_NBYTES

_SEGMENT_MAGIC: Final = b"KVSTSEG\n"
_FOOTER_MAGIC: Final = b"KVSTEND\n"
_RECORD_MAGIC: Final = b"KVSR"
_SEGMENT: Final = struct.Struct("<8sII16sQ")
_PREFIX: Final = struct.Struct("<4sHHQQQQQI4x")
_FOOTER: Final = struct.Struct("<8sQQQQ")
_CHECK: Final = struct.Struct("<Q")
assert _PREFIX.size + _CHECK.size == PREFIX_NBYTES

HEADS: Final = np.dtype(
    {
        "names": [
            *("magic", "segment", "offset", "sequence", "notes", "synced", "nbytes"),
            *("quality", "namespace", "key", "epoch", "digest", "payload_nbytes", "xxh3"),
        ],
        "formats": [
            *("(4,)u1", "<u8", "<u8", "<u8", "<u8", "<u8", "<u4"),
            *("<u2", "(16,)u1", "(32,)u1", "<u8", "(16,)u1", "<u8", "<u8"),
        ],
        "offsets": [
            0,
            8,
            16,
            24,
            32,
            40,
            48,
            *(PREFIX_NBYTES + at for at in (8, 32, 48, 144, 152, 184, 192)),
        ],
        "itemsize": HEAD_NBYTES,
    }
)
"""The first 320 bytes of a record, as numpy columns."""

Heads = npt.NDArray[np.uint8]  # (N, 320)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What stands before a frame on disk."""

    segment: int
    offset: int
    sequence: int  # of the first write of the frame: a copy keeps it
    notes: int  # journal entries that were durable by then
    synced: int  # bytes of this segment that were durable by then
    nbytes: int  # of the frame

    @property
    def end(self) -> int:
        return self.offset + record_nbytes(self.nbytes)


@dataclass(frozen=True, slots=True)
class Footer:
    rows_at: int  # where the records end
    count: int
    rows_xxh3: int


class Seal:
    """Checksums of one store: xxh3 seeded by its id."""

    __slots__ = ("seed",)

    def __init__(self, store: bytes) -> None:
        self.seed = int.from_bytes(store[:8], "little")

    def __call__(self, data: bytes | memoryview) -> int:
        return int(xxhash.xxh3_64_intdigest(data, seed=self.seed))


def padded(nbytes: int) -> int:
    """Rounded up to whole blocks."""
    return -(-nbytes // BLOCK_NBYTES) * BLOCK_NBYTES


def record_nbytes(frame_nbytes: int) -> int:
    """What a frame takes on disk."""
    return padded(PREFIX_NBYTES + frame_nbytes)


def footer_nbytes(count: int) -> int:
    return padded(count * HEAD_NBYTES) + BLOCK_NBYTES


def encode_segment_header(store: bytes, segment: int) -> bytes:
    body = _SEGMENT.pack(_SEGMENT_MAGIC, FORMAT_VERSION, BLOCK_NBYTES, store, segment)
    return (body + _CHECK.pack(Seal(store)(body))).ljust(BLOCK_NBYTES, b"\0")


def check_segment_header(data: memoryview, store: bytes, segment: int, name: str) -> bool:
    """False for a damaged header. Raises ConfigError for a file of another store, version or program."""
    if data.nbytes < _SEGMENT.size + _CHECK.size:
        return False  # cut off
    body = bytes(data[: _SEGMENT.size])
    if body[:8] != _SEGMENT_MAGIC:
        raise ConfigError(f"{name} is no segment of ours: give the nvme tier a directory of its own")
    _, version, _, owner, number = _SEGMENT.unpack(body)
    if version not in READABLE_VERSIONS:
        raise ConfigError(
            f"{name} has format {version}, this version reads {sorted(READABLE_VERSIONS)}: start the version "
            "that wrote it, or empty the directory"
        )
    (check,) = _CHECK.unpack(data[_SEGMENT.size : _SEGMENT.size + _CHECK.size])
    if Seal(owner)(body) != check:
        return False
    if owner != store or number != segment:
        raise ConfigError(f"{name} belongs to another store: put each store's directories back together")
    return True


def encode_prefix(prefix: Prefix, frame_header: memoryview, seal: Seal) -> bytes:
    body = _PREFIX.pack(
        _RECORD_MAGIC,
        FORMAT_VERSION,
        0,
        prefix.segment,
        prefix.offset,
        prefix.sequence,
        prefix.notes,
        prefix.synced,
        prefix.nbytes,
    )
    return body + _CHECK.pack(seal(body + bytes(frame_header)))


def decode_prefix(head: memoryview, segment: int, offset: int, seal: Seal) -> Prefix | None:
    """The record that stands at that offset of that segment; None where none does."""
    if head.nbytes < HEAD_NBYTES or bytes(head[:4]) != _RECORD_MAGIC:
        return None
    body = bytes(head[: _PREFIX.size])
    (check,) = _CHECK.unpack(head[_PREFIX.size : PREFIX_NBYTES])
    if seal(body + bytes(head[PREFIX_NBYTES:HEAD_NBYTES])) != check:
        return None
    _, version, _, owner, at, sequence, notes, synced, nbytes = _PREFIX.unpack(body)
    if version not in READABLE_VERSIONS or (owner, at) != (segment, offset):
        return None
    return Prefix(owner, at, sequence, notes, synced, nbytes)


def encode_footer(heads: bytes | bytearray, segment: int, rows_at: int, seal: Seal) -> bytes:
    """Rows, padding, and a last block that says where they are."""
    count = len(heads) // HEAD_NBYTES
    body = _FOOTER.pack(_FOOTER_MAGIC, segment, rows_at, count, seal(bytes(heads)))
    last = (body + _CHECK.pack(seal(body))).ljust(BLOCK_NBYTES, b"\0")
    return bytes(heads).ljust(padded(len(heads)), b"\0") + last


def decode_footer(last: memoryview, segment: int, seal: Seal) -> Footer | None:
    """What the last block of a file says; None where it is no footer."""
    body = bytes(last[: _FOOTER.size])
    if len(body) < _FOOTER.size or last.nbytes < BLOCK_NBYTES or body[:8] != _FOOTER_MAGIC:
        return None
    (check,) = _CHECK.unpack(last[_FOOTER.size : _FOOTER.size + _CHECK.size])
    if seal(body) != check:
        return None
    _, owner, rows_at, count, rows_xxh3 = _FOOTER.unpack(body)
    return Footer(rows_at, count, rows_xxh3) if owner == segment else None


def columns(heads: Heads) -> npt.NDArray[Any]:
    """The rows as a structured array, a view."""
    return np.ascontiguousarray(heads).view(HEADS).reshape(-1)
