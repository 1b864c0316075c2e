"""The model on a GPU: decoding steps are recorded graphs, steps with pieces of prompts run as they come.

    Batch (host) --one pinned copy--> inputs --graph or eager--> logits      no wait for the device between

The same model as on the CPU, over plain products (engine/plain_linear.py) and a pool in the device's memory.
A step that draws nothing is not waited for by anybody: the next one is issued behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import structlog
import torch

from engine.attention.base import AttentionPlan
from engine.attention.padded import PaddedAttention
from engine.batch import Batch
from engine.config import EngineConfig
from engine.decode_graphs import DecodeGraphs, PagedDecode
from engine.device import Device
from engine.device_pool import DeviceStorage
from engine.models.config import ModelConfig
from engine.models.llama import LlamaModel, StepInput
from engine.plain_linear import OnDevice, PlainLinear
from engine.pool import KVPool
from engine.quantised_pool import QuantisedPool
from engine.sampling.on_device import DeviceSampler
from engine.sampling.rows import Drawn, SamplingRow
from engine.step_invariance import check_step_invariance
from engine.weights import Weights
from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout

__all__ = ["DeviceRunner"]

SPARE_SLOTS: Final = 1
"""Behind those of sequences: for the rows that pad a recorded batch."""

log = structlog.get_logger(__name__)


class DeviceRunner:
    """`pool` holds the KV of `n_slots` blocks, and a spare one. Raises ConfigError if it does not fit the
    device's memory, or if batch invariance is asked for and does not hold there."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        weights: Weights,
        layout: KVLayout,
        n_slots: int,
        max_model_len: int,
        device: Device,
    ) -> None:
        self._device = device
        self._sampler = DeviceSampler(device)
        self._issued = device.mark()
        self._rows_max = config.running_max
        self._max_model_len = max_model_len
        with torch.inference_mode(), device.current():
            try:
                self._model = self.model_beside(model_config, weights)
                slots = n_slots + SPARE_SLOTS
                self.pool = _pool_on(device, layout, slots, config.hot_pool)
                self._attention = _attention_on(device.torch_device, model_config, config)
                self.graphs = self._record()
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    f"the model and {n_slots} KV blocks of {layout.block_nbytes} bytes do not fit into "
                    f"{device.torch_device}: lower pool_nbytes or running_max ({error})"
                ) from error
        if config.batch_invariant:
            check_step_invariance(
                self.run,
                vocab_size=model_config.vocab_size,
                block_tokens=layout.block_tokens,
                n_slots=n_slots,
                rows_max=config.running_max,
                tokens_max=max_model_len,
            )

    def model_beside(self, model_config: ModelConfig, weights: Weights) -> LlamaModel:
        """A model of other weights and the same shape, on the device, ready for `swap`; nothing changes. From
        any thread. The device holds both until then."""
        with torch.inference_mode(), self._device.current():
            tensors = OnDevice(weights.tensors, self._device.torch_device)
            return LlamaModel(model_config, tensors, self._max_model_len, PlainLinear)

    def swap(self, model: LlamaModel) -> None:
        """Compute with this one from the next batch on; the pool stays as it is. Takes as long as recording
        at load: a graph knows its weights by their addresses."""
        self._model = model
        with torch.inference_mode(), self._device.current():
            self.graphs = self._record()

    def begin_draw(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Callable[[], list[Drawn]]:
        """Tokens drawn on the device; the answer waits for their copy."""
        return self._sampler.begin(logits, rows)

    def run(self, batch: Batch) -> torch.Tensor:
        """Compute the batch's KV into the pool; float32 [len(logits_rows), vocabulary] on the device, valid
        until the next run. Waits for the run before it only: the host is never more than one ahead, and who
        times steps sees them as long as they are."""
        with torch.inference_mode(), self._device.current():
            logits = self.graphs.run(batch) if self.graphs.can_run(batch) else self._run_as_it_comes(batch)
            before, self._issued = self._issued, self._device.mark()
            before.synchronize()
            return logits

    def _run_as_it_comes(self, batch: Batch) -> torch.Tensor:
        rows = len(batch.token_ids)
        columns = torch.cat((batch.token_ids, batch.positions, batch.pool_rows, batch.logits_rows))
        pinned = self._device.pinned(columns.nbytes).view(torch.int64)
        pinned.copy_(columns)
        there = pinned.to(self._device.torch_device, non_blocking=True)
        token_ids, positions, pool_rows = there[: 3 * rows].view(3, rows)
        plan = self._attention.plan(batch.segments, self.pool)
        return self._compute(StepInput(token_ids, positions, pool_rows, there[3 * rows :]), plan)

    def _record(self) -> DecodeGraphs:
        block_tokens = self.pool.layout.block_tokens
        return DecodeGraphs(
            self._device,
            self.pool,
            self._attention,
            self._compute,
            rows_max=self._rows_max,
            blocks_max=-(-self._max_model_len // block_tokens),
            spare_slot=self.pool.n_slots - 1,
        )

    def _compute(self, step: StepInput, plan: AttentionPlan) -> torch.Tensor:
        return self._model.logits(self._model.forward(step, self.pool, plan))


def _pool_on(device: Device, layout: KVLayout, n_slots: int, hot: str) -> KVPool:
    if hot == "model":
        return KVPool(layout, n_slots, DeviceStorage(layout, n_slots, device))
    # Its blocks leave and enter on the compute stream, waited for.
    return QuantisedPool(layout, n_slots, hot, device.torch_device)


def _attention_on(device: torch.device, model_config: ModelConfig, config: EngineConfig) -> PagedDecode:
    """Triton's kernels on a GPU that has Triton."""
    if device.type == "cpu":
        return PaddedAttention(model_config.windows)
    try:
        from engine.attention.triton_attention import TritonAttention
    except ImportError as error:
        log.warning("attention is torch's, which is slow on a GPU: install triton", why=str(error))
        return PaddedAttention(model_config.windows)
    return TritonAttention(model_config.heads, model_config.windows, batch_invariant=config.batch_invariant)
