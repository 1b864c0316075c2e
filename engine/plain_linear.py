"""Weights on a device: matrix products there, and the mapped file's tensors on their way to it.

`PlainLinear` is called as linear.py's `PackedLinear` is, and holds its weights once, in the compute dtype.
What a row's bits are depends on how many come with it, as cuBLAS chooses another kernel: batch invariance is
proved at load like anywhere, or refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F

__all__ = ["OnDevice", "PlainLinear"]


class PlainLinear:
    """Weights [out, in], one below the other, as one product, where they lie."""

    __slots__ = ("_bias", "_weight", "in_features", "out_features")

    def __init__(self, *weights: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.out_features, self.in_features = self._weight.shape
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, in] -> [n, out], in the dtype of `rows`."""
        return F.linear(rows, self._weight, self._bias)


class OnDevice(Mapping[str, torch.Tensor]):
    """Tensors that move to the device when they are asked for, so that no more of a model lies there twice
    than what is being joined. Names of one tensor (tied embeddings) stay one, while any is held."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._moved: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        moved = self._moved.get(id(tensor))
        if moved is None:
            moved = self._moved[id(tensor)] = tensor.to(self._device)
        return moved

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
