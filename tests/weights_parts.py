"""What tests of changing weights judge by: a fresh engine for each epoch, and every block that is stored."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from decode.role import DecodeRole
from engine.config import EngineConfig
from engine.engine import Engine
from engine.monolithic import generate
from engine.types import FinishReason, GenerationRequest, TokenEvent, UpdateMode
from kvstore.core.versions import State
from kvstore.driver import ShardDriver
from kvstore.errors import EpochConflict
from kvstore.frame import decode_frame
from kvstore.hashing import KeyChain
from kvstore.nouns import BlockKey, NamespaceId
from prefill.role import PrefillRole
from tests.role_parts import BLOCK_TOKENS, CACHING, ENGINE, WAIT_S, Pair, later, pair_over, request, shard

Tokens = tuple[int, ...]


class Oracle:
    """Fresh engines by epoch number: epoch n has the weights of folder n % len(folders)."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders
        self._engines = [Engine.load(folder, ENGINE) for folder in folders]
        self._blocks: dict[tuple[int, Tokens], list[bytes]] = {}

    def path(self, epoch: int) -> str:
        return str(self.folders[epoch % len(self.folders)])

    def engine(self, epoch: int) -> Engine:
        return self._engines[epoch % len(self.folders)]

    def tokens(self, epoch: int, asked: GenerationRequest, before: Sequence[int], n: int) -> Tokens:
        """The `n` tokens that a fresh engine of this epoch says after `before`."""
        sampling = replace(asked.sampling, max_tokens=len(before) + n)
        alone = replace(asked, request_id="r", attempt=1, sampling=sampling, output_ids=tuple(before))
        return generate(self.engine(epoch), alone)[len(before) :]

    def blocks(self, epoch: int, tokens: Tokens) -> list[bytes]:
        """The KV of each full block of a text, as a fresh engine of this epoch computes it."""
        known = epoch % len(self.folders), tokens
        if known not in self._blocks:
            engine, payloads = self.engine(epoch), []
            engine.admit(request(tokens, max_tokens=1))
            while engine.has_work():
                payloads += [block.payload.tobytes() for block in engine.step().blocks]
            self._blocks[known] = payloads
        return self._blocks[known]


def assert_drawn_by_fresh_engines(
    oracle: Oracle, asked: GenerationRequest, said: Sequence[TokenEvent]
) -> None:
    """Each run of tokens that name one epoch is what a fresh engine of it says after all tokens before."""
    output: list[int] = list(asked.output_ids)
    for epochs, group in groupby((event for event in said if event.token_id >= 0), key=lambda e: e.epochs):
        run = [event.token_id for event in group]
        assert len(epochs) == 1, "these tokens were drawn over KV of several epochs"
        assert oracle.tokens(epochs[0], asked, output, len(run)) == tuple(run), f"under epoch {epochs}"
        output += run


async def inspect(oracle: Oracle, drivers: Iterable[ShardDriver], texts: Iterable[Tokens]) -> Counter[int]:
    """Every block that is stored anywhere is, byte for byte, what a fresh engine of the epoch that names it
    computes for one of these texts. How many there are of each epoch."""
    known: dict[BlockKey, tuple[Tokens, int]] = {}
    seen: Counter[int] = Counter()
    spaces: set[NamespaceId] = set()
    rows = [(driver, row) for driver in drivers for row in [*driver.core.index.rows()]]
    for _, row in rows:
        if row.namespace not in spaces:
            spaces.add(row.namespace)
            for text in texts:
                chain = KeyChain(row.namespace, BLOCK_TOKENS)
                chain.extend(text)
                known |= {key: (text, index) for index, key in enumerate(chain.keys)}
    for driver, row in rows:
        assert row.state is not State.STAGED
        async for item in driver.read(row.namespace, [row.ref], timeout_s=WAIT_S):
            assert item.frame is not None, item.miss
            frame, payload = decode_frame(item.frame)
            text, index = known[row.key]
            assert frame.meta.epoch == row.epoch
            assert row.epoch.weights_digest == oracle.engine(row.epoch.number).weights_digest
            expected = oracle.blocks(row.epoch.number, text)[index]
            assert bytes(payload) == expected, f"block {index} named epoch {row.epoch.number} is not"
            seen[row.epoch.number] += 1
    return seen


@dataclass
class Load:
    """Requests on their way through a pair, each by one attempt, and what they were told."""

    pair: Pair
    said: dict[str, list[TokenEvent]] = field(default_factory=dict)
    asked: dict[str, GenerationRequest] = field(default_factory=dict)
    refused: dict[str, Exception] = field(default_factory=dict)
    conflicts: int = 0  # handoffs of other weights than decode's
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # another worker has changed its weights
    _spoke: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _ended: dict[str, asyncio.Event] = field(default_factory=dict)

    def begin(self, *requests: GenerationRequest) -> None:
        for one in requests:
            self.asked[one.request_id], self.said[one.request_id] = one, []
            self._ended[one.request_id] = asyncio.Event()
            self._tasks.append(asyncio.create_task(self._drive(one)))

    @property
    def texts(self) -> list[Tokens]:
        """All that was said, prompts included: long enough for every block that may be stored."""
        return [(*asked.prompt_ids, *self.output(name)) for name, asked in self.asked.items()]

    def output(self, name: str) -> Tokens:
        told = tuple(event.token_id for event in self.said[name] if event.token_id >= 0)
        return (*self.asked[name].output_ids, *told)

    async def until_said(self, tokens: int) -> None:
        """So many tokens, of all requests together."""
        async with asyncio.timeout(WAIT_S):
            while sum(map(len, self.said.values())) < tokens:
                self._spoke.clear()
                await self._spoke.wait()

    async def over(self) -> None:
        async with asyncio.timeout(2 * WAIT_S):
            await asyncio.gather(*self._tasks)

    async def poll(self) -> None:
        """Until cancelled."""
        while True:
            polled = await self.pair.decode.poll(self.pair.cursor, 1.0)
            self.pair.cursor = polled.cursor
            for event in polled.events:
                self._take(event)

    def _take(self, event: TokenEvent) -> None:
        self.said[event.request_id].append(event)
        self._spoke.set()
        if event.finish is not None:
            self._ended[event.request_id].set()

    async def _drive(self, asked: GenerationRequest) -> None:
        """By one attempt, and by further ones only where a decode worker has other weights than prefill."""
        try:
            while True:
                first = await self.pair.prefill.prefill(asked)
                self._take(first.event)
                assert first.stats.epochs == first.event.epochs
                handoff = await self.pair.prefill.handoff(asked.request_id, asked.attempt)
                if handoff is None:
                    return
                self.changed.clear()
                try:
                    await self.pair.decode.start(handoff)
                    break
                except EpochConflict:
                    self.conflicts += 1
                    await self.changed.wait()
                    asked = replace(later(asked), output_ids=handoff.request.output_ids)
        except Exception as error:
            self.refused[asked.request_id] = error
            return
        await self._ended[asked.request_id].wait()


def assert_whole(load: Load) -> None:
    """Every request has all of its tokens, in order, and none twice."""
    assert load.refused == {}
    for name, said in load.said.items():
        assert said[-1].finish is FinishReason.LENGTH, (name, said[-1], len(said))
        assert [event.index for event in said] == [*range(load.asked[name].sampling.max_tokens)]
        assert said[-1].finish is FinishReason.LENGTH, said[-1].error


@asynccontextmanager
async def under_load(oracle: Oracle, engine: EngineConfig = CACHING) -> AsyncIterator[Load]:
    """A pair at epoch 1, with its pools' caches on unless told otherwise, polled."""
    shards = [shard("s0"), shard("s1")]
    async with pair_over(Path(oracle.path(1)), shards, engine=engine) as pair:
        load = Load(pair)
        polling = asyncio.create_task(load.poll())
        try:
            yield load
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)


async def prepare_both(load: Load, oracle: Oracle, epoch: int) -> None:
    """So that the update meets what runs when it is told to, however long loading takes."""
    for role in roles_of(load.pair):
        await role.prepare_weights(oracle.path(epoch), epoch)


async def update_both(
    load: Load, oracle: Oracle, epoch: int, mode: UpdateMode, *, prefill_first: bool = True
) -> None:
    """One worker after the other, as it may happen to a fleet."""
    roles = roles_of(load.pair)
    for role in roles if prefill_first else reversed(roles):
        info = await role.update_weights(oracle.path(epoch), epoch, mode, WAIT_S)
        assert (info.epoch_number, info.weights_digest) == (epoch, oracle.engine(epoch).weights_digest)
        load.changed.set()


async def settled(pair: Pair) -> None:
    for worker in pair.workers:
        assert await worker.background.settle(WAIT_S)
        await worker.loop.settled()


def stores_of(pair: Pair) -> list[ShardDriver]:
    """The shards, and the workers' own pools."""
    return [*pair.shards, *(worker.edge.driver for worker in pair.workers if worker.edge is not None)]


def roles_of(pair: Pair) -> list[PrefillRole | DecodeRole]:
    return [pair.prefill, pair.decode]
