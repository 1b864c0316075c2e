"""Two-way sharing: what vLLM stores our engine loads, and the other way round, and each says what it says by
itself. Both name the same model, tokenizer and weights, so that their blocks are each other's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.model_cache import ModelCache, cache_root
from engine.monolithic import generate
from engine.registry import DEFAULT_MODEL
from engine.tokenizer import Tokenizer
from kvstore import sync
from kvstore.client import StoreClient
from kvstore.nouns import Epoch
from kvstore.topology import Topology
from tests.role_parts import Pair, pair_over, request
from tests.vllm.engines import REPO, VllmEngine, engine
from tests.vllm.prompts import loadable, prompts
from tests.vllm.stores import Store, store
from tests.vllm.transfer import MODEL_ID, ours

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

LENGTHS = (300, 129, 257, 385)
TOKENS = 12
EPOCH_NUMBER = 1
OURS = EngineConfig(
    threads=2, block_tokens=32, pool_blocks=128, running_max=8, max_model_len=1024, local_cache=False
)


class Sharing(NamedTuple):
    folder: Path
    engine: Engine  # ours, without a store
    vllm: VllmEngine
    store: Store
    asked: list[list[int]]  # the first half for vLLM to write, the second for us


@pytest.fixture(scope="module", params=["tiny", pytest.param(DEFAULT_MODEL, marks=pytest.mark.model)])
def sharing(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sharing]:
    is_tiny = request.param == "tiny"
    folder = tiny if is_tiny else ModelCache(cache_root()).path(DEFAULT_MODEL)
    # Of two seeds: else the halves are the same prompts, and each test finds what the other has stored.
    asked = prompts(LENGTHS, seed=90) + prompts(LENGTHS, seed=91) if is_tiny else texts(folder)
    alone = Engine.load(folder, OURS)
    with store(tmp_path_factory.mktemp("store"), capacity_nbytes=1 << 30) as shared:
        with sync.StoreClient.connect_to([shared.address], token=shared.token) as client:
            client.register_epoch(MODEL_ID, Epoch(EPOCH_NUMBER, alone.weights_digest))
        identity = {
            "weights_digest": alone.weights_digest.hex(),
            "tokenizer_digest": alone.tokenizer.digest.hex(),
        }
        with engine(folder, ours(shared, **identity)) as vllm:
            yield Sharing(folder, alone, vllm, shared, asked)


def texts(folder: Path) -> list[list[int]]:
    """Pieces of a text, so that what comes next is not a toss of a coin."""
    text = (REPO / "cli/demo/document.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_folder(folder).encode(text)
    return [ids[31 * i : 31 * i + length] for i, length in enumerate(LENGTHS * 2)]


@asynccontextmanager
async def our_pair(sharing: Sharing) -> AsyncIterator[Pair]:
    """Our prefill and decode workers over the same store."""

    async def connect(_topology: Topology) -> StoreClient:
        return await StoreClient.connect_to([sharing.store.address], token=sharing.store.token)

    async with pair_over(sharing.folder, [], connect=connect, engine=OURS, epoch_number=EPOCH_NUMBER) as pair:
        yield pair


def cold(alone: Engine, asked: Sequence[int]) -> tuple[int, ...]:
    return generate(alone, request(asked, max_tokens=TOKENS))


async def test_what_vllm_stored_is_read_by_our_engine(sharing: Sharing) -> None:
    asked = sharing.asked[: len(LENGTHS)]
    before = sharing.store.status()["versions"]
    sharing.vllm.generate(asked, tokens=TOKENS)
    sharing.store.until_versions(before + sum((len(one) + TOKENS - 1) // 32 for one in asked))
    async with our_pair(sharing) as pair:
        for i, one in enumerate(asked):
            first, tokens = await pair.generate(request(one, name=f"from-vllm-{i}", max_tokens=TOKENS))
            assert first.stats.cached_tokens == (len(one) - 1) // 32 * 32
            assert tokens == cold(sharing.engine, one), f"{len(one)} tokens"
    sharing.store.until_idle()


async def test_what_our_engine_stored_is_read_by_vllm(sharing: Sharing) -> None:
    asked = sharing.asked[len(LENGTHS) :]
    sharing.vllm.forget()
    theirs = [[*one] for one in asked]
    async with our_pair(sharing) as pair:
        for i, one in enumerate(theirs):
            await pair.generate(request(one, name=f"for-vllm-{i}", max_tokens=TOKENS))
    hits = sharing.vllm.generate(theirs, tokens=TOKENS)
    assert [hit.cached for hit in hits] == [loadable(len(one), sharing.vllm.block_size) for one in theirs]
    with engine(sharing.folder, enable_prefix_caching=False) as alone:
        expected = alone.generate(theirs, tokens=TOKENS)
    assert [hit.tokens for hit in hits] == [answer.tokens for answer in expected]
    sharing.store.until_idle()
