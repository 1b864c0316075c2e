"""Booting's promise: a worker that says it is ready has computed before, and nothing shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.boot import boot
from engine.engine import Engine
from engine.types import StepResult
from engine.worker_config import WorkerConfig
from kvstore.topology import Topology
from tests.role_parts import ENGINE

computed: list[int] = []
engines: list[Engine] = []


class WatchedEngine(Engine):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        engines.append(self)

    def step(self) -> StepResult:
        result = super().step()
        computed.append(result.tokens_computed)
        return result


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"step_tokens_max": 512}, [64, 1]),
        ({"step_tokens_max": 48}, [48, 16, 1]),
        ({"max_model_len": 16}, [14, 1]),
        ({"pool_blocks": 2}, [14, 1]),
        ({"max_model_len": 2}, []),
    ],
    ids=["one chunk", "two chunks", "a short context", "a small pool", "no room at all"],
)
async def test_a_worker_has_computed_before_it_is_ready(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], steps: list[int]
) -> None:
    monkeypatch.setitem(boot.__globals__, "Engine", WatchedEngine)
    computed.clear()
    engines.clear()
    config = WorkerConfig(
        worker_id="w",
        model=str(tiny_folder),
        engine=ENGINE.model_copy(update=settings),
        topology=Topology(0, ()),
    )
    worker = await boot(config)
    try:
        (engine,) = engines
        assert computed == steps
        engine.check_integrity()
        assert engine.free_blocks == engine.config.pool_blocks, "it left slots behind"
        assert not any(worker.counters().values()), "it shows in the counters"
    finally:
        await worker.close()
