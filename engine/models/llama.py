"""The Llama family's forward pass over a paged pool, one step's rows at a time.

Rows of all sequences are computed together; only attention knows where one ends and the next begins.
Weights stay under their Hugging Face names, unfused, so that those stored in the compute dtype stay views of
the mapped file, shared by all workers of a host (fusing gate and up was also slower: 404 ms, not 322, a step
of 512 tokens over 30 layers on 2 threads). Checked against transformers in tests/engine/models/test_llama.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionPlan
from engine.linear import LinearKernel
from engine.models.config import ModelConfig
from engine.models.rope import inverse_frequencies
from engine.pool import KVPool
from engine.weights import EMBEDDING, LM_HEAD

__all__ = ["LlamaModel", "StepInput"]


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's rows. The first `rows` are real, the rest are padding up to the kernel's multiple."""

    rows: int
    token_ids: torch.Tensor  # int64 [padded]
    positions: torch.Tensor  # int64 [padded]
    pool_rows: torch.Tensor  # int64 [rows]: where each row's K and V go


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer's weights, [out, in]."""

    input_norm: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    inner_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class LlamaModel:
    """Stateless but for weights and the rotary table (max_model_len x head_dim floats)."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, torch.Tensor],
        kernel: LinearKernel,
        max_model_len: int,
    ) -> None:
        self.config = config
        self._linear = kernel
        self._embedding = tensors[EMBEDDING]
        self._norm = tensors["model.norm.weight"]
        self._head = tensors[LM_HEAD]
        self._layers = [_layer(tensors, index) for index in range(config.layers)]
        angles = torch.outer(torch.arange(max_model_len).float(), inverse_frequencies(config))
        self._cos = angles.cos().to(self._embedding.dtype)
        self._sin = angles.sin().to(self._embedding.dtype)

    def matrices(self) -> list[torch.Tensor]:
        """One of each weight that takes part in a product."""
        first = self._layers[0]
        projections = [first.query, first.key, first.value, first.output]
        return [*projections, first.gate, first.up, first.down, self._head]

    def forward(self, step: StepInput, pool: KVPool, plan: AttentionPlan) -> torch.Tensor:
        """Compute the rows, write their K and V into the pool. The last hidden states."""
        config = self.config
        hidden = F.embedding(step.token_ids, self._embedding)
        cos, sin = self._cos[step.positions].unsqueeze(1), self._sin[step.positions].unsqueeze(1)
        attended = hidden.new_zeros(hidden.shape[0], config.heads, config.head_dim)
        for index, layer in enumerate(self._layers):
            normed = self._rms_norm(hidden, layer.input_norm)
            queries = _rotate(self._heads(normed, layer.query), cos, sin)
            keys = _rotate(self._heads(normed, layer.key), cos, sin)
            values = self._heads(normed, layer.value)
            pool.keys(index)[step.pool_rows] = keys[: step.rows]
            pool.values(index)[step.pool_rows] = values[: step.rows]
            plan.attend(index, queries, attended)
            hidden = hidden + self._linear.apply(attended.flatten(1), layer.output)
            hidden = hidden + self._mlp(self._rms_norm(hidden, layer.inner_norm), layer)
        return hidden

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """float32 [len(rows), vocabulary] for the rows (int64) that need them."""
        count = rows.numel()
        index = F.pad(rows, (0, self._linear.padded(count) - count))
        normed = self._rms_norm(hidden[index], self._norm)
        return self._linear.apply(normed, self._head)[:count].float()

    def _heads(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._linear.apply(rows, weight).view(rows.shape[0], -1, self.config.head_dim)

    def _mlp(self, rows: torch.Tensor, layer: _Layer) -> torch.Tensor:
        gate = F.silu(self._linear.apply(rows, layer.gate), inplace=True)
        return self._linear.apply(gate.mul_(self._linear.apply(rows, layer.up)), layer.down)

    def _rms_norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(rows, weight.shape, weight, self.config.rms_norm_eps)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [rows, heads, head_dim], pairs (i, i + head_dim / 2); cos and sin half as wide."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _layer(tensors: Mapping[str, torch.Tensor], index: int) -> _Layer:
    prefix = f"model.layers.{index}."
    return _Layer(
        input_norm=tensors[prefix + "input_layernorm.weight"],
        query=tensors[prefix + "self_attn.q_proj.weight"],
        key=tensors[prefix + "self_attn.k_proj.weight"],
        value=tensors[prefix + "self_attn.v_proj.weight"],
        output=tensors[prefix + "self_attn.o_proj.weight"],
        inner_norm=tensors[prefix + "post_attention_layernorm.weight"],
        gate=tensors[prefix + "mlp.gate_proj.weight"],
        up=tensors[prefix + "mlp.up_proj.weight"],
        down=tensors[prefix + "mlp.down_proj.weight"],
    )
