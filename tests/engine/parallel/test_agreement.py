"""Promise: ranks use no more of a prefix than every one of them has, and claim no more than the worst."""

from __future__ import annotations

from engine.onboard import Onboarded
from engine.parallel.agreement import agreed
from kvstore.lineage import Lineage
from kvstore.nouns import Epoch, MissReason, Quality, WeightsDigest

OURS = Epoch(7, WeightsDigest(bytes(16)))
OLDER = Epoch(6, WeightsDigest(bytes(16)))


def read(*blocks: tuple[bytes, Epoch, Quality], miss: MissReason | None = None) -> Onboarded:
    """What one rank has read."""
    onboarded = Onboarded(Lineage(OURS), miss=miss)
    for payload, epoch, quality in blocks:
        onboarded.payloads.append(memoryview(payload))
        onboarded.origins.append((epoch, quality))
        onboarded.epochs.add(epoch.number)
        onboarded.lineage = onboarded.lineage.absorb(epoch, quality)
    return onboarded


def test_the_shortest_is_all_there_is_and_the_rest_weighs_nothing() -> None:
    first = read(
        (b"a0", OURS, Quality.LOSSLESS), (b"b0", OURS, Quality.LOSSLESS), (b"c0", OLDER, Quality.INT8)
    )
    second = read((b"a1", OURS, Quality.LOSSLESS), (b"b1", OURS, Quality.LOSSLESS), miss=MissReason.ABSENT)
    whole = agreed([first, second], Lineage(OURS))
    assert [bytes(payload) for payload in whole.payloads] == [b"a0a1", b"b0b1"]
    assert whole.lineage == Lineage(OURS)
    assert whole.miss is MissReason.ABSENT
    assert whole.epochs == {7}


def test_one_ranks_worse_block_is_everybodys() -> None:
    whole = agreed(
        [
            read((b"a0", OURS, Quality.LOSSLESS), (b"b0", OLDER, Quality.LOSSLESS)),
            read((b"a1", OURS, Quality.INT8), (b"b1", OURS, Quality.LOSSLESS)),
        ],
        Lineage(OURS),
    )
    assert whole.lineage == Lineage(OURS, Quality.INT8, foreign=True)
    assert whole.origins == [(OURS, Quality.INT8), (OLDER, Quality.LOSSLESS)]
    assert whole.epochs == {6, 7}


def test_what_the_sequence_was_before_stays() -> None:
    before = Lineage(OURS, Quality.FP8)
    whole = agreed([read((b"a0", OURS, Quality.LOSSLESS)), read()], before)
    assert (whole.payloads, whole.lineage) == ([], before)
