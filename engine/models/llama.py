"""The families' forward pass over a paged pool, one step's rows at a time: Llama, and what others add to it.

Rows of all sequences are computed together; only attention knows where one ends and the next begins. What
the same rows are multiplied with is one product: queries, keys and values; gate and up. Embeddings and norms
stay views of the mapped file where they are stored in the compute dtype; matrices are packed copies
(linear.py). Which parts a family has beside Llama's (families.py) is read off its config: a bias in
attention's products, a norm of each head's query and key. Windows are attention's matter alone. Checked
against transformers in tests/engine/models/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionPlan
from engine.linear import Linear, PackedLinear
from engine.models.config import ModelConfig
from engine.models.rope import attention_factor, inverse_frequencies
from engine.pool import KVPool
from engine.weights import EMBEDDING, LM_HEAD

__all__ = ["LlamaModel", "StepInput", "SumParts"]

SumParts = Callable[[torch.Tensor], torch.Tensor]


_WIDTH_MULTIPLE: Final = 64
"""Silu's rows are filled with zeros up to it: torch ends a thread's share in scalar code that rounds
otherwise than its vectors do, and no share shall end inside one."""


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's rows. Of those that need no logits the last layer computes K and V alone."""

    token_ids: torch.Tensor  # int64 [rows]
    positions: torch.Tensor  # int64 [rows]
    pool_rows: torch.Tensor  # int64 [rows]: where each row's K and V go
    logits_rows: torch.Tensor  # int64, rising


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    query_key_value: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    inner_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class LlamaModel:
    """Stateless but for weights and the rotary table (max_model_len x head_dim floats)."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        max_model_len: int,
        linear: Callable[..., Linear] = PackedLinear,
        sum_parts: SumParts | None = None,
    ) -> None:
        """`sum_parts` makes of one rank's part of a product the sum over ranks (engine/parallel)."""
        self.config = config
        self._sum_parts = sum_parts or _whole
        self._embedding = tensors[EMBEDDING]
        self._norm = tensors["model.norm.weight"]
        self._head = linear(tensors[LM_HEAD])
        self._heads = [config.heads, config.kv_heads]
        self._layers = [_layer(tensors, index, config, linear) for index in range(config.layers)]
        angles = torch.outer(torch.arange(max_model_len).float(), inverse_frequencies(config))
        factor = attention_factor(config)
        cos, sin = angles.cos().mul_(factor), angles.sin().mul_(factor)
        self._cos = torch.cat((cos, cos), 1).to(self._embedding)
        self._sin = torch.cat((-sin, sin), 1).to(self._embedding)

    @property
    def inner_width(self) -> int:
        """Of the rows that silu sees."""
        return self._layers[0].down.in_features

    @property
    def projected_width(self) -> int:
        """Of the rows that attention's norms see."""
        return self._layers[0].query_key_value.out_features

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        """What one layer makes of its rows before attention, as `forward` does, at the same position each."""
        rotating, values = self._heads_of(projected, self._layers[0])
        return torch.cat((_rotate(rotating, self._cos[-1], self._sin[-1]), values), 1)

    def products(self) -> Iterator[Linear]:
        """All that the forward pass computes."""
        for layer in self._layers:
            yield from (layer.query_key_value, layer.output, layer.gate_up, layer.down)
        yield self._head

    def forward(self, step: StepInput, pool: KVPool, plan: AttentionPlan) -> torch.Tensor:
        """Compute the rows, write their K and V into the pool. The last hidden states of `logits_rows`."""
        config = self.config
        hidden = F.embedding(step.token_ids, self._embedding)
        cos, sin = self._cos[step.positions].unsqueeze(1), self._sin[step.positions].unsqueeze(1)
        attended = hidden.new_empty(hidden.shape[0], config.heads, config.head_dim)
        for index, layer in enumerate(self._layers):
            projected = layer.query_key_value(self._rms_norm(hidden, layer.input_norm))
            rotating, values = self._heads_of(projected, layer)
            queries, keys = torch.split(_rotate(rotating, cos, sin), self._heads, 1)
            pool.write(index, step.pool_rows, keys, values)
            if index + 1 == config.layers:
                if not len(step.logits_rows):
                    return hidden[:0]
                plan.attend(index, queries, attended)
                hidden, attended = _kept(hidden, step.logits_rows), _kept(attended, step.logits_rows)
            else:
                plan.attend(index, queries, attended)
            hidden = hidden + self._sum_parts(layer.output(attended.flatten(1)))
            gate, up = layer.gate_up(self._rms_norm(hidden, layer.inner_norm)).chunk(2, dim=1)
            hidden = hidden + self._sum_parts(layer.down(F.silu(gate).mul_(up)))
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocabulary] of what `forward` returns."""
        if not len(hidden):
            return hidden.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        return self._head(self._rms_norm(hidden, self._norm)).float()

    def _heads_of(self, projected: torch.Tensor, layer: _Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, heads, head_dim]: queries and keys, in this order and not rotated yet; and values."""
        heads = projected.view(len(projected), -1, self.config.head_dim)
        rotating, values = torch.split(heads, [sum(self._heads), self.config.kv_heads], 1)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = torch.split(rotating, self._heads, 1)
            normed = self._rms_norm(queries, layer.query_norm), self._rms_norm(keys, layer.key_norm)
            rotating = torch.cat(normed, 1)
        return rotating, values

    def _rms_norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(rows, weight.shape, weight, self.config.rms_norm_eps)


def _kept(all_rows: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return all_rows if len(rows) == len(all_rows) else all_rows[rows]


def _whole(part: torch.Tensor) -> torch.Tensor:
    """The sum over one rank."""
    return part


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [rows, heads, head_dim], pairs (i, i + head_dim / 2). Of `sin` the first half is
    negative: what is added to a pair's first is its second's."""
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos).addcmul_(torch.cat((second, first), dim=-1), sin)


def _layer(
    tensors: Mapping[str, torch.Tensor], index: int, config: ModelConfig, linear: Callable[..., Linear]
) -> _Layer:
    prefix = f"model.layers.{index}."

    def matrix(name: str) -> torch.Tensor:
        return tensors[f"{prefix}{name}_proj.weight"]

    def bias(*projections: str) -> torch.Tensor | None:
        if not set(projections) <= set(config.biased):
            return None
        return torch.cat([tensors[f"{prefix}self_attn.{name}_proj.bias"] for name in projections])

    gate, up, down = matrix("mlp.gate"), matrix("mlp.up"), matrix("mlp.down")
    missing = -gate.shape[0] % _WIDTH_MULTIPLE

    return _Layer(
        input_norm=tensors[prefix + "input_layernorm.weight"],
        query_key_value=linear(
            *map(matrix, ("self_attn.q", "self_attn.k", "self_attn.v")), bias=bias("q", "k", "v")
        ),
        query_norm=tensors.get(prefix + "self_attn.q_norm.weight"),
        key_norm=tensors.get(prefix + "self_attn.k_norm.weight"),
        output=linear(matrix("self_attn.o"), bias=bias("o")),
        inner_norm=tensors[prefix + "post_attention_layernorm.weight"],
        gate_up=linear(F.pad(gate, (0, 0, 0, missing)), F.pad(up, (0, 0, 0, missing))),
        down=linear(F.pad(down, (0, missing))),
    )
