"""Counters of all workers and shards, joined into totals that only grow.

A worker that comes back counts from zero; what its former self had counted is kept here, so that no scrape
sees a counter go back. Shards' gauges are shown as they were last seen.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.transport.base import ShardStatus

__all__ = ["FleetTotals"]

_LABELLED: Final = {"miss": "misses", "rejected": "rejected_blocks", "refused": "refused_blocks"}
"""What stands before the colon of a store client's counter -> the metric; after it is the reason."""
_ALWAYS: Final = ("verified_blocks", "read_bytes", "written_bytes")
_GAUGE: Final = "gauge:"
"""What stands before a worker's number that is as it stands now, not a count."""
_PREFETCH_OUTCOMES: Final = ("blocks", "in_time", "late", "wasted")
_SHARD_GAUGES: Final = {
    "capacity_nbytes": "store_capacity_bytes",
    "live_nbytes": "store_live_bytes",
    "staged_nbytes": "store_staged_bytes",
    "retired_nbytes": "store_retired_bytes",
    "versions": "store_versions",
    "leases": "store_leases",
    "oldest_pin_s": "store_oldest_pin_seconds",
    "nvme_nbytes": "store_nvme_bytes",
    "nvme_capacity_nbytes": "store_nvme_capacity_bytes",
}


class FleetTotals(Collector):
    def __init__(self) -> None:
        self.workers: defaultdict[str, float] = defaultdict(float)
        self.shards: dict[str, ShardStatus] = {}
        self.gauges: dict[str, dict[str, float]] = {}  # by worker
        self.dropped_events: Counter[str] = Counter()
        self._last: dict[str, dict[str, float]] = {}

    def fold(self, worker_id: str, counters: Mapping[str, float]) -> None:
        """Add what a worker counted since it was last asked."""
        last = self._last.setdefault(worker_id, {})
        gauges = self.gauges.setdefault(worker_id, {})
        for name, value in counters.items():
            if name.startswith(_GAUGE):
                gauges[name.removeprefix(_GAUGE)] = value
            else:
                # Answers may overtake each other: an older one adds nothing and takes nothing back.
                known = last.get(name, 0.0)
                self.workers[name] += max(0.0, value - known)
                last[name] = max(value, known)

    def forget(self, worker_id: str) -> None:
        """The worker is no more; what it counted stays."""
        self._last.pop(worker_id, None)
        self.gauges.pop(worker_id, None)

    def saw_shard(self, status: ShardStatus) -> None:
        self.shards[status.shard] = status

    @property
    def ownerless_nbytes(self) -> int:
        return sum(shard.ownerless_nbytes for shard in self.shards.values())

    def collect(self) -> Iterator[Metric]:
        yield from self._of_workers()
        yield from self._of_shards()
        dropped = CounterMetricFamily("kvstrata_dropped_events", "Token events not taken", labels=["reason"])
        for reason, count in self.dropped_events.items():
            dropped.add_metric([reason], count)
        yield dropped

    def _of_workers(self) -> Iterator[Metric]:
        labelled = {
            kind: CounterMetricFamily(f"kvstrata_{name}", f"Blocks: {kind}, by reason", labels=["reason"])
            for kind, name in _LABELLED.items()
        }
        plain = dict.fromkeys(_ALWAYS, 0.0)
        for name, value in self.workers.items():
            kind, colon, reason = name.partition(":")
            if colon and kind in labelled:
                labelled[kind].add_metric([reason], value)
            else:
                plain[name.replace(":", "_")] = value
        yield from labelled.values()
        for name, value in plain.items():
            yield CounterMetricFamily(f"kvstrata_{name}", "Summed over all workers", value=value)
        for name in sorted({name for gauges in self.gauges.values() for name in gauges}):
            gauge = GaugeMetricFamily(f"kvstrata_worker_{name}", f"{name} of a worker", labels=["worker"])
            for worker_id, gauges in self.gauges.items():
                gauge.add_metric([worker_id], gauges.get(name, 0.0))
            yield gauge

    def _prefetched(self) -> Metric:
        """What shards brought up before it was asked for, and what came of it (kvstore/core/foreseen.py)."""
        about = "Blocks a shard brought up unasked (outcome `blocks`: all of them), by what came of it"
        blocks = GaugeMetricFamily("kvstrata_prefetch_blocks", about, labels=["shard", "why", "outcome"])
        for shard in self.shards.values():
            for event, count in shard.counters.items():
                kind, _, rest = event.partition(":")
                why, _, outcome = rest.partition("_")
                if kind == "prefetch" and outcome in _PREFETCH_OUTCOMES:
                    blocks.add_metric([shard.shard, why, outcome], count)
        return blocks

    def _of_shards(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "kvstrata_ownerless_bytes",
            "Bytes no owner claims: anything but 0 is a bug",
            self.ownerless_nbytes,
        )
        for attribute, name in _SHARD_GAUGES.items():
            gauge = GaugeMetricFamily(f"kvstrata_{name}", f"{attribute} of a shard", labels=["shard"])
            for shard in self.shards.values():
                gauge.add_metric([shard.shard], getattr(shard, attribute))
            yield gauge
        yield self._prefetched()
        events = GaugeMetricFamily(
            "kvstrata_shard_events", "Counters of a shard's present incarnation", labels=["shard", "event"]
        )
        for shard in self.shards.values():
            for event, count in shard.counters.items():
                events.add_metric([shard.shard, event], count)
        yield events
