"""A layout is found out or refused: never guessed."""

from __future__ import annotations

import random

import pytest
import torch

from kvstore.errors import ConfigError
from kvstore.integrations.vllm.conversion import Pool
from kvstore.integrations.vllm.layout import Digit, by_index, probe, probe_all
from kvstore.nouns import KVLayout
from tests.kvstore.integrations.vllm.backends import BACKENDS, REFUSED, Backend, layer_of

HEADS, DIM = 3, 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ids = [backend.name for backend in BACKENDS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_tokens", [16, 64])
@pytest.mark.parametrize("backend", BACKENDS, ids=ids)
def test_what_was_found_says_where_each_element_lies(backend: Backend, block_tokens: int, dtype: str) -> None:
    layer = layer_of(backend, block_tokens, HEADS, DIM)
    pool = backend.make(4, block_tokens, HEADS, DIM, DTYPES[dtype])
    found = probe(layer, pool, block_tokens)
    assert not pool.any(), "the pool itself is not written to"
    kv = torch.randn(2, block_tokens, HEADS, DIM).to(DTYPES[dtype])
    layer.impl.do_kv_cache_update(layer, *kv, pool, torch.arange(2 * block_tokens, 3 * block_tokens))
    memory = pool.as_strided((pool.numel(),), (1,), 0)
    for half, half_kv in zip((found.key, found.value), kv, strict=True):
        at = torch.from_numpy(2 * found.block_stride + half.offsets())
        assert torch.equal(memory[at], half_kv)


def test_packed_keys_are_digits() -> None:
    backend = next(backend for backend in BACKENDS if backend.name == "packed-keys")
    found = probe(layer_of(backend, 64, HEADS, DIM), backend.make(2, 64, HEADS, DIM, torch.bfloat16), 64)
    assert found.key.token == (Digit(4, 16 * DIM), Digit(16, 2))
    assert found.key.dim == (Digit(4, 32), Digit(2, 1))
    assert found.value.token == (Digit(32, 2 * DIM), Digit(2, 1))
    assert (
        found.fingerprint
        == "bfloat16 b64+3072 k+0 t4*128,16*2 h3*1024 d4*32,2*1 v+512 t32*16,2*1 h3*1024 d8*2"
    )


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_strides_is_refused(reason: str) -> None:
    backend = REFUSED[reason]
    with pytest.raises(ConfigError, match=reason):
        probe(layer_of(backend, 16, HEADS, DIM), backend.make(2, 16, HEADS, DIM, torch.float32), 16)


def test_blocks_of_another_size_or_type_are_refused() -> None:
    backend = BACKENDS[0]
    layer = layer_of(backend, 16, HEADS, DIM)
    with pytest.raises(ConfigError, match="no axis of blocks"):
        probe(layer, torch.zeros(4, 16, HEADS, DIM + 4), 16)
    with pytest.raises(ConfigError, match="kv_cache_dtype"):
        probe(layer, torch.zeros(4, 2, 16, HEADS, DIM, dtype=torch.uint8), 16)
    far = torch.empty(1, device="meta").as_strided((1, 2, 16, HEADS, DIM), (1, 1 << 30, HEADS * DIM, DIM, 1))
    with pytest.raises(ConfigError, match="across the whole pool"):
        probe(layer, far, 16)


def test_all_layers_have_one_layout_or_none_is_served() -> None:
    one, other = BACKENDS[0], next(b for b in BACKENDS if b.name == "hnd")
    make = {
        f"model.layers.{i}.attn": (layer_of(b, 16, HEADS, DIM), b.make(4, 16, HEADS, DIM, torch.float32))
        for i, b in enumerate([one, one, other])
    }
    layers = {name: layer for name, (layer, _) in make.items()}
    caches = {name: cache for name, (_, cache) in make.items()}
    with pytest.raises(ConfigError, match="one layout for all layers"):
        probe_all(caches, layers, 16)
    del caches["model.layers.2.attn"]
    assert probe_all(caches, layers, 16) == probe(
        layers["model.layers.0.attn"], caches["model.layers.0.attn"], 16
    )


def test_a_layer_that_looks_through_a_window_has_its_blocks_in_a_group_of_full_attention() -> None:
    """vLLM keeps them all there, and the layer its window: --disable-hybrid-kv-cache-manager."""
    backend = BACKENDS[0]
    layers = {f"model.layers.{i}.attn": layer_of(backend, 16, HEADS, DIM) for i in range(2)}
    caches = {name: backend.make(4, 16, HEADS, DIM, torch.float32) for name in layers}
    full = probe_all(caches, layers, 16)
    layers["model.layers.1.attn"].sliding_window = 128
    assert probe_all(caches, layers, 16) == full


def test_layers_stand_in_the_order_of_their_numbers() -> None:
    names = [f"model.layers.{i}.self_attn.attn" for i in range(12)]
    assert by_index(sorted(names)) == names
    for wrong in (["model.layers.1.attn"], ["a.0.b", "b.0.b"], ["a.0.1"], ["attn"]):
        with pytest.raises(ConfigError):
            by_index(wrong)


@pytest.mark.parametrize(("theirs", "ours"), [(16, 32), (32, 32), (64, 32), (128, 32), (32, 16), (16, 64)])
@pytest.mark.parametrize("backend", BACKENDS, ids=ids)
@pytest.mark.parametrize("apart", [True, False], ids=["a-memory-a-layer", "one-memory"])
def test_there_and_back_any_tokens_of_any_blocks(
    backend: Backend, theirs: int, ours: int, apart: bool
) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance, layers, blocks = random.Random(seed), 3, 8
    torch.manual_seed(seed)
    layer = layer_of(backend, theirs, HEADS, DIM)
    tensors = [backend.make(blocks, theirs, HEADS, DIM, torch.bfloat16) for _ in range(layers)]
    if not apart:
        whole = torch.zeros(layers * tensors[0].numel(), dtype=torch.bfloat16)
        tensors = [whole.as_strided(t.shape, t.stride(), i * t.numel()) for i, t in enumerate(tensors)]
    frames = KVLayout(layers, 0, HEADS, DIM, "bfloat16", ours)
    pool = Pool(tensors, probe(layer, tensors[0], theirs), frames)
    assert len(pool.groups) == (layers if apart else 1)
    n = 4 * max(theirs, ours)
    kv = torch.randn(layers, 2, n, HEADS, DIM).to(torch.bfloat16)
    taken = chance.sample(range(blocks), min(blocks, n // theirs))
    n = len(taken) * theirs
    slots_of = torch.tensor([block * theirs + token for block in taken for token in range(theirs)])
    for i, tensor in enumerate(tensors):
        layer.impl.do_kv_cache_update(layer, *kv[i, :, :n], tensor, slots_of)
    before = [tensor.clone() for tensor in tensors]
    room = 2 + -(-n // ours)
    payloads = torch.zeros(room * pool.slot_numel, dtype=torch.bfloat16)
    size = pool.piece_tokens
    begin = chance.randrange(n // size) * size
    end = chance.randrange(begin + size, n + 1, size)
    slots = chance.sample(range(room), -(-end // ours) - begin // ours)
    pool.gather(pool.pieces(taken[begin // theirs :], begin, end, slots), payloads)
    seen = payloads.view(room, layers, 2, ours, HEADS, DIM)
    for token in range(begin, end):
        there = seen[slots[token // ours - begin // ours], :, :, token % ours]
        assert torch.equal(there, kv[:, :, token])
    for tensor in tensors:
        tensor.zero_()
    pool.scatter(pool.pieces(taken[begin // theirs :], begin, end, slots), payloads)
    for i, tensor in enumerate(tensors):
        expected = torch.zeros_like(before[i]).copy_(tensor * 0)
        layer.impl.do_kv_cache_update(layer, *kv[i, :, begin:end], expected, slots_of[begin:end])
        assert torch.equal(tensor, expected)


def test_block_sizes_that_do_not_divide_are_refused() -> None:
    backend = BACKENDS[0]
    tensors = [backend.make(2, 48, HEADS, DIM, torch.float32)]
    found = probe(layer_of(backend, 48, HEADS, DIM), tensors[0], 48)
    with pytest.raises(ConfigError, match="multiple"):
        Pool(tensors, found, KVLayout(1, 0, HEADS, DIM, "float32", 32))
    with pytest.raises(ConfigError, match="does not hold"):
        Pool(tensors, found, KVLayout(1, 0, HEADS, DIM, "bfloat16", 48))
