"""Matrix products whose bits do not depend on how many rows there are: half of batch invariance.

MKL takes other kernels for few rows than for many, and splits rows over threads, so the same row gives
other bits in another batch. Measured (AVX2, torch 2.13 with MKL 2024.2, 1 and 2 threads, 12 shapes up to
576 x 49,152): `x @ W.T` differs below 4 rows and at counts that are no multiple of 4; `W @ x.T` differs
below 12 rows; from there on all agree, and with each other. So rows are padded to a multiple of 16, and
few rows go weight first, which is 1.3 to 1.7 times faster there (16 rows x 49,152: 12 ms, not 22).

Elementwise functions have the like: they end in scalar code that rounds otherwise than the vector code
where a thread's share is no multiple of the vector. With rows a multiple of 16 and 1 or 2 threads no such
end occurs.

What was measured on one machine is not law on another: `check_row_invariance` proves it at load, for the
shapes and threads at hand, or refuses. bfloat16 has not been proved and is not promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from kvstore.errors import ConfigError

__all__ = ["INVARIANT", "PLAIN", "LinearKernel", "check_row_invariance"]

ROWS_MULTIPLE: Final = 16
THIN_ROWS_MAX: Final = 256
"""Up to here the weight goes first."""
_PROBE_ROWS: Final = (16, 48, 272)
"""Both sides of THIN_ROWS_MAX, and counts that split unevenly over threads."""
_ELEMENTS_A_THREAD: Final = 1 << 16
"""Twice torch's grain, so that every number of shares from one to all threads occurs."""
_PROBE_STEP: Final = ROWS_MULTIPLE * 272


@dataclass(frozen=True, slots=True)
class LinearKernel:
    """`apply(x [rows, in], weight [out, in]) -> [rows, out]` for rows a multiple of `rows_multiple`.

    The result may be a transposed view: nothing is copied that elementwise work can read as it lies.
    """

    rows_multiple: int
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def padded(self, rows: int) -> int:
        return -(-rows // self.rows_multiple) * self.rows_multiple


def _plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _invariant(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > THIN_ROWS_MAX or x.dtype != torch.float32:
        return F.linear(x, weight)
    return torch.mm(weight, x.t()).t()


PLAIN: Final = LinearKernel(1, _plain)
INVARIANT: Final = LinearKernel(ROWS_MULTIPLE, _invariant)


def check_row_invariance(weights: Iterable[torch.Tensor]) -> None:
    """Prove that INVARIANT is what it says, on this machine with its threads, for these float32 weights.

    About 0.5 s for SmolLM2-135M. Raises ConfigError if a row's bits depend on what is computed with it.
    """
    generator = torch.Generator().manual_seed(0)
    for weight in {weight.shape: weight for weight in weights}.values():
        x = torch.randn(max(_PROBE_ROWS), weight.shape[1], generator=generator)
        whole = INVARIANT.apply(x, weight)
        for rows in _PROBE_ROWS:
            if not torch.equal(INVARIANT.apply(x[-rows:], weight), whole[-rows:]):
                raise _variant(f"a product of {rows} rows with a {list(weight.shape)} matrix")
    x = torch.randn(torch.get_num_threads() * _ELEMENTS_A_THREAD, generator=generator)
    for function in (torch.exp2, F.silu):
        whole = function(x)
        for elements in range(_PROBE_STEP, x.numel(), _PROBE_STEP):
            if not torch.equal(function(x[:elements]), whole[:elements]):
                raise _variant(f"{function.__name__} of {elements} elements")


def _variant(what: str) -> ConfigError:
    return ConfigError(
        f"{what} gives other bits than the same within a larger batch, on this machine with "
        f"{torch.get_num_threads()} threads: set threads to 1 or 2, or batch_invariant to false"
    )
