"""Rank 0 of a model over several processes: to the engine a runner like another.

Scheduling, sampling and tokens are the engine's, which is in this process alone; a step's rows go to all
ranks, and each computes them with its heads and its part of the MLP. Logits are those of rank 0, whose hidden
states are everybody's. Against one process sums are cut in parts, so logits differ by rounding; a rank's
blocks have its range of heads in their namespace, so neither is ever taken for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.batch import Batch
from engine.config import EngineConfig
from engine.errors import RanksLost
from engine.models.config import ModelConfig
from engine.models.llama import LlamaModel
from engine.parallel.pool import ParallelPool
from engine.parallel.processes import RankProcesses, RankStart
from engine.parallel.shares import HeadShare
from engine.runner import ModelRunner
from engine.sampling.rows import Drawn, SamplingRow
from engine.weights import Weights
from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout

__all__ = ["ParallelRunner"]


class ParallelRunner:
    """`weights` are rank 0's share; the others load theirs from the same folder. `layout` is rank 0's.
    `processes` are the others', to be closed when nobody needs the engine any more.

    Raises ConfigError where the machine breaks a promise of `config` in any rank, RanksLost when one ends."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        weights: Weights,
        layout: KVLayout,
        n_slots: int,
        max_model_len: int,
    ) -> None:
        if weights.folder is None:
            raise ValueError("other ranks read their weights from a folder, and these are of none")
        ranks, text = config.tensor_parallel, config.model_dump_json()
        starts = [
            RankStart(rank, str(weights.folder), text, n_slots, max_model_len) for rank in range(1, ranks)
        ]
        self.processes = processes = RankProcesses(starts, config.rank_timeout_s)
        own = HeadShare(0, ranks).config(model_config)
        try:
            self._runner = ModelRunner(
                config, own, weights, layout, n_slots, max_model_len, sum_parts=processes.group.sum
            )
            processes.connect(weights.digest)
        except BaseException:
            processes.close(0.0)
            raise
        self.pool = ParallelPool(self._runner.pool, processes)

    def run(self, batch: Batch) -> torch.Tensor:
        """As ModelRunner's. Whatever fails here leaves ranks that have computed different things: it is the
        end of all of them. Raises RanksLost."""
        self.processes.step(batch)
        try:
            return self._runner.run(batch)
        except (RanksLost, RuntimeError) as error:
            raise self.processes.lost(str(error)) from error

    def begin_draw(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Callable[[], list[Drawn]]:
        return self._runner.begin_draw(logits, rows)

    def model_beside(self, model_config: ModelConfig, weights: Weights) -> LlamaModel:
        """Raises ConfigError: the other ranks would have to change in the same step."""
        raise ConfigError(
            "the weights of an engine with tensor_parallel above 1 cannot be changed while it runs: start "
            "another one with the new weights"
        )

    def swap(self, model: LlamaModel) -> None:
        raise AssertionError("there is no model beside")
