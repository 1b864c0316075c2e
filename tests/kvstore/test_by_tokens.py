"""KV as arrays by token ids: what comes back is what was put, bit for bit; what does not fit is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import torch

from kvstore.client import StoreClient
from kvstore.core.retention import Retention
from kvstore.errors import ConfigError
from kvstore.nouns import DTYPE_NBYTES, KVLayout, MissReason, NamespaceSpec, Refusal, allow_stale
from kvstore.retention import RetentionRange
from kvstore.session import StoreSession
from kvstore.tensors import bits_of
from tests.kvstore.oracle import epoch

E1, E2 = epoch(1), epoch(2)
TOKENS = list(range(41))  # 10 blocks of 4, and one token more
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def layout(dtype: str = "float32") -> KVLayout:
    return KVLayout(layers=2, head_begin=1, head_end=3, head_dim=4, dtype=dtype, block_tokens=4)


def random(tokens: int, seed: int = 1) -> np.ndarray[Any, np.dtype[Any]]:
    return np.random.default_rng(seed).standard_normal((2, 2, tokens, 2, 4), dtype=np.float32)


@pytest.fixture
async def client() -> AsyncIterator[StoreClient]:
    async with StoreClient.in_process(1 << 20, shards=3) as opened:
        yield opened
        for status in await opened.status():
            assert (status.leases, status.staged_nbytes, status.ownerless_nbytes) == (0, 0, 0)


@pytest.fixture
async def session(client: StoreClient) -> StoreSession:
    return await client.open(NamespaceSpec("m", layout(), bytes(16)), E1)


@pytest.mark.parametrize("dtype", sorted(DTYPE_NBYTES))
@pytest.mark.parametrize("strided", [False, True])
async def test_a_tensor_comes_back_bit_for_bit(client: StoreClient, dtype: str, strided: bool) -> None:
    session = await client.open(NamespaceSpec("m", layout(dtype), bytes(16)), E1)
    kv = torch.from_numpy(random(82 if strided else 41)).to(TORCH[dtype])
    kv = kv[:, :, ::2] if strided else kv
    assert await session.put(TOKENS, kv) == (40, {})
    hit = await session.get(TOKENS, framework="torch")
    assert isinstance(hit.kv, torch.Tensor)
    assert hit.kv.dtype is TORCH[dtype]
    assert torch.equal(hit.kv.view(torch.uint8), kv[:, :, :40].contiguous().view(torch.uint8))
    as_numpy = await session.get(torch.tensor(TOKENS).numpy())
    assert np.array_equal(as_numpy.kv, bits_of(kv, session.layout, 41)[:, :, :40])


async def test_a_longer_prompt_hits_its_prefix_and_counts_the_rest(session: StoreSession) -> None:
    await session.put(TOKENS, random(41))
    hit = await session.get([*TOKENS[:24], *[99] * 20])
    assert hit.n_tokens == 24
    assert hit.misses == {MissReason.ABSENT: 5}
    assert np.array_equal(hit.kv, random(41)[:, :, :24])
    assert (await session.get([])).n_tokens == 0
    assert (await session.get([5])).misses == {}


async def test_what_follows_is_put_and_got_from_where_it_starts(session: StoreSession) -> None:
    kv = random(48)
    await session.put(TOKENS[:16], kv[:, :, :16])
    assert (await session.put(list(range(48)), kv[:, :, 16:], start=16)).n_tokens == 48
    hit = await session.get(list(range(48)), start=16)
    assert hit.n_tokens == 48
    assert np.array_equal(hit.kv, kv[:, :, 16:])
    beyond = await session.get([7] * 8, start=4)
    assert (beyond.n_tokens, beyond.kv.shape[2]) == (0, 0)


@pytest.mark.parametrize(
    ("kv", "says"),
    [
        (random(40), "41 tokens need"),
        (random(41).astype(np.float64), "layout says float32"),
        (torch.zeros(2, 2, 41, 2, 4, dtype=torch.bfloat16), "kv is bfloat16"),
        (random(41).astype(np.float32).view(np.uint32), "kv is uint32"),
    ],
)
async def test_an_array_that_does_not_fit_is_refused_with_what_would(
    session: StoreSession, kv: Any, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        await session.put(TOKENS, kv)


@pytest.mark.parametrize("ids", [[-1], [1 << 32], [[1, 2]], [1.5], ["a"]])
async def test_what_is_no_token_id_is_no_other_blocks_key(session: StoreSession, ids: Any) -> None:
    with pytest.raises(ValueError, match="token_ids"):
        await session.get(ids)


async def test_a_start_inside_a_block_is_refused(session: StoreSession) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        await session.put(TOKENS, random(38), start=3)


async def test_what_was_computed_over_stale_kv_is_not_published(
    client: StoreClient, session: StoreSession
) -> None:
    await session.put(TOKENS[:8], random(8))
    newer = await client.open(NamespaceSpec("m", layout(), bytes(16)), E2, stale_lag_max=1)
    await client.advance_epoch("m", 2, allow_stale(1))
    hit = await newer.get(TOKENS[:8])
    assert (hit.n_tokens, hit.lineage.foreign) == (8, True)
    put = await newer.put(TOKENS, random(33), start=8, over=hit.lineage)
    assert put == (8, {Refusal.EPOCH: 8})
    async with newer.transaction() as txn:
        await txn.put(TOKENS, random(33), start=8, over=hit.lineage)
    assert txn.committed == ((8, {Refusal.EPOCH: 8}),)
    assert (await newer.get(TOKENS)).n_tokens == 8


async def test_nobody_sees_a_transaction_before_commit(client: StoreClient, session: StoreSession) -> None:
    async with session.transaction() as txn:
        await txn.put(TOKENS, random(41))
        await txn.put([9] * 8, random(8))
        assert (await session.get(TOKENS)).n_tokens == 0
        assert sum(status.staged_nbytes for status in await client.status()) > 0
    assert txn.committed == ((40, {}), (8, {}))
    assert np.array_equal((await session.get(TOKENS)).kv, random(41)[:, :, :40])
    with pytest.raises(ConfigError, match="over"):
        await txn.put(TOKENS, random(41))
    assert await txn.commit() == txn.committed


async def test_leaving_a_transaction_by_an_exception_leaves_nothing(
    client: StoreClient, session: StoreSession
) -> None:
    async def stage_and_fail() -> None:
        async with session.transaction() as txn:
            await txn.put(TOKENS, random(41))
            raise KeyError

    with pytest.raises(KeyError):
        await stage_and_fail()
    assert [status.staged_nbytes for status in await client.status()] == [0, 0, 0]
    assert (await session.get(TOKENS)).n_tokens == 0


async def test_what_another_writes_at_the_time_is_refused_by_name(session: StoreSession) -> None:
    async with session.transaction() as first:
        await first.put(TOKENS, random(41))
        put = await session.put(TOKENS, random(41, seed=2))
        assert put == (0, {Refusal.STAGED: 10})
    assert np.array_equal((await session.get(TOKENS)).kv, random(41)[:, :, :40])
    assert await session.put(TOKENS, random(41, seed=2)) == (40, {}), "it exists: the first commit wins"
    assert np.array_equal((await session.get(TOKENS)).kv, random(41)[:, :, :40])


async def test_what_is_pinned_survives_a_purge_until_it_is_let_go(
    client: StoreClient, session: StoreSession
) -> None:
    await session.put(TOKENS, random(41))
    async with session.pin(TOKENS) as pin:
        assert (pin.n_tokens, pin.miss) == (40, None)
        await client.purge(session.namespace)
        assert (await session.get(TOKENS)).n_tokens == 0
        assert np.array_equal((await pin.get(start=8)).kv, random(41)[:, :, 8:40])
        assert await pin.renew(10.0)
    async with session.pin(TOKENS) as pin:
        assert (pin.n_tokens, pin.miss) == (0, MissReason.ABSENT)


async def filled(
    client: StoreClient, retention: list[RetentionRange]
) -> tuple[StoreSession, dict[int, Retention | None]]:
    session = await client.open(NamespaceSpec("m", layout(), bytes(16)), E1)
    assert await session.put(TOKENS, random(41), retention=retention) == (40, {})
    return session, said(client)


def said(client: StoreClient) -> dict[int, Retention | None]:
    """What the shards hold of each block, by its place in the chain."""
    cores = [transport.core for transport in client._peers.transports.values()]  # type: ignore[attr-defined]
    return {
        row.chain_index: core.index.retentions.of(row.ref.slot) for core in cores for row in core.index.rows()
    }


async def test_ranges_of_tokens_say_what_their_blocks_are_worth(client: StoreClient) -> None:
    """A block takes the highest priority that touches it, of equal ones the longest time."""
    ranges = [
        RetentionRange(0, 9, 80),
        RetentionRange(8, 12, 90, 5.0),
        RetentionRange(8, 10, 90, 7.0),
        RetentionRange(30, None, 10, 60.0),
        RetentionRange(36, 37, 10),
    ]
    _, worth = await filled(client, ranges)
    cheap = Retention(10, 60.0)
    assert worth == {
        0: Retention(80), 1: Retention(80), 2: Retention(90, 7.0), 3: None, 4: None, 5: None, 6: None,
        7: cheap, 8: cheap, 9: Retention(10),
    }  # fmt: skip


async def test_ranges_count_from_the_sequences_first_token_wherever_a_put_starts(client: StoreClient) -> None:
    session, _ = await filled(client, [])
    await session.put(
        [*TOKENS[:36], *range(90, 95)], random(5), start=36, retention=[RetentionRange(38, 39, 70)]
    )
    assert sorted(r.priority for r in said(client).values() if r) == [70]


async def test_a_transaction_says_it_and_a_second_put_says_it_anew(client: StoreClient) -> None:
    session = await client.open(NamespaceSpec("m", layout(), bytes(16)), E1)
    async with session.transaction() as txn:
        await txn.put(TOKENS, random(41), retention=[RetentionRange(0, None, 80)])
    assert set(said(client).values()) == {Retention(80)}
    await session.put(TOKENS, random(41))
    assert set(said(client).values()) == {Retention(80)}
    await session.put(TOKENS, random(41), retention=[RetentionRange(0, None, 35)])
    assert set(said(client).values()) == {None}


@pytest.mark.parametrize("wrong", [(-1, 4), (4, 4), (8, 4), (0, 4, 101), (0, 4, 50, 0.0)])
def test_a_range_that_cannot_be_is_refused_by_name(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        RetentionRange(*wrong)


async def test_too_many_ranges_are_refused_before_anything_is_sent(client: StoreClient) -> None:
    with pytest.raises(ConfigError, match="64 at most"):
        await filled(client, [RetentionRange(0, 4)] * 65)
