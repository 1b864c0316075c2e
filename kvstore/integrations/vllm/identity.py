"""Which weights the engine computes with, as the store knows them: the epoch that all its KV is of.

    "weights"   digest of the model's files; the number that the store has for it, or the next
    "store"     the model's current epoch, as whoever changes the weights has set it

Found out in the background when the store can first be asked; until then nothing is loaded or saved. A reset
forgets it: "store" asks again, and with "weights" nobody can say what the engine computes with from then on,
so it goes on under a random digest, shared with nobody.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from kvstore.client import StoreClient
from kvstore.errors import ConfigError, EpochConflict, Incomplete, KVStrataError
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.store_side import RETRY_S, StoreSide
from kvstore.nouns import WEIGHTS_DIGEST_NBYTES, Epoch, EpochsOfModel, ShardId, WeightsDigest

__all__ = ["Identity"]

ATTEMPTS_MAX: Final = 4  # numbers that somebody else bound first, in a row

log = structlog.get_logger(__name__)


class Identity:
    """`epoch` may be read from any thread: None while it is not known. `generation` counts the resets."""

    def __init__(self, side: StoreSide, setup: Setup, weights: Callable[[], WeightsDigest]) -> None:
        self.generation = 0
        self._found: tuple[int, Epoch] | None = None  # with its generation: one value, set at once
        self._side = side
        self._setup = setup
        self._weights = weights
        self._digest: tuple[int, WeightsDigest] | None = None
        self._asking = asyncio.Lock()
        self._not_before = side.clock.now()
        self._is_hopeless = False

    @property
    def epoch(self) -> Epoch | None:
        found = self._found
        return found[1] if found is not None and found[0] == self.generation else None

    def begin(self) -> None:
        """Find out, in the background."""
        self._side.begin(self.known())

    def reset(self) -> None:
        """The weights may be others from here on. From vLLM's thread."""
        self.generation += 1
        if self._setup.config.epoch == "weights":
            log.warning(
                "caches were reset: KV of this engine is shared with nobody from here on, since nobody can "
                'say which weights it has. Set epoch to "store" to say so by `kvstrata epoch advance`',
                model=self._setup.model_id,
            )
        self._side.begin(self._anew())

    # -- on the loop -------------------------------------------------------------------------------

    async def known(self) -> Epoch | None:
        """None: the store cannot say now; it is asked again, RETRY_S later at the soonest."""
        if self.epoch is not None:
            return self.epoch
        async with self._asking:
            if self.epoch is None and not self._is_hopeless and self._side.clock.now() >= self._not_before:
                await self._ask()
            return self.epoch

    async def _anew(self) -> None:
        self._not_before = self._side.clock.now()
        await self.known()

    async def _ask(self) -> None:
        generation = self.generation
        try:
            epoch = await self._find(generation)
        except ConfigError as error:
            self._is_hopeless = True
            log.error("no KV is shared: the weights have no name", error=str(error))
            return
        except (KVStrataError, OSError) as error:
            log.warning("the store does not say which epoch this is", error=str(error))
            epoch = None
        if epoch is None:
            self._not_before = self._side.clock.now() + RETRY_S
        else:
            self._found = (generation, epoch)
            log.info("KV is of this epoch", number=epoch.number, weights=epoch.weights_digest.hex())

    async def _digest_in(self, generation: int) -> WeightsDigest:
        if self._digest is None or self._digest[0] != generation:
            if generation:
                digest = WeightsDigest(secrets.token_bytes(WEIGHTS_DIGEST_NBYTES))
            else:
                digest = await asyncio.to_thread(self._weights)
            self._digest = (generation, digest)
        return self._digest[1]

    async def _find(self, generation: int) -> Epoch | None:
        config = self._setup.config
        # At start, whether there is a store or not: the longer it waits, the more may have changed the files.
        digest = None if config.epoch == "store" else await self._digest_in(generation)
        client = await self._side.client()
        if client is None:
            return None
        if digest is None:
            return self._current(
                await client.epochs(self._setup.model_id, timeout_s=config.connect_timeout_s)
            )
        for _ in range(ATTEMPTS_MAX):
            epoch = _bound_or_next(await self._registered(client), digest)
            try:
                await client.register_epoch(self._setup.model_id, epoch, timeout_s=config.connect_timeout_s)
            except EpochConflict:
                continue  # somebody took the number meanwhile
            except Incomplete as error:
                if any(isinstance(failed, EpochConflict) for failed in error.failed.values()):
                    continue
                if not error.done:
                    raise
            return epoch
        return None

    async def _registered(self, client: StoreClient) -> Mapping[ShardId, EpochsOfModel]:
        """Of whichever shards answer: the others refuse a number that is bound there. Raises if none does."""
        try:
            return await client.epochs(self._setup.model_id, timeout_s=self._setup.config.connect_timeout_s)
        except Incomplete as error:
            known = {shard: of for shard, of in error.done.items() if isinstance(of, EpochsOfModel)}
            if not known:
                raise
            return known

    def _current(self, known: Mapping[ShardId, EpochsOfModel]) -> Epoch | None:
        """Of all shards: one that does not answer may be the one that was told of newer weights."""
        current = max(of.current for of in known.values())
        for of in known.values():
            for epoch in of.registered:
                if epoch.number == current:
                    return epoch
        log.warning(
            "the store knows no epoch of this model: nothing is shared until `kvstrata epoch` registers one",
            model=self._setup.model_id,
        )
        return None


def _bound_or_next(known: Mapping[ShardId, EpochsOfModel], digest: WeightsDigest) -> Epoch:
    """The newest number bound to these weights on any shard; else the first that is bound to none."""
    registered = {epoch for of in known.values() for epoch in of.registered}
    mine = [epoch for epoch in registered if epoch.weights_digest == digest]
    if mine:
        return max(mine)
    return Epoch(max((epoch.number for epoch in registered), default=-1) + 1, digest)
