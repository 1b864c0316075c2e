"""The worker's half: fills vLLM's blocks from the store and copies out what a step has computed.

    register -> each step: start(plan), save(plan), report() -> close

All of it is called on vLLM's thread, and nothing raises there once `register` has returned: what goes wrong
costs misses and counters. Waits on that thread: one strided copy a step, never the store; `IDLE_S` in a step
without work while something is loaded, since vLLM would ask again at once and take a core and the interpreter
from whoever loads. `close` gives everything back within twice `store_side.CLOSE_S`.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from typing import Final

import structlog
import torch

from kvstore.errors import ConfigError
from kvstore.integrations.vllm.conversion import Pool
from kvstore.integrations.vllm.copies import copies_of
from kvstore.integrations.vllm.floor import Floor
from kvstore.integrations.vllm.layout import AttentionLayer, BlockLayout, by_index, probe_all
from kvstore.integrations.vllm.loading import Loader
from kvstore.integrations.vllm.plans import StepPlan, StepReport
from kvstore.integrations.vllm.saving import Saver
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.staging import Staging
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.integrations.vllm.tallies import Tallies

__all__ = ["IDLE_S", "Worker"]

IDLE_S: Final = 0.002

log = structlog.get_logger(__name__)


class Worker:
    """One rank's. Without a `store` of its own it makes the one that the settings name."""

    def __init__(self, setup: Setup, store: StoreSide | None = None) -> None:
        self.layout: BlockLayout | None = None
        self._setup = setup
        self._store = store or StoreSide(setup.config)
        self._tallies = Tallies()
        self._store.count = self._tallies.count
        self._floor = Floor()
        self._is_idle = False
        self._saver: Saver | None = None
        self._loader: Loader | None = None

    def register(self, kv_caches: Mapping[str, torch.Tensor], layers: Mapping[str, AttentionLayer]) -> None:
        """Find out how the pool lies. Raises ConfigError with the reason for one that cannot be served."""
        setup = self._setup
        names = by_index([*kv_caches])
        self.layout = probe_all({name: kv_caches[name] for name in names}, layers, setup.vllm_block_tokens)
        pool = Pool([kv_caches[name] for name in names], self.layout, setup.layout)
        copies, pinned = copies_of(pool), kv_caches[names[0]].is_cuda
        shared = setup, self._store, pool, copies, self._floor, self._tallies
        if setup.saves:
            self._saver = Saver(*shared, Staging(setup.config.staging_nbytes, setup.layout, pinned=pinned))
        if setup.loads:
            self._loader = Loader(*shared, pinned=pinned)
        log.info("vLLM's blocks are known", layout=self.layout.fingerprint, groups=len(pool.groups))

    def start(self, plan: StepPlan) -> None:
        """Begin the loads of a step; first, forget who ended."""
        self._forget(plan.ended)
        self._is_idle = plan.is_idle
        for load in plan.loads:
            try:
                if self._loader is None:
                    raise ConfigError("a load was planned for a worker that takes none: see kv_role")
                self._loader.start(load)
            except Exception:
                log.error("a load did not begin", request=load.request_id, trace=traceback.format_exc())
                self._tallies.count("unexpected_errors")
                blocks = load.block_ids[load.begin // self._setup.vllm_block_tokens :]
                self._tallies.loaded(load.request_id, set(blocks))

    def save(self, plan: StepPlan) -> None:
        """Copy out what the step's forward pass has filled, before anything can overwrite it."""
        if self._saver is None or not plan.saves:
            return
        began = self._store.clock.now()
        try:
            self._saver.save(plan.saves)
        except Exception:
            log.error("a step's blocks were not saved", trace=traceback.format_exc())
            self._tallies.count("unexpected_errors")
        self._tallies.took("copy", self._store.clock.now() - began)

    def report(self) -> StepReport:
        """What ended since the last one."""
        if self._loader is not None:
            if self._is_idle and self._loader.is_loading:
                self._tallies.wait_for_a_load(IDLE_S)
            self._loader.end_overdue()
        return self._tallies.report()

    def close(self) -> None:
        """Bounded. What was copied is still published, if the store takes it in time."""
        if self._loader is not None:
            self._loader.close()
        self._store.close()

    def _forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if self._saver is not None:
                self._saver.forget(request_id)
            if self._loader is not None:
                self._loader.abort(request_id)
