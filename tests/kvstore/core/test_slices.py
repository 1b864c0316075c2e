"""Promise: no call of the core does so much for moves that the event loop stands; the next goes on."""

from __future__ import annotations

from kvstore.core.moves import STEPS_A_CALL
from kvstore.core.state import DemoteWhen, Tiering
from kvstore.core.uses import Uses
from tests.kvstore.core.conftest import NBYTES, Shard
from tests.kvstore.core.test_moves import tiered


class Nothing:
    """An admission policy to which nothing is worth a write."""

    def __init__(self, _uses: Uses, _predictor: object) -> None:
        pass

    def admits(self, slot: int, now: float) -> bool:
        return False


def test_one_call_gives_up_a_bounded_number_and_the_next_ones_go_on() -> None:
    blocks = 4 * STEPS_A_CALL
    tiering = Tiering(nvme_nbytes=blocks * NBYTES, when=DemoteWhen.CROWDED, watermarks=(0.9, 0.2))
    shard = Shard(blocks, tiering=tiering, make_admission=Nothing)
    for first in range(blocks):
        shard.put([100 * first])
    left, calls = blocks, 0
    while left > blocks * 0.2:
        assert shard.core.moves.any_wanted()
        assert not shard.start()
        now_left = shard.core.index.host.used_nbytes // NBYTES
        assert left - STEPS_A_CALL <= now_left < left
        left, calls = now_left, calls + 1
    assert calls == 4
    assert not shard.start()
    assert not shard.core.moves.is_cut_short
    assert not shard.core.moves.any_wanted()


def test_one_call_starts_a_bounded_number_of_moves() -> None:
    blocks = 2 * STEPS_A_CALL
    shard = tiered(blocks, blocks)
    for first in range(blocks):
        shard.put([100 * first])
    assert len(shard.start()) == STEPS_A_CALL
    assert shard.core.moves.is_cut_short
    assert len(shard.core.moves) == STEPS_A_CALL
    assert len(shard.start()) == STEPS_A_CALL
    assert not shard.start()
