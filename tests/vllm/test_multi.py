"""Ours beside vLLM's own example connector, as children of MultiConnector: either may be who hits. Once the
other has loaded, nothing is saved until a reset finds vLLM's cache empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vllm.engines import VllmEngine, engine
from tests.vllm.prompts import loadable, prompts
from tests.vllm.stores import store
from tests.vllm.transfer import ours

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

LENGTHS = (300, 129, 385)


@pytest.mark.parametrize("ours_first", [True, False])
def test_with_the_example_connector(plain: VllmEngine, tiny: Path, tmp_path: Path, ours_first: bool) -> None:
    asked = prompts(LENGTHS, seed=70)
    expected = [answer.tokens for answer in plain.generate(asked)]
    with store(tmp_path) as shared:
        example = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "example")},
        }
        children = [ours(shared), example]
        if not ours_first:
            children.reverse()
        transfer = {
            "kv_connector": "MultiConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"connectors": children},
        }
        with engine(tiny, transfer, disable_hybrid_kv_cache_manager=True) as one:
            assert [answer.tokens for answer in one.generate(asked)] == expected
            shared.until_versions(sum((length + 7) // 32 for length in LENGTHS))
            one.forget()
            again = one.generate(asked)
            assert [answer.tokens for answer in again] == expected
            assert [answer.cached for answer in again] == [loadable(n, one.block_size) for n in LENGTHS], (
                one.counters()
            )
            shared.until_idle()
            blocks = sum((length + 7) // 32 for length in LENGTHS)
            one.generate(prompts(LENGTHS, seed=71))
            if ours_first:
                shared.until_versions(2 * blocks)
                assert one.counted("other_connector_loads") == 0
                return
            one.idle_steps()
            shared.until_idle()
            assert shared.status()["versions"] == blocks, "nobody vouches for what the other loaded"
            assert one.counted("other_connector_loads") >= 1
            one.reset()
            one.generate(prompts(LENGTHS, seed=72))
            shared.until_versions(2 * blocks)
