"""What shards say they brought up unasked is told by why and by what came of it."""

from __future__ import annotations

from dataclasses import replace

from kvstore.nouns import Incarnation, ShardId
from kvstore.transport.base import ShardStatus
from router.metrics import RouterMetrics

STATUS = ShardStatus(ShardId("s0"), Incarnation(1), 1, 0, 0, 0, 0, 0, 0, 0, 0.0)


def test_prefetched_blocks_are_told_by_why_and_outcome() -> None:
    metrics = RouterMetrics()
    counters = {
        "prefetch:announced_blocks": 7,
        "prefetch:announced_in_time": 5,
        "prefetch:predicted_wasted": 2,
        "prefetch:predicted_wasted_nbytes": 200,
        "miss:absent": 1,
    }
    metrics.totals.saw_shard(replace(STATUS, counters=counters))
    text = metrics.exposition().decode()
    told = sorted(line for line in text.splitlines() if line.startswith("kvstrata_prefetch_blocks{"))
    assert told == [
        'kvstrata_prefetch_blocks{outcome="blocks",shard="s0",why="announced"} 7.0',
        'kvstrata_prefetch_blocks{outcome="in_time",shard="s0",why="announced"} 5.0',
        'kvstrata_prefetch_blocks{outcome="wasted",shard="s0",why="predicted"} 2.0',
    ]


def test_what_workers_announced_is_summed() -> None:
    metrics = RouterMetrics()
    for worker in ("p0", "p1"):
        metrics.totals.fold(worker, {"prefetch:announced_blocks": 3.0, "gate:blocks": 1.0})
    text = metrics.exposition().decode()
    assert "kvstrata_prefetch_announced_blocks_total 6.0" in text
    assert "kvstrata_gate_blocks_total 2.0" in text
