"""The class that vLLM loads, once in its scheduler and once in each worker: every method hands over to the
half that its process has. vLLM's own interface is kv_connector/v1/base.py; what it asks is written there.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, Final

import structlog

from kvstore.logs import log_plainly

try:
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        SupportsHMA,
    )
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    from kvstore.integrations.vllm.exchanged import Figures, Metadata, Metrics, Stored
except ImportError as error:
    raise ImportError(
        f"the connector needs vLLM 0.32 or 0.33, and what is installed lacks something of theirs ({error})"
    ) from error

from kvstore.integrations.vllm.config import read_config
from kvstore.integrations.vllm.events import StoredEvent
from kvstore.integrations.vllm.facts import read_facts, refuse, setup_of
from kvstore.integrations.vllm.plans import StepReport
from kvstore.integrations.vllm.scheduling import Scheduling
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.integrations.vllm.versions import check_version
from kvstore.integrations.vllm.weights import weights_of
from kvstore.integrations.vllm.working import Worker
from kvstore.nouns import Tier

__all__ = ["KVStrataConnector"]

SOURCES: Final = {Tier.HOST: CacheHitSource.HOST, Tier.NVME: CacheHitSource.DISK}


class KVStrataConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Raises ConfigError at start for what it cannot share, with the reason and what to do."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if not structlog.is_configured():  # or its lines would stand between what the program prints
            log_plainly(logging.INFO, sys.stderr)
        config = read_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        check_version(vllm.__version__, any_version=config.any_vllm_version)
        facts = read_facts(vllm_config, kv_cache_config)
        refuse(facts, config)
        self._pool: Any = None
        self._report = StepReport()
        if role == KVConnectorRole.SCHEDULER:
            setup, weights = setup_of(vllm_config, facts, config, 0), weights_of(vllm_config, config)
            self._side = StoreSide(config)
            hash_tokens = _hash_tokens(vllm_config, kv_cache_config, facts.block_tokens)
            self._scheduling = Scheduling(setup, self._side, weights, self._is_cache_free, hash_tokens)
        else:
            self._worker = Worker(setup_of(vllm_config, facts, config, _rank()))

    # -- of the scheduler --------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # what was not saved is a miss, and nothing worse

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._pool = gpu_block_pool

    def on_new_request(self, request: Any) -> None:
        self._scheduling.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduling.matched(request, num_computed_tokens)

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        found: dict[CacheHitSource, int] = {}
        for tier, tokens in self._scheduling.sources(request.request_id, num_external_tokens).items():
            source = SOURCES.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
            found[source] = found.get(source, 0) + tokens
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        ids = blocks.get_block_ids()[0] if num_external_tokens else ()
        self._scheduling.allocated(request.request_id, ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return Metadata(self._scheduling.plan(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        self._scheduling.loaded(connector_output.finished_recving or (), connector_output.invalid_block_ids)
        stored, events = connector_output.kv_connector_worker_meta, self._scheduling.events
        if stored is not None and events is not None:
            events.stored(stored.by_worker)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduling.finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduling.finished(request)

    def reset_cache(self) -> bool:
        return self._scheduling.reset()

    # -- of a worker -------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._worker.register(kv_caches, self._vllm_config.compilation_config.static_forward_context)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._worker.start(self._get_connector_metadata().plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are between steps."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole, at the end of a step."""

    def wait_for_save(self) -> None:
        self._worker.save(self._get_connector_metadata().plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._report = self._worker.report()
        return None, self._report.loaded

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._report.failed_blocks

    def build_connector_worker_meta(self) -> Stored | None:
        stored = self._report.stored if _wants_events(self._vllm_config) else None
        return Stored(stored) if stored else None

    # -- of both -----------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> Figures | None:
        if self._role == KVConnectorRole.SCHEDULER:
            taken = self._scheduling.figures.take()
            return None if taken is None else Figures(data=taken)
        return _figures_of(self._report)

    def take_events(self) -> Iterable[Any]:
        events = self._scheduling.events
        return [] if events is None else [_in_vllms_words(event) for event in events.take()]

    def shutdown(self) -> None:
        if self._role == KVConnectorRole.SCHEDULER:
            self._scheduling.close()
            self._side.close()
        else:
            self._worker.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Figures:
        return Figures(data=data) if data is not None else Figures()

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> Metrics:
        return Metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _is_cache_free(self) -> bool:
        """Nothing of before can be met again in vLLM's own cache."""
        if not self._vllm_config.cache_config.enable_prefix_caching:
            return True
        pool = self._pool
        if pool is None or pool.num_gpu_blocks - pool.get_num_free_blocks() != 1:  # one is a placeholder
            return False
        return all(block.block_hash is None for block in pool.blocks)


def _wants_events(vllm_config: Any) -> bool:
    wanted = vllm_config.kv_events_config
    return wanted is not None and bool(wanted.enable_kv_cache_events)


def _hash_tokens(vllm_config: Any, kv_cache_config: Any, block_tokens: int) -> int | None:
    if not _wants_events(vllm_config):
        return None
    return kv_cache_config.hash_block_size or block_tokens


def _in_vllms_words(event: StoredEvent) -> Any:
    from vllm.distributed.kv_events import BlockStored
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    parent = event.parent_block_hash
    return BlockStored(
        block_hashes=[maybe_convert_block_hash(each) for each in event.block_hashes],
        parent_block_hash=maybe_convert_block_hash(parent) if parent is not None else None,
        token_ids=event.token_ids,
        block_size=event.block_size,
        lora_id=event.lora_id,
        medium=event.medium,
        lora_name=event.lora_name,
        extra_keys=event.extra_keys,
        group_idx=0,
    )


def _rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def _figures_of(report: StepReport) -> Figures | None:
    if not report.counters and not report.seconds:
        return None
    seconds = {what: [len(each), sum(each), max(each)] for what, each in report.seconds.items() if each}
    return Figures(data={"counters": dict(report.counters), "seconds": seconds})
