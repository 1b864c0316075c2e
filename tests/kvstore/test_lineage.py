"""Promise 3: nothing computed over old or lesser KV is published as new or better."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.lineage import Lineage
from kvstore.nouns import Epoch, Quality, WeightsDigest

E6, E7 = (Epoch(number, WeightsDigest(bytes([number] * 16))) for number in (6, 7))
E7_OTHER_WEIGHTS = Epoch(7, WeightsDigest(bytes(16)))
LOSSLESS, INT8, FP8 = Quality.LOSSLESS, Quality.INT8, Quality.FP8

# The worked example of lineage.py first.
ROWS = [
    ([(E7, LOSSLESS), (E7, INT8), (E7, LOSSLESS)], INT8),
    ([(E7, LOSSLESS), (E6, LOSSLESS)], None),
    ([], LOSSLESS),
    ([(E7, FP8), (E7, INT8)], FP8),
    ([(E6, LOSSLESS), (E7, LOSSLESS)], None),
    ([(E7_OTHER_WEIGHTS, LOSSLESS)], None),
]


@pytest.mark.parametrize(("onboarded", "publishes"), ROWS)
def test_what_a_sequence_may_publish(
    onboarded: list[tuple[Epoch, Quality]], publishes: Quality | None
) -> None:
    lineage = Lineage(E7)
    for epoch, quality in onboarded:
        lineage = lineage.absorb(epoch, quality)
    assert lineage.publishable is publishes


blocks = st.tuples(st.sampled_from([E6, E7, E7_OTHER_WEIGHTS]), st.sampled_from(Quality))


@given(st.lists(blocks), blocks)
def test_the_floor_never_rises(onboarded: list[tuple[Epoch, Quality]], last: tuple[Epoch, Quality]) -> None:
    lineage = Lineage(E7)
    for epoch, quality in onboarded:
        lineage = lineage.absorb(epoch, quality)
    after = lineage.absorb(*last).publishable
    assert after is None or (lineage.publishable is not None and after <= lineage.publishable)
