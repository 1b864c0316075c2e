"""Promise: a block is the same bytes in the pool, outside it, and in another pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.pool import KVPool
from kvstore.nouns import KVLayout

LAYOUT = KVLayout(layers=2, head_begin=0, head_end=3, head_dim=8, dtype="float32", block_tokens=4)


def random_payload(nbytes: int, seed: int = 0) -> memoryview:
    return memoryview(np.random.default_rng(seed).bytes(nbytes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_bytes_come_back_as_they_went_in(dtype: str) -> None:
    layout = KVLayout(2, 0, 3, 8, dtype, block_tokens=4)
    pool = KVPool(layout, 5)
    block, tail = random_payload(layout.block_nbytes), random_payload(3 * layout.token_nbytes, seed=1)
    pool.write_block(1, block)
    pool.write_tail(3, tail, 3)
    assert pool.read_block(1).tobytes() == block
    assert pool.read_tail(3, 3).tobytes() == tail
    assert pool.read_tail(1, 4).tobytes() == block


def test_a_copied_block_is_what_was_written_and_no_token_more() -> None:
    pool = KVPool(LAYOUT, 5)
    shared, other = random_payload(LAYOUT.block_nbytes), random_payload(LAYOUT.block_nbytes, seed=1)
    pool.write_block(1, shared)
    pool.write_block(3, other)
    pool.copy_block(1, 3, LAYOUT.block_tokens - 1)
    assert pool.read_tail(3, LAYOUT.block_tokens - 1).tobytes() == pool.read_tail(1, 3).tobytes()
    assert pool.read_block(1).tobytes() == shared
    last = pool.data[:, :, 3, -1].clone()
    pool.write_block(3, other)
    assert last.view(torch.uint8).equal(pool.data[:, :, 3, -1].contiguous().view(torch.uint8))


def test_the_bytes_outside_are_in_the_frames_order() -> None:
    """[layer][k, v][token][kv_head][head_dim], whatever the pool's own order is."""
    pool = KVPool(LAYOUT, 3)
    expected = torch.arange(2 * 2 * 4 * 3 * 8, dtype=torch.float32).view(2, 2, 4, 3, 8)
    for layer in range(2):
        pool.keys(layer)[8:12] = expected[layer, 0]
        pool.values(layer)[8:12] = expected[layer, 1]
    assert pool.read_block(2).tobytes() == expected.numpy().tobytes()
    assert pool.read_tail(2, 3).tobytes() == expected[:, :, :3].contiguous().numpy().tobytes()


def test_neighbours_are_untouched() -> None:
    pool = KVPool(LAYOUT, 3)
    pool.write_block(1, random_payload(LAYOUT.block_nbytes))
    assert not pool.read_block(0).any()
    assert not pool.read_block(2).any()


def test_what_was_read_is_a_copy() -> None:
    pool = KVPool(LAYOUT, 2)
    before = pool.read_block(0)
    pool.write_block(0, random_payload(LAYOUT.block_nbytes))
    assert not before.any()


@pytest.mark.parametrize("nbytes", [0, LAYOUT.block_nbytes - 1, LAYOUT.block_nbytes + 1])
def test_a_payload_of_another_size_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"must have {LAYOUT.block_nbytes} bytes"):
        KVPool(LAYOUT, 2).write_block(0, random_payload(nbytes))


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_tail_is_at_least_a_token_and_at_most_a_block(tokens: int) -> None:
    with pytest.raises(ValueError, match="KV of"):
        KVPool(LAYOUT, 2).write_tail(0, random_payload(tokens * LAYOUT.token_nbytes), tokens)


def test_positions_are_found_in_place_where_slots_are_adjacent() -> None:
    pool = KVPool(LAYOUT, 10)
    assert pool.token_index((4, 5, 6), 0, 10) == slice(16, 26)
    assert pool.token_index((9, 5, 6), 4, 11) == slice(20, 27)
    scattered = pool.token_index((4, 2, 7), 2, 10)
    assert isinstance(scattered, torch.Tensor)
    assert scattered.tolist() == [18, 19, 8, 9, 10, 11, 28, 29]
