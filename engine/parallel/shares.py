"""What of a model is whose: ranks take equal ranges of heads, and of the MLP's width what comes nearest.

    q, k, v (and biases), gate, up    rows of its range       products give the rank's heads and width
    o, down                           columns of its range    products give its part of a sum over ranks
    o's bias                          rank 0 alone            it is added once
    embedding, norms, head            every rank              hidden states are the same everywhere

So a layer needs two sums over ranks (group.py), and each rank's pool holds its own KV heads: its `KVLayout`
has their range, which makes its namespace its own. Source: Shoeybi et al. 2019, "Megatron-LM".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch

from engine.models.config import ModelConfig
from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout

__all__ = ["HeadShare", "check_ranks"]

_ROWS: Final = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
_BIASES: Final = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
_COLUMNS: Final = ("o_proj.weight", "down_proj.weight")


def check_ranks(config: ModelConfig, ranks: int) -> None:
    """Raises ConfigError where the heads cannot be dealt out."""
    if config.kv_heads % ranks or config.heads % ranks:
        raise ConfigError(
            f"{ranks} ranks cannot share {config.kv_heads} KV heads and {config.heads} attention heads: set "
            "engine.tensor_parallel to a divisor of both"
        )


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Rank `rank` of `ranks`; 0 of 1 is all of it."""

    rank: int
    ranks: int

    def config(self, whole: ModelConfig) -> ModelConfig:
        """Of the model that this rank computes."""
        biased = whole.biased if self.rank == 0 else tuple(name for name in whole.biased if name != "o")
        heads, kv_heads = whole.heads // self.ranks, whole.kv_heads // self.ranks
        return replace(whole, heads=heads, kv_heads=kv_heads, biased=biased)

    def layout(self, first: KVLayout) -> KVLayout:
        """Of this rank's blocks; `first` is rank 0's."""
        begin = self.rank * first.kv_heads
        return replace(first, head_begin=begin, head_end=begin + first.kv_heads)

    def tensor(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a weight: a view."""
        if self.ranks == 1:
            return whole
        if name.endswith((*_ROWS, *_BIASES)):
            return whole[self._range(whole.shape[0])]
        return whole[:, self._range(whole.shape[1])] if name.endswith(_COLUMNS) else whole

    def _range(self, size: int) -> slice:
        return slice(size * self.rank // self.ranks, size * (self.rank + 1) // self.ranks)
