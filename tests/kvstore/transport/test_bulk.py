"""Hand-made chunks are the protos' own messages, both ways, and any other bytes are a ValueError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.transport.grpc.bulk import pack_miss, pack_read, pack_write, parse_read, parse_write
from kvstore.v1 import blocks_pb2 as blocks

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


@given(U32, U64, st.binary(max_size=300))
def test_read_chunks_are_protobuf(index: int, nbytes: int, data: bytes) -> None:
    packed = pack_read(index, nbytes, memoryview(data))
    message = blocks.ReadResponse(index=index, frame_nbytes=nbytes, data=data)
    assert blocks.ReadResponse.FromString(packed) == message
    parsed = parse_read(message.SerializeToString())
    assert (parsed.index, parsed.frame_nbytes, bytes(parsed.data), parsed.miss) == (index, nbytes, data, "")
    assert parse_read(pack_miss(index, "absent")).miss == "absent"


@given(U64, U32, U64, st.binary(max_size=300), st.binary(max_size=20))
def test_write_chunks_are_protobuf(txn: int, index: int, nbytes: int, header: bytes, data: bytes) -> None:
    packed = pack_write(txn, index, nbytes, header, memoryview(data))
    message = blocks.WriteRequest(txn=txn, index=index, frame_nbytes=nbytes, data=header + data)
    assert blocks.WriteRequest.FromString(packed) == message
    parsed = parse_write(message.SerializeToString())
    assert (parsed.txn, parsed.index, parsed.frame_nbytes) == (txn, index, nbytes)
    assert bytes(parsed.data) == header + data


def test_unknown_fields_are_skipped() -> None:
    newer = b"\x8d\x01abcd" + b"\x91\x01abcdefgh" + b"\x9a\x01\x03new" + b"\xa0\x01\x05"
    assert parse_read(newer + pack_read(7, 9, memoryview(b"x"))).index == 7


@given(st.binary(max_size=64))
def test_any_bytes_give_a_value_or_a_value_error(data: bytes) -> None:
    try:
        parsed = parse_write(data)
    except ValueError:
        return
    assert len(parsed.data) <= len(data)


@pytest.mark.parametrize("broken", [b"\x1a\x05abc", b"\x08", b"\x0b", b"\xff" * 11])
def test_broken_messages_are_refused(broken: bytes) -> None:
    with pytest.raises(ValueError, match=r"bytes?"):
        parse_read(broken)
