"""Promise: an invariant product's rows do not depend on how many there are; where they would, we refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.linear import INVARIANT, PLAIN, ROWS_MULTIPLE, THIN_ROWS_MAX, check_row_invariance
from kvstore.errors import ConfigError

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (64, 100), (259, 64), (4096, 576)]  # [out, in]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_padded_row_count_gives_the_same_bits(
    shape: tuple[int, int], threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(1040, shape[1], generator=generator)
    whole = INVARIANT.apply(x, weight)
    torch.testing.assert_close(whole, x @ weight.T, rtol=1e-4, atol=1e-4)
    for rows in [*range(ROWS_MULTIPLE, 2 * THIN_ROWS_MAX, ROWS_MULTIPLE), 640, 1024]:
        for begin in (0, 1040 - rows):
            part = INVARIANT.apply(x[begin : begin + rows], weight)
            assert torch.equal(part, whole[begin : begin + rows]), rows


def test_rows_are_padded_up_to_the_kernels_multiple() -> None:
    assert [INVARIANT.padded(rows) for rows in (1, 16, 17, 500)] == [16, 16, 32, 512]
    assert [PLAIN.padded(rows) for rows in (1, 17)] == [1, 17]


def test_a_machine_where_it_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.eye(64)]
    check_row_invariance(weights)
    multiply = torch.mm

    def by_row_count(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return multiply(left, right) * (1 + 1e-6 * (right.shape[1] == ROWS_MULTIPLE))

    monkeypatch.setattr(torch, "mm", by_row_count)
    with pytest.raises(ConfigError, match=r"product of 16 rows .* set threads to 1 or 2"):
        check_row_invariance(weights)


def test_an_elementwise_function_that_varies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exp2 = torch.exp2

    def by_count(x: torch.Tensor) -> torch.Tensor:
        return exp2(x) * (1 + 1e-6 * (x.numel() > 40_000))

    monkeypatch.setattr(torch, "exp2", by_count)
    with pytest.raises(ConfigError, match="elements gives other bits"):
        check_row_invariance([torch.eye(64)])
