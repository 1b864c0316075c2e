"""Chunks of the bulk streams, packed and parsed by hand; on the wire they are the protos' own messages.

protobuf's runtime copies a chunk's bytes twice into memory that was just mapped: on a virtual machine 1 MiB
cost 3.4 ms to serialise, against 0.03 ms for the one copy made here (benchmarks/wire.py). A foreign client
uses blocks.proto and never notices. Field numbers are taken from the generated descriptors.

Parsing is total: bytes that are not such a message raise ValueError, unknown fields are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.v1 import blocks_pb2 as blocks

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_NBYTES: Final = {_FIXED64: 8, _FIXED32: 4}

_READ: Final = {f.name: f.number for f in blocks.ReadResponse.DESCRIPTOR.fields}
_WRITE: Final = {f.name: f.number for f in blocks.WriteRequest.DESCRIPTOR.fields}


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """`blocks.ReadResponse`. `data` is a view into the message it was parsed from."""

    index: int
    frame_nbytes: int
    data: memoryview
    miss: str
    run_nbytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WriteChunk:
    """`blocks.WriteRequest`. `data` is a view into the message it was parsed from."""

    txn: int
    index: int
    frame_nbytes: int
    data: memoryview


def pack_read(index: int, frame_nbytes: int, data: memoryview) -> bytes:
    head = _number(_READ["index"], index) + _number(_READ["frame_nbytes"], frame_nbytes)
    return b"".join((head, _length(_READ["data"], data.nbytes), data))


def pack_run(index: int, frames: Sequence[memoryview]) -> bytes:
    """Whole frames of consecutive positions, for a reader that takes runs."""
    sizes = b"".join([_varint(frame.nbytes) for frame in frames])
    head = _number(_READ["index"], index) + _length(_READ["run_nbytes"], len(sizes)) + sizes
    return b"".join((head, _length(_READ["data"], sum(frame.nbytes for frame in frames)), *frames))


def pack_miss(index: int, miss: str) -> bytes:
    return blocks.ReadResponse(index=index, miss=miss).SerializeToString()


def pack_write(txn: int, index: int, frame_nbytes: int, *pieces: bytes | memoryview) -> bytes:
    head = _number(_WRITE["txn"], txn) + _number(_WRITE["index"], index)
    head += _number(_WRITE["frame_nbytes"], frame_nbytes)
    return b"".join((head, _length(_WRITE["data"], sum(map(len, pieces))), *pieces))


def parse_read(message: bytes) -> ReadChunk:
    numbers, strings = _fields(message)
    return ReadChunk(
        numbers.get(_READ["index"], 0),
        numbers.get(_READ["frame_nbytes"], 0),
        strings.get(_READ["data"], memoryview(b"")),
        bytes(strings.get(_READ["miss"], b"")).decode(),
        _varints(strings[_READ["run_nbytes"]]) if _READ["run_nbytes"] in strings else (),
    )


def parse_write(message: bytes) -> WriteChunk:
    numbers, strings = _fields(message)
    return WriteChunk(
        numbers.get(_WRITE["txn"], 0),
        numbers.get(_WRITE["index"], 0),
        numbers.get(_WRITE["frame_nbytes"], 0),
        strings.get(_WRITE["data"], memoryview(b"")),
    )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value) if value else b""  # proto3 leaves zeros out


def _length(field: int, nbytes: int) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(nbytes)


def _fields(message: bytes) -> tuple[dict[int, int], dict[int, memoryview]]:
    """Numbers and byte strings by field number; the last of a repeated one wins, as protobuf has it."""
    view = memoryview(message)
    numbers: dict[int, int] = {}
    strings: dict[int, memoryview] = {}
    at = 0
    while at < len(view):
        tag, at = _read_varint(view, at)
        kind = tag & 7
        if kind == _VARINT:
            numbers[tag >> 3], at = _read_varint(view, at)
            continue
        if kind == _BYTES:
            nbytes, at = _read_varint(view, at)
        elif kind in _NBYTES:
            nbytes = _NBYTES[kind]
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + nbytes > len(view):
            raise ValueError(f"a field of {nbytes} bytes runs past the message's end")
        if kind == _BYTES:
            strings[tag >> 3] = view[at : at + nbytes]
        at += nbytes
    return numbers, strings


def _varints(packed: memoryview) -> tuple[int, ...]:
    values, at = [], 0
    while at < len(packed):
        value, at = _read_varint(packed, at)
        values.append(value)
    return tuple(values)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            break
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError(f"no number at byte {at}")
