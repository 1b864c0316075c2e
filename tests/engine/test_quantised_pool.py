"""Promise: a quantised pool loses what the codec of its name loses, no more, and says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.monolithic import generate_all
from engine.quantised_pool import QuantisedPool, held_nbytes, make_pool
from kvstore.codecs import CODECS
from kvstore.nouns import KVLayout, Quality
from tests.engine.conftest import EngineFactory, Logits, prompt, request

LAYOUTS = [
    KVLayout(2, 0, 3, 16, "float32", block_tokens=4),
    KVLayout(1, 0, 2, 64, "bfloat16", block_tokens=8),
    KVLayout(1, 0, 1, 40, "float16", block_tokens=5),
]
HOT = ["int8", "fp8"]


def payload_of(layout: KVLayout, seed: int = 0) -> memoryview:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.block_nbytes // 2, generator=draw).to(getattr(torch, layout.dtype))
    return memoryview(values.view(torch.uint8).numpy()[: layout.block_nbytes].tobytes())


def through_codec(layout: KVLayout, hot: str, payload: memoryview) -> bytes:
    codec = CODECS[hot]
    encoded = codec.encode(layout, payload)
    assert encoded is not None
    out = memoryview(bytearray(layout.block_nbytes))
    codec.decode(layout, encoded, out)
    return bytes(out)


@pytest.mark.parametrize("hot", HOT)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)
def test_a_block_comes_back_as_its_codec_gives_it_back(layout: KVLayout, hot: str) -> None:
    pool = QuantisedPool(layout, 3, hot)
    payload = payload_of(layout)
    pool.write_block(1, payload)
    wanted = through_codec(layout, hot, payload)
    assert pool.read_block(1).tobytes() == wanted
    out = np.empty(layout.block_nbytes, np.uint8)
    pool.copy_out(1, out)
    assert out.tobytes() == wanted
    assert not pool.read_block(0).any()
    assert not pool.read_block(2).any()


@pytest.mark.parametrize("hot", HOT)
def test_tokens_written_one_by_one_are_those_of_a_block(hot: str) -> None:
    """Whatever the chunk, so that attention sees the same."""
    layout = LAYOUTS[0]
    one, other = QuantisedPool(layout, 3, hot), QuantisedPool(layout, 3, hot)
    payload = payload_of(layout)
    one.write_block(2, payload)
    kv = torch.frombuffer(bytearray(payload), dtype=torch.float32).view(2, 2, 4, 3, 16)
    for rows in ([8, 11], [9], [10]):
        tokens = torch.tensor(rows)
        for layer in range(2):
            other.write(layer, tokens, kv[layer, 0, tokens - 8], kv[layer, 1, tokens - 8])
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)
    for layer in range(2):
        assert torch.equal(one.keys(layer), other.keys(layer))
        assert one.keys(layer)[8:].sub(kv[layer, 0]).abs().max() < 0.2
    tail = one.read_tail(2, 3)
    other.write_tail(0, tail, 3)
    assert other.read_tail(0, 3).size == tail.size


@pytest.mark.parametrize("hot", HOT)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)
def test_a_copied_block_is_what_is_held_to_the_bit(layout: KVLayout, hot: str) -> None:
    """And no token more: behind those copied the target's own stay."""
    pool, tokens = QuantisedPool(layout, 3, hot), layout.block_tokens - 1
    pool.write_block(0, payload_of(layout))
    pool.write_block(2, payload_of(layout, 1))
    codes, scales = pool.codes.clone(), pool.scales.clone()
    pool.copy_block(0, 2, tokens)
    assert torch.equal(pool.codes[:, :, 2, :tokens], codes[:, :, 0, :tokens])
    assert torch.equal(pool.scales[:, :, 2, :, :tokens], scales[:, :, 0, :, :tokens])
    assert torch.equal(pool.codes[:, :, 2, tokens:], codes[:, :, 2, tokens:])
    assert torch.equal(pool.scales[:, :, 2, :, tokens:], scales[:, :, 2, :, tokens:])
    assert torch.equal(pool.codes[:, :, :2], codes[:, :, :2])


@pytest.mark.parametrize("hot", ["model", *HOT])
def test_a_forks_logits_are_those_of_its_sequence_alone(
    hot: str, make_engine: EngineFactory, seen_logits: Logits
) -> None:
    """The block that four samples of a prompt share in part is copied as it is held."""
    config = {"block_tokens": 8, "step_tokens_max": 24, "running_max": 8, "hot_pool": hot}
    asked = [request(f"r{i}", prompt(21), 30, temperature=0.9, seed=i) for i in range(4)]
    expected = [generate_all(make_engine(**config), [one])[0] for one in asked]
    logits = dict(seen_logits)
    seen_logits.clear()
    assert generate_all(make_engine(**config), asked) == expected
    assert seen_logits.keys() == logits.keys()
    assert all(torch.equal(seen_logits[key], logits[key]) for key in logits)


@pytest.mark.parametrize("hot", HOT)
def test_what_is_no_number_stays_none(hot: str) -> None:
    """So that damage is seen where logits are looked at, and not taken for a small number."""
    layout = LAYOUTS[0]
    pool = QuantisedPool(layout, 1, hot)
    for value in (torch.nan, torch.inf):
        keys = torch.ones(1, 3, 16)
        keys[0, 1, 5] = value
        pool.write(0, torch.tensor([2]), keys, torch.ones(1, 3, 16))
        assert not pool.keys(0)[2, 1].isfinite().all()
        assert pool.keys(0)[2, 0].isfinite().all()


def test_it_says_what_it_is_and_costs() -> None:
    layout = LAYOUTS[1]
    assert make_pool(layout, 1, "model").quality is Quality.LOSSLESS
    for hot, quality in (("int8", Quality.INT8), ("fp8", Quality.FP8)):
        pool = make_pool(layout, 2, hot)
        assert isinstance(pool, QuantisedPool)
        assert pool.quality is quality is EngineConfig(hot_pool=hot).kv_quality
        assert pool.codes.nbytes + pool.scales.nbytes == 2 * held_nbytes(layout, hot)
    assert held_nbytes(layout, "int8") < 0.52 * held_nbytes(layout, "model")


@pytest.mark.parametrize("nbytes", [0, 5])
def test_a_payload_of_another_size_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="must have"):
        QuantisedPool(LAYOUTS[0], 2, "int8").write_block(0, memoryview(bytes(nbytes)))
