"""Promise: a product's rows do not depend on how many there are; where they would, we refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from engine.linear import PackedLinear, Rowwise, check_row_invariance, has_half_products
from kvstore.errors import ConfigError

SHAPES = [(960, 576), (192, 576), (3072, 576), (576, 1536), (64, 100), (259, 64), (4096, 576)]  # [out, in]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_count_gives_the_same_bits(
    shape: tuple[int, int], threads: int, stored: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(stored).float()
    x = torch.randn(1040, shape[1], generator=generator)
    linear = PackedLinear(weight)
    assert linear.is_half == (stored is torch.bfloat16 and has_half_products())
    whole = linear(x)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-4, atol=1e-4)
    for rows in [*range(1, 70), 127, 128, 129, 255, 256, 300, 511, 640, 1024]:
        for begin in (0, 1040 - rows):
            assert torch.equal(linear(x[begin : begin + rows]), whole[begin : begin + rows]), rows


@pytest.mark.skipif(not has_half_products(), reason="no FBGEMM in this build of torch")
@pytest.mark.parametrize("largest", [1e-3, 0.7, 90.0])
def test_what_float16_holds_exactly_is_multiplied_exactly(largest: float) -> None:
    """Rows of one element show the weights themselves; one that float16 would round goes float32's way."""
    weight = torch.randn(70, 40).mul_(largest / 4).bfloat16().float()
    for one in torch.eye(40).unsqueeze(1):
        torch.testing.assert_close(PackedLinear(weight)(one), one @ weight.T, rtol=0, atol=0)
    weight[3, 5] = largest * (1 + 2**-20)
    linear = PackedLinear(weight)
    assert not linear.is_half
    torch.testing.assert_close(linear(torch.eye(40)), weight.T, rtol=0, atol=0)


def test_weights_too_small_to_scale_are_multiplied_as_they_are() -> None:
    weight = torch.randint(1, 200, (64, 64)).float() * 2.0**-120
    rows = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) * 2.0**60
    exact = (rows.double() @ weight.double().T).float()
    torch.testing.assert_close(PackedLinear(weight)(rows), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 16])
def test_the_check_sees_every_count_that_decodes_are_of(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = PackedLinear.__call__

    def by_row_count(linear: PackedLinear, rows: torch.Tensor) -> torch.Tensor:
        return multiply(linear, rows) * (1 + 1e-6 * (rows.shape[0] == count))

    monkeypatch.setattr(PackedLinear, "__call__", by_row_count)
    with pytest.raises(ConfigError, match=f"product of {count} rows"):
        check_row_invariance([PackedLinear(torch.eye(64))], [])


@pytest.mark.parametrize("odd", [0.0, math.inf, math.nan])
def test_weights_without_a_scale_are_multiplied_as_they_are(odd: float) -> None:
    weight = torch.full((4, 3), odd)
    product = PackedLinear(weight)(torch.ones(2, 3))
    torch.testing.assert_close(product, torch.ones(2, 3) @ weight.T, equal_nan=True)


def test_weights_below_each_other_are_one_product() -> None:
    first, second, x = torch.randn(6, 10), torch.randn(3, 10), torch.randn(4, 10)
    both = PackedLinear(first, second)
    assert (both.out_features, both.in_features) == (9, 10)
    torch.testing.assert_close(both(x), torch.cat((x @ first.T, x @ second.T), dim=1))


def test_bfloat16_is_rounded_once() -> None:
    weight, x = torch.randn(40, 600).bfloat16(), torch.randn(5, 600).bfloat16()
    exact = x.double() @ weight.double().T
    product = PackedLinear(weight)(x)
    assert product.dtype is torch.bfloat16
    torch.testing.assert_close(product.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_machine_where_it_does_not_hold_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    linears = [PackedLinear(torch.eye(64))]
    check_row_invariance(linears, [Rowwise(F.silu, 1536, dtype)])
    multiply = PackedLinear.__call__

    def by_row_count(linear: PackedLinear, rows: torch.Tensor) -> torch.Tensor:
        return multiply(linear, rows) * (1 + 1e-6 * (rows.shape[0] == 16))

    monkeypatch.setattr(PackedLinear, "__call__", by_row_count)
    with pytest.raises(ConfigError, match=r"product of 16 rows .* set threads to 1 or 2"):
        check_row_invariance(linears, [])


def test_an_elementwise_function_that_varies_is_refused() -> None:
    def by_count(x: torch.Tensor) -> torch.Tensor:
        return torch.exp2(x) * (1 + 1e-6 * (x.numel() > 40_000))

    with pytest.raises(ConfigError, match=r"by_count of \d+ rows of 64 elements gives other bits"):
        check_row_invariance([], [Rowwise(by_count, 64, torch.float32)])


@pytest.mark.parametrize("half", [True, False])
def test_a_bias_is_added_to_every_row(half: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, 24, generator=generator) for n in (8, 40)]
    if half:
        weights = [weight.bfloat16().float() for weight in weights]
    bias = torch.randn(48, generator=generator)
    linear, plain = PackedLinear(*weights, bias=bias), PackedLinear(*weights)
    rows = torch.randn(7, 24, generator=generator)
    assert linear.is_half == (half and has_half_products())
    torch.testing.assert_close(linear(rows), plain(rows) + bias)
