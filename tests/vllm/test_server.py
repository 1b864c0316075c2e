"""The whole of it as a user has it: two OpenAI servers of vLLM's, the proxy of examples/, the openai client,
and our figures on vLLM's own /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from openai import OpenAI

from tests.vllm.prompts import prompt
from tests.vllm.servers import proxy, vllm_server
from tests.vllm.stores import Store, store
from tests.vllm.transfer import ours

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

TOKENS = 24


class Service(NamedTuple):
    prefill: str
    decode: str
    proxy: str
    store: Store


@pytest.fixture(scope="module")
def service(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with ExitStack() as stack:
        shared = stack.enter_context(store(tmp_path_factory.mktemp("store")))
        prefill = stack.enter_context(
            vllm_server(tiny, ours(shared, role="kv_producer", handoff_timeout_s=5.0))
        )
        decode = stack.enter_context(
            vllm_server(tiny, ours(shared, role="kv_consumer", handoff_timeout_s=5.0))
        )
        yield Service(prefill, decode, stack.enter_context(proxy(prefill, decode)), shared)


def said(url: str, ids: list[int], *, stream: bool) -> str:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        extra = {"ignore_eos": True}
        if stream:
            pieces = client.completions.create(
                model="tiny", prompt=ids, max_tokens=TOKENS, temperature=0, stream=True, extra_body=extra
            )
            return "".join(piece.choices[0].text for piece in pieces if piece.choices)
        whole = client.completions.create(
            model="tiny", prompt=ids, max_tokens=TOKENS, temperature=0, extra_body=extra
        )
        return whole.choices[0].text


def counted(url: str, event: str) -> float:
    """Of the connector's counters on /metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    mine = [line for line in lines if line.startswith("vllm:kvstrata_events_total{") and f'"{event}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in mine)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_over_two_servers_is_that_of_one(service: Service, stream: bool) -> None:
    ids = prompt(300, seed=80 + stream)
    over_two = said(service.proxy, ids, stream=stream)
    assert over_two
    assert over_two == said(service.prefill, ids, stream=stream)
    service.store.until_idle()


def test_metrics_show_what_was_loaded_and_saved(service: Service) -> None:
    said(service.proxy, prompt(300, seed=82), stream=False)
    assert counted(service.decode, "hit_tokens") >= 256
    assert counted(service.prefill, "saved_tokens") >= 288
    assert counted(service.prefill, "hit_tokens") == 0
