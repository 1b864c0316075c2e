"""The workers of vLLM in miniature: they save and load as plans tell, and judge every block they touch."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvstore.answers import PublishBlock
from kvstore.hashing import placement_keys
from kvstore.integrations.vllm.keys import chain_keys, tokens_of
from kvstore.integrations.vllm.plans import Load, Save, StepPlan
from kvstore.nouns import ROOT_KEY, BlockKey, Quality
from tests.kvstore.integrations.vllm.request import kv_of
from tests.kvstore.integrations.vllm.store import on_loop


class Workers:
    """All ranks, in step. Loads begin behind the forward pass, and end up to two steps later."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.known: set[str] = set()
        self.chains: dict[str, list[list[BlockKey]]] = {}
        self.lengths: dict[str, int] = {}
        self.loading: list[tuple[int, Load]] = []
        self.saves: list[Save] = []
        self.names: dict[bytes, bytes] = {}  # which weights an epoch's digest stands for
        self.broken: set[int] = set()  # tokens where loads break

    def save(self, plan: StepPlan) -> None:
        for request_id in plan.ended:
            self.chains.pop(request_id, None)
            self.lengths.pop(request_id, None)
        self.loading += [(self.engine.random.randint(0, 2), load) for load in plan.loads]
        for save in plan.saves:
            self.saves.append(save)
            for rank in range(self.engine.ranks):
                on_loop(self._publish(rank, save))

    async def _publish(self, rank: int, save: Save) -> None:
        engine, block = self.engine, self.engine.setup.specs[rank].layout.block_tokens
        request = engine.requests[save.request_id]
        session = await engine.side.session(engine.setup.spec_of(rank, save.adapter), save.epoch)
        assert session is not None
        chains = self.chains.setdefault(save.request_id, [[] for _ in range(engine.ranks)])
        keys = chains[rank]
        assert len(keys) * block == save.begin, "a chain goes on where it ended"
        parent = keys[-1] if keys else ROOT_KEY
        keys += chain_keys(session.namespace, tokens_of(save.token_ids), block, save.salt, parent)
        assert len(keys) * block == save.end
        assert tuple(tokens_of(save.token_ids).tolist()) == tuple(
            request.device_tokens[save.begin : save.end]
        )
        assert self.names.setdefault(save.epoch.weights_digest, engine.weights) == engine.weights
        placed, blocks = placement_keys(keys), []
        for index in range(save.wanted // block, save.end // block):
            payload = np.zeros((2, block), np.uint32)
            for offset in range(block):
                position = index * block + offset
                at = position // engine.block - save.wanted // engine.block
                payload[:, offset] = engine.pool[rank, save.block_ids[at], :, position % engine.block]
                prefix = tuple(request.device_tokens[: position + 1])
                right = kv_of(engine.weights, request.salted(), prefix) ^ rank
                assert payload[0, offset] == right, f"saves wrong KV at {position}"
            blocks.append(
                PublishBlock(
                    keys[index],
                    keys[index - 1] if index else ROOT_KEY,
                    index,
                    placed[index],
                    payload.reshape(-1).view(np.uint8).data,
                )
            )
        done = await session.publish(
            blocks, quality=Quality.LOSSLESS, owner="test", pin_for_s=save.pin_for_s, timeout_s=5.0
        )
        await session.release(done.leases)

    def report(self) -> None:
        engine = self.engine
        ready = [load for left, load in self.loading if left == 0]
        self.loading = [(left - 1, load) for left, load in self.loading if left > 0]
        failed: set[int] = set()
        for load in ready:
            reached = min(on_loop(self._read(rank, load)) for rank in range(engine.ranks))
            failed |= set(load.block_ids[reached // engine.block : load.end // engine.block])
        for load in ready:
            request = engine.requests[load.request_id]
            bad = [i for i, block in enumerate(load.block_ids) if block in failed]
            if request.state == "loading" and bad:
                request.computed = request.device_computed = bad[0] * engine.block
        engine.scheduling.loaded([load.request_id for load in ready], failed)
        for load in ready:
            request = engine.requests[load.request_id]
            if request.state == "over":
                engine.give_back(request)
                del engine.requests[load.request_id]
                continue
            request.state = "waiting"
            if request.computed == 0:
                engine.give_back(request)
            if request.computed == request.num_tokens:
                request.computed -= 1
            request.device_computed = request.computed

    async def _read(self, rank: int, load: Load) -> int:
        """How many tokens are there now."""
        engine, block = self.engine, self.engine.setup.specs[rank].layout.block_tokens
        session = await engine.side.session(engine.setup.spec_of(rank, load.adapter), load.epoch)
        assert session is not None
        answers = [answer async for answer in session.read(load.runs[rank], timeout_s=5.0)]
        first = load.begin // block
        for index, answer in enumerate(answers, first):
            if not hasattr(answer, "payload") or index * block in self.broken:
                return int(max(load.begin, index * block // engine.block * engine.block))
            payload = np.frombuffer(answer.payload, np.uint32).reshape(2, block)
            for offset in range(block):
                position = index * block + offset
                if load.begin <= position < load.end:
                    target = load.block_ids[position // engine.block]
                    engine.pool[rank, target, :, position % engine.block] = payload[:, offset]
        return load.end
