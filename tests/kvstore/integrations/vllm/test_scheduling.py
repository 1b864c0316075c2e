"""The scheduler's half over vLLM in miniature and a store in this process: what is found, loaded, saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvstore.clock import ManualClock
from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.integrations.vllm.setup import Setup
from kvstore.nouns import KVLayout, NamespaceSpec
from tests.kvstore.integrations.vllm.engine import FakeEngine
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore, local_store

W1, W2 = b"1" * 16, b"2" * 16
PROMPT = list(range(100, 137))  # 9 blocks of 4, and a token


@pytest.fixture
def store() -> Iterator[LocalStore]:
    with local_store() as opened:
        yield opened


def engine_of(
    store: LocalStore,
    weights: bytes = W1,
    *,
    ranks: int = 1,
    vllm_block: int = 4,
    loads: bool = True,
    saves: bool = True,
    clock: ManualClock | None = None,
    config: dict[str, Any] | None = None,
    **how: Any,
) -> FakeEngine:
    settings = ConnectorConfig(**({"block_tokens": 4, "min_load_tokens": 1} | (config or {})))
    specs = tuple(
        NamespaceSpec("m", KVLayout(1, rank, rank + 1, 1, "float32", 4), bytes(16)) for rank in range(ranks)
    )
    setup = Setup(settings, specs, 0, vllm_block, loads, saves)
    return FakeEngine(setup, store.side(settings, clock or ManualClock()), weights, **how)


def serve(engine: FakeEngine, tokens: list[int], name: str = "r", **fields: Any) -> FakeRequest:
    request = FakeRequest(name, list(tokens), **fields)
    engine.add(request)
    engine.run()
    return request


@pytest.mark.parametrize("vllm_block", [2, 4, 8, 16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_engine_loads_what_the_first_saved(store: LocalStore, vllm_block: int, ranks: int) -> None:
    one = engine_of(store, vllm_block=vllm_block, ranks=ranks)
    first = serve(one, PROMPT)
    two = engine_of(store, vllm_block=vllm_block, ranks=ranks)
    second = serve(two, PROMPT)
    assert second.all_token_ids == first.all_token_ids
    assert second.loaded == 36 // vllm_block * vllm_block
    assert two.workers.saves == [] or two.workers.saves[0].wanted == 36, "what was found is not saved again"
    one.close()
    two.close()
