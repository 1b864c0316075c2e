"""What the two halves exchange by way of vLLM, in classes of vLLM's own: plans, reports, figures, metrics."""

from __future__ import annotations

from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvstore.integrations.vllm.figures import empty, is_empty, merged, reduced
from kvstore.integrations.vllm.plans import StepPlan

__all__ = ["Figures", "Metadata", "Metrics", "Stored"]

COUNTED: Final = "vllm:kvstrata_events"
TIMED: Final = "vllm:kvstrata_timed"
SECONDS: Final = "vllm:kvstrata_seconds"


class Metadata(KVConnectorMetadata):  # type: ignore[misc]
    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan


class Stored(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Which tokens of which requests are in the store now, of each worker that said so."""

    def __init__(self, stored: list[tuple[str, int, int]]) -> None:
        self.by_worker = [stored]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        self.by_worker += other.by_worker
        return self


class Figures(KVConnectorStats):  # type: ignore[misc]
    """`data` is of figures.py."""

    def reset(self) -> None:
        self.data = empty()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        return Figures(data=merged(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        return reduced(self.data)

    def is_empty(self) -> bool:
        return is_empty(self.data)


class Metrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """What was counted, by `event`; how often things were timed and how long they took, by `what`."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], labels: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, labels)
        self._events = self._counter_cls(
            name=COUNTED,
            documentation="What the kvstrata connector counted: hits, tokens, misses by reason, drops.",
            labelnames=[*labelnames, "event"],
        )
        self._timed = self._counter_cls(
            name=TIMED,
            documentation="How many look-ups, loads, copies and publications vllm:kvstrata_seconds is of.",
            labelnames=[*labelnames, "what"],
        )
        self._seconds = self._counter_cls(
            name=SECONDS,
            documentation="Seconds that look-ups, loads, copies and publications took, summed.",
            labelnames=[*labelnames, "what"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for event, count in transfer_stats_data.get("counters", {}).items():
            self._events.labels(*labels, event).inc(count)
        for what, (count, total, _) in transfer_stats_data.get("seconds", {}).items():
            self._seconds.labels(*labels, what).inc(total)
            self._timed.labels(*labels, what).inc(count)
