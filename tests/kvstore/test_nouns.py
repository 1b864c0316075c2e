"""The nouns say what they hold, and refuse what they cannot."""

from __future__ import annotations

import pytest

from kvstore.nouns import KVLayout, MissReason, Quality, Refusal, Tier


def test_a_layout_counts_its_bytes() -> None:
    layout = KVLayout(layers=30, head_begin=0, head_end=3, head_dim=64, dtype="bfloat16", block_tokens=32)
    assert (layout.kv_heads, layout.token_nbytes) == (3, 30 * 2 * 3 * 64 * 2)
    assert layout.block_nbytes == 32 * layout.token_nbytes


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ((30, 0, 3, 64, "float8"), "float8"),
        ((30, 3, 3, 64, "float32"), "empty"),
        ((30, -1, 3, 64, "float32"), "empty"),
        ((0, 0, 3, 64, "float32"), "at least 1"),
        ((30, 0, 3, 0, "float32"), "at least 1"),
    ],
)
def test_a_layout_of_nothing_is_refused(layout: tuple[int, int, int, int, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        KVLayout(*layout)


def test_numbers_on_the_wire_and_on_disk_are_fixed() -> None:
    whole = {"LOSSLESS": 1000, "INT8": 800, "FP8": 700}
    small = {"K4V4": 600, "K4V3": 550, "INT4_HADAMARD": 500, "INT4": 400}
    assert {q.name: int(q) for q in Quality} == whole | small
    assert {t.name: int(t) for t in Tier} == {"DEVICE": 1, "HOST": 2, "NVME": 3}


def test_every_reason_has_a_name_of_its_own() -> None:
    for reasons in (MissReason, Refusal):
        assert len({reason.value for reason in reasons}) == len(list(reasons))
