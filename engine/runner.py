"""The model on its device: weights, the paged pool and attention. Batches in, logits out.

Everything that touches tensors of the model lies behind `Runner.run`, so that the engine above is the same
for every device and for ranks that share a model. Owned by the engine's thread. Here the CPU's; a GPU's is
engine/device_runner.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionBackend
from engine.attention.fixed_split import FixedSplitAttention, check_attention_invariance, tile_width
from engine.attention.fixed_split_decode import ROWS_MULTIPLE
from engine.attention.sdpa import SdpaAttention
from engine.batch import Batch
from engine.config import EngineConfig
from engine.device import CudaDevice, Device, resolve_device
from engine.device_runner import DeviceRunner
from engine.linear import PackedLinear, Rowwise, check_row_invariance
from engine.models.config import ModelConfig
from engine.models.llama import LlamaModel, StepInput, SumParts
from engine.pool import KVPool
from engine.quantised_pool import make_pool
from engine.sampling.rows import Drawn, SamplingRow
from engine.sampling.sampler import Sampler
from engine.weights import DTYPES, Weights
from kvstore.nouns import KVLayout

__all__ = ["ModelRunner", "Runner", "make_runner"]


class Runner(Protocol):
    @property
    def pool(self) -> KVPool: ...

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute the batch's KV into the pool; float32 [len(logits_rows), vocabulary], on the runner's
        device, valid until the next run. On a GPU it returns before that is computed."""
        ...

    def model_beside(self, model_config: ModelConfig, weights: Weights) -> LlamaModel:
        """A model of other weights and the same shape, ready for `swap`; nothing changes. From any thread."""
        ...

    def swap(self, model: LlamaModel) -> None:
        """Compute with this one from the next batch on. The pool stays as it is."""
        ...

    def begin_draw(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Callable[[], list[Drawn]]:
        """Draw a token a row of `logits`. The answer, asked for before the next run, waits for them."""
        ...


def make_runner(
    config: EngineConfig,
    model_config: ModelConfig,
    weights: Weights,
    layout: KVLayout,
    n_slots: int,
    max_model_len: int,
    device: Device | None = None,
) -> Runner:
    """For a device, or the one that `config` names. Raises ConfigError where the machine has no such device
    or breaks a promise of `config`."""
    if device is None:
        named = resolve_device(config.device, batch_invariant=config.batch_invariant)
        if named.type == "cpu":
            return ModelRunner(config, model_config, weights, layout, n_slots, max_model_len)
        device = CudaDevice(named)
    return DeviceRunner(config, model_config, weights, layout, n_slots, max_model_len, device)


class ModelRunner:
    """`pool` holds the KV of `n_slots` blocks. Raises ConfigError where the machine breaks a promise of
    `config` (batch invariance)."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        weights: Weights,
        layout: KVLayout,
        n_slots: int,
        max_model_len: int,
        sum_parts: SumParts | None = None,
    ) -> None:
        """`weights` and `model_config` may be one rank's share, whose parts `sum_parts` makes whole."""
        self._config, self._max_model_len = config, max_model_len
        self._model = LlamaModel(model_config, weights.tensors, max_model_len, sum_parts=sum_parts)
        windows = model_config.windows
        if config.batch_invariant:
            _check_invariance(self._model, layout)
        self._attention: AttentionBackend = (
            FixedSplitAttention(model_config.heads, windows)
            if config.batch_invariant
            else SdpaAttention(windows)
        )
        self.pool = make_pool(layout, n_slots, config.hot_pool)

    def model_beside(self, model_config: ModelConfig, weights: Weights) -> LlamaModel:
        """A model of other weights and the same shape, ready for `swap`; nothing changes. From any thread.
        Its products are proved to be batch-invariant: how one is computed may depend on the weights. The rest
        depends on shapes."""
        model = LlamaModel(model_config, weights.tensors, self._max_model_len)
        if self._config.batch_invariant:
            check_row_invariance(_packed(model), ())
        return model

    def swap(self, model: LlamaModel) -> None:
        """Compute with this one from the next batch on. The pool stays as it is."""
        self._model = model

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute the batch's KV into the pool; float32 [len(logits_rows), vocabulary]."""
        with torch.inference_mode():
            return self._model.logits(self.compute(batch))

    def compute(self, batch: Batch) -> torch.Tensor:
        """As `run`, but the hidden states that logits are made of: what a rank does for others."""
        with torch.inference_mode():
            plan = self._attention.plan(batch.segments, self.pool)
            step = StepInput(batch.token_ids, batch.positions, batch.pool_rows, batch.logits_rows)
            return self._model.forward(step, self.pool, plan)

    def begin_draw(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Callable[[], list[Drawn]]:
        """As Runner has it: there is nothing to wait for but the drawing itself."""
        return lambda: Sampler.sample(logits, rows)


def _packed(model: LlamaModel) -> Iterator[PackedLinear]:
    """The products of a model for the CPU."""
    return cast(Iterator[PackedLinear], model.products())


def _check_invariance(model: LlamaModel, layout: KVLayout) -> None:
    """Prove it for everything of the forward pass that could break it. Raises ConfigError."""
    dtype, hidden = DTYPES[layout.dtype], model.config.hidden_size

    def rms_norm(rows: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(rows, (hidden,), eps=model.config.rms_norm_eps)

    rowwise = [
        Rowwise(rms_norm, hidden, dtype),
        Rowwise(F.silu, model.inner_width, dtype),
        Rowwise(torch.exp2, ROWS_MULTIPLE * tile_width(layout.block_tokens), torch.float32),
        Rowwise(model.heads, model.projected_width, dtype),
    ]
    check_row_invariance(_packed(model), rowwise)
    check_attention_invariance(model.config.heads, layout, windowed=any(model.config.windows))
