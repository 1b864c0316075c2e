"""The bytes of segments and journals are what docs/design.md draws; anything else is refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ConfigError
from kvstore.tiers.nvme.config import NvmeConfig
from kvstore.tiers.nvme.journal import encode_entry, encode_journal_header, read_journal
from kvstore.tiers.nvme.layout import (
    HEAD_NBYTES,
    PREFIX_NBYTES,
    Prefix,
    Seal,
    check_segment_header,
    columns,
    decode_footer,
    decode_prefix,
    encode_footer,
    encode_prefix,
    encode_segment_header,
    record_nbytes,
)
from kvstore.tiers.nvme.notes import pack
from kvstore.tiers.nvme.tier import NvmeTier
from tests.kvstore.tiers.nvme.blocks import Block

STORE = bytes(range(16))
SEAL = Seal(STORE)
PREFIX = Prefix(segment=7, offset=4096, sequence=1 << 40, notes=3, synced=4096, nbytes=356)
HEAD = encode_prefix(PREFIX, Block(5, nbytes=100).frame()[:256], SEAL)


def test_golden_bytes() -> None:
    header = encode_segment_header(STORE, 7)
    assert header[:40].hex() == (
        "4b565354534547 0a 01000000 00100000 000102030405060708090a0b0c0d0e0f 0700000000000000".replace(
            " ", ""
        )
    )
    assert len(header) == 4096
    assert HEAD[:56].hex() == (
        "4b565352 0100 0000 0700000000000000 0010000000000000 0000000000010000"
        "0300000000000000 0010000000000000 64010000 00000000".replace(" ", "")
    )
    assert encode_journal_header(STORE)[:32].hex() == (
        "4b5653544a524e0a 01000000 00000000 000102030405060708090a0b0c0d0e0f".replace(" ", "")
    )
    assert encode_entry(2, b"\x90", SEAL)[:16].hex() == "4b56534e010000000200000000000000"


def test_what_is_encoded_is_decoded() -> None:
    head = HEAD + bytes(Block(5, nbytes=100).frame()[:256])
    assert len(head) == HEAD_NBYTES
    assert decode_prefix(memoryview(head), 7, 4096, SEAL) == PREFIX
    for other in (
        decode_prefix(memoryview(head), 8, 4096, SEAL),
        decode_prefix(memoryview(head), 7, 8192, SEAL),
        decode_prefix(memoryview(head), 7, 4096, Seal(bytes(16))),
        decode_prefix(memoryview(head)[:100], 7, 4096, SEAL),
    ):
        assert other is None
    rows = columns(np.frombuffer(head, dtype=np.uint8).reshape(1, -1))
    assert (rows["sequence"][0], rows["nbytes"][0], rows["payload_nbytes"][0]) == (1 << 40, 356, 100)
    footer = encode_footer(head * 3, 7, 12_288, SEAL)
    found = decode_footer(memoryview(footer[-4096:]), 7, SEAL)
    assert found is not None
    assert (found.rows_at, found.count) == (12_288, 3)
    assert decode_footer(memoryview(footer[-4096:]), 8, SEAL) is None


def test_a_record_is_whole_blocks() -> None:
    assert record_nbytes(4096 - PREFIX_NBYTES) == 4096
    assert record_nbytes(4096 - PREFIX_NBYTES + 1) == 8192


@given(st.binary(max_size=600))
def test_any_bytes_are_a_value_or_refused(data: bytes) -> None:
    view = memoryview(data)
    assert decode_prefix(view, 7, 4096, SEAL) is None
    assert decode_footer(view, 7, SEAL) is None
    for decode in (lambda: check_segment_header(view, STORE, 7, "f"), lambda: read_journal(view, "j")):
        try:
            assert not decode()
        except ConfigError:
            continue


@given(st.lists(st.recursive(st.none() | st.integers() | st.text() | st.binary(), st.lists, max_leaves=8)))
def test_any_note_is_read_or_refused(documents: list[object]) -> None:
    try:
        packed = pack(documents)
    except OverflowError:
        return  # an integer msgpack has no form for
    data = encode_journal_header(STORE) + encode_entry(1, packed, SEAL)
    with contextlib.suppress(ConfigError):
        _, state, number = read_journal(memoryview(data), "j")
        assert number == 1
        assert len(state.notes()) <= len(documents)


def test_versions_and_owners_are_asked_for() -> None:
    header = bytearray(encode_segment_header(STORE, 7))
    assert check_segment_header(memoryview(header), STORE, 7, "f")
    with pytest.raises(ConfigError, match="another store"):
        check_segment_header(memoryview(header), bytes(16), 7, "f")
    header[8] = 2
    with pytest.raises(ConfigError, match="format 2"):
        check_segment_header(memoryview(header), STORE, 7, "f")
    header[0] = 0
    with pytest.raises(ConfigError, match="no segment of ours"):
        check_segment_header(memoryview(header), STORE, 7, "f")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("photo.jpg", b"mine", "not ours"),
        ("segment-0123456789abcdef", bytes(8192), "without it nobody knows"),
        ("journal", b"my diary, which is long enough to be one", "no journal of ours"),
    ],
)
async def test_foreign_files_are_refused_and_stay(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    tier = NvmeTier(NvmeConfig((tmp_path,), 16 << 18, 1 << 18))
    with pytest.raises(ConfigError, match=says):
        await tier.recover()
    await tier.close()
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    "settings",
    [
        {"directories": ()},
        {"directories": (Path("a"), Path("a"))},
        {"disk_nbytes": 7 << 18},
        {"segment_nbytes": 5_000},
        {"utilisation": 1.0},
        {"io_threads": 0},
        {"write_wait_s": -1.0},
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object]) -> None:
    good: dict[str, object] = {
        "directories": (Path("a"),),
        "disk_nbytes": 16 << 18,
        "segment_nbytes": 1 << 18,
    }
    NvmeConfig(**good)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        NvmeConfig(**{**good, **settings})  # type: ignore[arg-type]
