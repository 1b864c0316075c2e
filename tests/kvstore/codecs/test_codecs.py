"""Every codec in one matrix: sizes, errors, refusals, and that decoding is total."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs import BY_NUMBER, CODECS, Codec
from kvstore.errors import ConfigError, CorruptBlock
from kvstore.nouns import KVLayout
from tests.kvstore.codecs.matrix import LAYOUTS, LOSSY, PAIRS, decoded, encoded, kv_like, kv_of, payload_of

# Root mean square error of decoded KV-like data, relative to its own: what each format gives, with room.
ERROR_MAX = {"int8": 0.01, "fp8": 0.03, "int4": 0.17, "int4-hadamard": 0.12, "k4v4": 0.08, "k4v3": 0.12}
# Of constant KV: rotated it is one spike in 16, which levels without a zero among them meet least well.
CONSTANT_MAX = {"int8": 0.01, "fp8": 0.01, "int4": 0.01, "int4-hadamard": 0.1, "k4v4": 2.0, "k4v3": 3.0}
every = pytest.mark.parametrize(
    ("codec", "layout"),
    PAIRS,
    ids=lambda it: it.name if isinstance(it, Codec) else f"{it.head_dim}{it.dtype}",
)


def test_names_and_numbers_are_one_to_one() -> None:
    assert len(CODECS) == len(BY_NUMBER)
    assert all(CODECS[codec.name] is codec is BY_NUMBER[codec.number] for codec in CODECS.values())
    ranks = sorted(CODECS.values(), key=lambda codec: -codec.quality)
    assert len({codec.quality for codec in ranks}) == len(ranks), "each has a rank of its own"


@every
def test_what_was_encoded_decodes_to_what_is_close(codec: Codec, layout: KVLayout) -> None:
    kv = kv_of(payload_of(kv_like(layout), layout), layout).float()
    back = kv_of(decoded(codec, layout, encoded(codec, layout, payload_of(kv, layout))), layout).float()
    error = ((back - kv).square().mean() / kv.square().mean()).sqrt()
    assert 0 < float(error) < ERROR_MAX[codec.name]


@every
def test_encoding_the_same_bytes_twice_gives_the_same_bytes(codec: Codec, layout: KVLayout) -> None:
    payload = payload_of(kv_like(layout, 3), layout)
    assert encoded(codec, layout, payload) == encoded(codec, layout, payload)


@every
def test_threads_do_not_meet(codec: Codec, layout: KVLayout) -> None:
    payloads = [payload_of(kv_like(layout, seed), layout) for seed in range(3)]
    wanted = [encoded(codec, layout, payload) for payload in payloads]
    found: list[memoryview | None] = [None] * len(payloads)

    def work(i: int) -> None:
        found[i] = encoded(codec, layout, payloads[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(payloads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 9_000.0, 3e38])
@pytest.mark.parametrize("where", [0, 1])
def test_kv_it_cannot_stand_for_is_not_encoded(
    codec: Codec, layout: KVLayout, value: float, where: int
) -> None:
    kv = kv_like(layout)
    kv[-1, where, -1, -1, -1] = value
    refused = value != 9_000.0
    assert (codec.encode(layout, payload_of(kv, layout)) is None) == refused


@every
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, -(2.0**-101), 1.0, -5_000.0])
def test_constant_kv_comes_back_nearly(codec: Codec, layout: KVLayout, value: float) -> None:
    kv = torch.full_like(kv_like(layout), value)
    back = kv_of(decoded(codec, layout, encoded(codec, layout, payload_of(kv, layout))), layout).float()
    assert float((back - kv).abs().max()) <= abs(value) * CONSTANT_MAX[codec.name] + 2.0**-90


@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_it_counts_every_byte(codec: Codec) -> None:
    layout = KVLayout(30, 0, 3, 64, "float32")
    elements = 30 * 2 * 32 * 3 * 64
    assert codec.bits_per_element(layout) == codec.encoded_nbytes(layout) * 8 / elements


@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_a_layout_it_makes_no_smaller_is_refused_by_name(codec: Codec) -> None:
    with pytest.raises(ConfigError, match=f"codec {codec.name} .*Choose another"):
        codec.check(KVLayout(1, 0, 1, 1, "float16", 1))
    assert not codec.fits(KVLayout(1, 0, 1, 1, "float16", 1))


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_digests_tell_codecs_and_layouts_apart(codec: Codec) -> None:
    digests = [one.digest(layout) for one in LOSSY for layout in LAYOUTS]
    assert len(set(digests)) == len(digests)
    assert codec.digest(LAYOUTS[0]) == codec.digest(LAYOUTS[0])
    assert len(codec.digest(LAYOUTS[0])) == 16


@every
def test_bytes_of_another_size_are_corrupt(codec: Codec, layout: KVLayout) -> None:
    out = memoryview(bytearray(layout.block_nbytes))
    for nbytes in (0, 1, codec.encoded_nbytes(layout) - 1, codec.encoded_nbytes(layout) + 2):
        with pytest.raises(CorruptBlock):
            codec.decode(layout, memoryview(bytes(nbytes)), out)


@every
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spoiled=st.lists(st.integers(0, 2**31), max_size=4))
def test_any_bytes_give_a_block_of_numbers_or_corrupt_block(
    codec: Codec, layout: KVLayout, seed: int, spoiled: list[int]
) -> None:
    draw = torch.Generator().manual_seed(seed)
    nbytes = codec.encoded_nbytes(layout)
    noise = torch.randint(0, 256, (nbytes,), generator=draw, dtype=torch.uint8).numpy()
    near = bytearray(encoded(codec, layout, payload_of(kv_like(layout), layout)))
    for at in spoiled:
        near[at % nbytes] = noise[at % nbytes]
    for data in (noise.tobytes(), bytes(near)):
        try:
            back = decoded(codec, layout, memoryview(data))
        except CorruptBlock:
            continue
        assert bool(kv_of(back, layout).isfinite().all())
