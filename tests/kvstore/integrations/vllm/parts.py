"""Engines in miniature for the tests, as the settings have them."""

from __future__ import annotations

from typing import Any

from kvstore.clock import ManualClock
from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.integrations.vllm.setup import Setup
from kvstore.nouns import KVLayout, NamespaceSpec
from tests.kvstore.integrations.vllm.engine import FakeEngine
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore

W1, W2, W3 = b"1" * 16, b"2" * 16, b"3" * 16
PROMPT = list(range(100, 137))  # 9 blocks of 4, and a token


def setup_of(
    ranks: int = 1, vllm_block: int = 4, loads: bool = True, saves: bool = True, **config: Any
) -> Setup:
    defaults = {"block_tokens": 4, "min_load_tokens": 1, "lookup_timeout_s": 20.0}  # on a busy machine
    settings = ConnectorConfig(**(defaults | config))
    specs = tuple(
        NamespaceSpec("m", KVLayout(1, rank, rank + 1, 1, "float32", 4), bytes(16)) for rank in range(ranks)
    )
    return Setup(settings, specs, 0, vllm_block, loads, saves)


def engine_of(
    store: LocalStore,
    weights: bytes = W1,
    *,
    setup: Setup | None = None,
    clock: ManualClock | None = None,
    **how: Any,
) -> FakeEngine:
    setup = setup or setup_of()
    return FakeEngine(setup, store.side(setup.config, clock or ManualClock()), weights, **how)


def serve(engine: FakeEngine, tokens: list[int], name: str = "r", **fields: Any) -> FakeRequest:
    """One request to its end."""
    request = FakeRequest(name, list(tokens), **fields)
    engine.add(request)
    engine.run()
    return request


def counted(engine: FakeEngine) -> dict[str, int]:
    """What the scheduler's half counted since it was last asked."""
    taken = engine.scheduling.figures.take()
    return {} if taken is None else dict(taken["counters"])
