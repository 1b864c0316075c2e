"""`kvstrata bench store`: the JSON's shape is a contract, and one wrong byte anywhere fails the run."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

from cli.bench.oracle import WrongBytes, buffers, check, payload
from cli.bench.plan import SIZES
from tests.serving import command

END_S = 100
KEYS = ["65536", "1048576", "4194304"]
EPOCH = {
    "versions", "advance_ms", "bytes_per_version", "match_p99_before_us", "match_p99_during_us",
    "gc_pause_ms_max", "flush_ms",
}  # fmt: skip


def quick(*arguments: str) -> subprocess.CompletedProcess[str]:
    asked = command("bench", "store", "--quick", "--no-peers", "--json", *arguments)
    return subprocess.run(asked, capture_output=True, text=True, timeout=END_S, check=False)


def test_a_quick_run_prints_the_one_document() -> None:
    ran = quick()
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert set(document) == {
        "read", "write", "limits", "peers", "match64_ms_p50", "match_keys_per_s", "core_match64_us",
        "read_your_writes", "epoch",
    }  # fmt: skip
    for rows in (document["read"], document["write"]):
        assert {row["transport"] for row in rows} >= {"grpc"}
        assert [row["nbytes"] for row in rows if row["transport"] == "grpc"] == list(SIZES)
        for row in rows:
            assert set(row) == {
                "transport", "nbytes", "gib_s", "gib_s_min", "gib_s_max", "cpu_s_per_gb",
            }  # fmt: skip
            assert 0 < row["gib_s_min"] <= row["gib_s"] <= row["gib_s_max"]
    assert {name: list(sizes) for name, sizes in document["limits"].items()} == {
        "memcpy_gib_s": KEYS,
        "tcp_gib_s": KEYS,
    }
    assert document["peers"] == {"mooncake_tcp": None, "redis": None, "ray": None}
    assert document["read_your_writes"] == {"pairs": 50, "misses": 0}
    assert set(document["epoch"]) == EPOCH
    assert document["epoch"]["versions"] == 8_192
    assert document["epoch"]["bytes_per_version"] > 0


@pytest.mark.parametrize("where", ["stored", "delivered"])
def test_one_wrong_byte_fails_the_run(where: str) -> None:
    """Promise 1: a stored byte that rots is a miss, and one that is wrong in the reader's memory is found."""
    ran = quick("--corrupt", where)
    assert ran.returncode == 1
    assert ran.stdout == ""
    expected = {"stored": "checksum", "delivered": "grpc delivered a wrong byte"}[where]
    assert expected in ran.stderr


def test_the_oracle_sees_any_byte_and_any_other_block() -> None:
    expected = payload(b"a block", 4096)
    check("nobody", "a block", payload(b"a block", 4096), expected)
    with pytest.raises(WrongBytes, match="offset"):
        check("somebody", "a block", payload(b"another", 4096), expected)
    for offset in (0, 4095):
        broken = expected.copy()
        broken[offset] ^= 1
        with pytest.raises(WrongBytes, match=f"offset {offset}"):
            check("somebody", "a block", broken, expected)


def test_a_buffer_that_nobody_wrote_is_not_right() -> None:
    memory = np.zeros(8192, dtype=np.uint8)
    memory[:] = np.concatenate([payload(b"0", 4096), payload(b"1", 4096)])
    with pytest.raises(WrongBytes):
        check("nobody", "0", buffers(memory, 4096, 2)[0], payload(b"0", 4096))
