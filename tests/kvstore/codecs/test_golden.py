"""Formats are for ever: what was encoded once is encoded and decoded to the same bytes by later releases."""

from __future__ import annotations

import hashlib

import pytest
import torch

from kvstore.codecs import CODECS
from kvstore.nouns import KVLayout
from tests.kvstore.codecs.matrix import decoded, encoded, payload_of

COMMON = KVLayout(2, 0, 2, 64, "float32")
ODD = KVLayout(3, 0, 3, 48, "float16", 6)
"""Runs of channels that are no whole words, and tokens that are no multiple of eight."""
GOLDEN = {
    ("int8", COMMON): ("2461f3bae27932ed", "69240e2ed014de0b"),
    ("int8", ODD): ("1eab1304e71c1b75", "deb3c1a6884259a7"),
    ("fp8", COMMON): ("04a806616acbf6be", "016731c56886bd98"),
    ("fp8", ODD): ("51ac60a4d840f711", "ed8bc94be92ab131"),
    ("int4", COMMON): ("4d8fdaf11bc2b73e", "e5c402d491e3f3e2"),
    ("int4", ODD): ("afe27bd504514704", "4877188cada409df"),
    ("int4-hadamard", COMMON): ("54f48b0924c9182c", "b4b1744f2e62f526"),
    ("int4-hadamard", ODD): ("fcb00be36d34132e", "370e0bc52f30132f"),
    ("k4v4", COMMON): ("e8fc46f0706938c1", "2d17066553e4e3be"),
    ("k4v4", ODD): ("507a89f142882280", "71cb52eca83410fb"),
    ("k4v3", COMMON): ("fa5a5f4d537ffc5a", "615eee04afec183b"),
    ("k4v3", ODD): ("5e97e9ec01f42dcf", "3f9d38d4bde8e89d"),
}

DIGESTS = {
    "int8": "d8a615ac93b5e73715748e945a51b2c3",
    "fp8": "4d060767680761026edbea80d048e355",
    "int4": "f8618ac45a958824bc7344d4772e4c36",
    "int4-hadamard": "3dc8050b1a6a53cac171c6e6bf6a4110",
    "k4v4": "345484e4b3ca05577b112233ddb33dfd",
    "k4v3": "100c447767e5e5fae0cc12af8fbc81a2",
}
"""Of the common layout. They stand in frames on disk: with another one all that a codec stored is lost."""


def kv(layout: KVLayout) -> torch.Tensor:
    """Integers by a congruence, so that no library's random numbers are in it, of ranges that differ."""
    shape = (layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    numbers = torch.arange(torch.Size(shape).numel()) * 2_654_435_761 % 65_521 - 32_760
    ranges = 1 + torch.arange(layout.head_dim) * 7 % 11
    return numbers.view(shape).to(torch.float32) * ranges / 4_096


@pytest.mark.parametrize(("name", "layout"), GOLDEN, ids=str)
def test_bytes_are_what_they_were(name: str, layout: KVLayout) -> None:
    made = encoded(CODECS[name], layout, payload_of(kv(layout), layout))
    both = (made, decoded(CODECS[name], layout, made))
    assert tuple(hashlib.sha256(data).hexdigest()[:16] for data in both) == GOLDEN[name, layout]


@pytest.mark.parametrize("name", DIGESTS)
def test_digests_are_what_they_were(name: str) -> None:
    assert CODECS[name].digest(COMMON).hex() == DIGESTS[name]
