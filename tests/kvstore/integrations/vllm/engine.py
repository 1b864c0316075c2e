"""vLLM in miniature: a scheduler over paged blocks with a prefix cache of its own.

KV of a token is a number that follows from the weights, the salt and all tokens up to it. So every block that
is attended to, saved or loaded can be told right or wrong, and by whose fault. Steps may run ahead of what
the scheduler knows (`ahead`) and carry drafts of which some are refused (`drafts`).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvstore.integrations.vllm.plans import StepPlan
from kvstore.integrations.vllm.scheduling import Scheduling
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.nouns import WeightsDigest
from tests.kvstore.integrations.vllm.request import FakeRequest, kv_of, next_token
from tests.kvstore.integrations.vllm.workers import Workers

GARBAGE = 0xDEAD


@dataclass
class New:
    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


@dataclass
class Cached:
    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


@dataclass
class Output:
    scheduled_new_reqs: list[New] = field(default_factory=list)
    scheduled_cached_reqs: Cached = field(default_factory=Cached)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    preempted_req_ids: set[str] | None = field(default_factory=set)


class FakeEngine:
    def __init__(
        self,
        setup: Setup,
        side: StoreSide,
        weights: bytes,
        *,
        pool_blocks: int = 48,
        chunk: int = 8,
        ahead: bool = False,
        drafts: int = 0,
        seed: int = 0,
    ) -> None:
        self.setup, self.side, self.weights = setup, side, weights
        self.random = random.Random(seed)
        self.scheduling = Scheduling(setup, side, lambda: WeightsDigest(weights), self.is_cache_free)
        self.block = setup.vllm_block_tokens
        self.ranks = len(setup.specs)
        self.pool = np.zeros((self.ranks, pool_blocks, 2, self.block), np.uint32)
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pool_blocks))
        self.users = [0] * pool_blocks
        self.cached: dict[tuple[Any, ...], int] = {}
        self.cached_as: dict[int, tuple[Any, ...]] = {}
        self.requests: dict[str, FakeRequest] = {}
        self.waiting: list[FakeRequest] = []
        self.running: list[FakeRequest] = []
        self.chunk, self.ahead, self.drafts = chunk, ahead, drafts
        self.outputs: list[tuple[FakeRequest, int, list[int]]] = []
        self.preempted: set[str] = set()
        self.workers = Workers(self)
        self.finished: dict[str, dict[str, Any] | None] = {}

    # -- requests ----------------------------------------------------------------------------------

    def add(self, request: FakeRequest) -> None:
        request.weights = {self.weights}
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.scheduling.on_new_request(request)

    def abort(self, request: FakeRequest) -> None:
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._finish(request)

    def _finish(self, request: FakeRequest) -> None:
        is_loading, request.state = request.state == "loading", "over"
        self.finished[request.request_id] = self.scheduling.finished(request)
        if not is_loading:  # else when the workers say that they are through
            self.give_back(request)
            del self.requests[request.request_id]

    def preempt(self, request: FakeRequest) -> None:
        """Its output in flight is delivered; it is scheduled again from nothing."""
        for _, _, produced in [each for each in self.outputs if each[0] is request]:
            request.all_token_ids += produced
        self.outputs = [each for each in self.outputs if each[0] is not request]
        self.running.remove(request)
        self.give_back(request)
        request.state, request.computed, request.device_computed = "waiting", 0, 0
        self.waiting.insert(0, request)
        self.preempted.add(request.request_id)

    # -- blocks ------------------------------------------------------------------------------------

    def is_cache_free(self) -> bool:
        return not self.cached and not any(self.users)

    def reset(self, weights: bytes) -> bool:
        """The weights change in place."""
        self.settle_outputs()
        self.weights = weights
        for request in self.requests.values():
            request.weights.add(weights)
        if not any(self.users):
            self.cached.clear()
            self.cached_as.clear()
        return self.scheduling.reset()

    def _take(self, request: FakeRequest, tokens: int) -> bool:
        need = -(-tokens // self.block) - len(request.block_ids)
        if need > len(self.free):
            return False
        for _ in range(max(0, need)):
            block, _ = self.free.popitem(last=False)
            if (key := self.cached_as.pop(block, None)) is not None:
                del self.cached[key]
            self.users[block] = 1
            request.block_ids.append(block)
        return True

    def give_back(self, request: FakeRequest) -> None:
        for block in reversed(request.block_ids):
            self.users[block] -= 1
            if not self.users[block]:
                self.free[block] = None
        request.block_ids = []

    def _missing(self, request: FakeRequest) -> int:
        """Blocks that it needs yet, to its end."""
        tokens = request.num_prompt_tokens + request.max_tokens + 2 * (1 + self.drafts)
        return max(0, -(-tokens // self.block) - len(request.block_ids))

    def _reserved(self) -> int:
        """For those that hold blocks and cannot be preempted: loads must not starve each other."""
        return sum(self._missing(request) for request in self.waiting if request.computed)

    def _local(self, request: FakeRequest) -> int:
        """vLLM's own prefix cache: whole blocks, never the last token."""
        count = 0
        while (count + 1) * self.block < request.num_tokens:
            key = (request.salted(), tuple(request.all_token_ids[: (count + 1) * self.block]))
            block = self.cached.get(key)
            if block is None:
                break
            self.users[block] += 1
            self.free.pop(block, None)
            request.block_ids.append(block)
            count += 1
        return count * self.block

    def _remember(self, request: FakeRequest, tokens: int) -> None:
        for index in range(min(tokens, request.num_tokens) // self.block):
            key = (request.salted(), tuple(request.all_token_ids[: (index + 1) * self.block]))
            block = request.block_ids[index]
            if key not in self.cached and block not in self.cached_as:
                self.cached[key], self.cached_as[block] = block, key

    # -- a step ------------------------------------------------------------------------------------

    def step(self) -> StepPlan:
        output = Output(preempted_req_ids=self.preempted)  # those of this step, too
        forwards: list[tuple[FakeRequest, int, int]] = []
        for request in list(self.running):
            self._schedule_running(request, output, forwards)
        for request in list(self.waiting):
            self._schedule_waiting(request, output, forwards)
        plan = self.scheduling.plan(output)
        self.preempted = set()
        produced = [self._forward(*each) for each in forwards]
        self.workers.save(plan)
        if self.ahead:
            self.settle_outputs()
        self.outputs += produced
        if not self.ahead:
            self.settle_outputs()
        self.workers.report()
        return plan

    def _schedule_running(
        self, request: FakeRequest, output: Output, forwards: list[tuple[FakeRequest, int, int]]
    ) -> None:
        if request not in self.running:
            return  # it was preempted for another's sake
        left = request.num_tokens - request.computed
        is_prefill = left > 1
        count = min(self.chunk, left) if is_prefill else 1 + self.drafts
        before = len(request.block_ids)
        while not self._take(request, request.computed + count):
            victim = self.running[-1]
            self.preempt(victim)
            if victim.request_id in output.num_scheduled_tokens:
                forwards[:] = [each for each in forwards if each[0] is not victim]
                self._unschedule(victim, output)
            if victim is request or request not in self.running:
                return
        cached = output.scheduled_cached_reqs
        cached.req_ids.append(request.request_id)
        fresh = request.block_ids[before:]
        cached.new_block_ids.append((fresh,) if fresh else None)
        cached.num_computed_tokens.append(request.computed)
        output.num_scheduled_tokens[request.request_id] = count
        forwards.append((request, count, 0 if is_prefill else self.drafts))
        request.computed += count

    def _unschedule(self, victim: FakeRequest, output: Output) -> None:
        del output.num_scheduled_tokens[victim.request_id]
        cached = output.scheduled_cached_reqs
        at = cached.req_ids.index(victim.request_id)
        for column in (cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            del column[at]

    def _schedule_waiting(
        self, request: FakeRequest, output: Output, forwards: list[tuple[FakeRequest, int, int]]
    ) -> None:
        if request.state == "loading" or request.request_id in (output.preempted_req_ids or ()):
            return
        is_resumed = request.request_id in self.workers.known
        external = 0
        if request.computed == 0:
            local = self._local(request)
            found, is_async = self.scheduling.matched(request, local)
            if found is None:
                self.give_back(request)
                return
            assert (found > 0) is is_async
            assert found % self.block == 0
            assert local + found <= request.num_tokens
            computed, external = local + found, found
        else:
            computed = request.computed
        count = 0 if external else min(self.chunk, request.num_tokens - computed)
        is_admitted = not external or self._missing(request) + self._reserved() <= len(self.free)
        if not is_admitted or not self._take(request, computed + count):
            if request.computed == 0:
                self.give_back(request)
            return
        self.scheduling.allocated(request.request_id, list(request.block_ids), external)
        request.computed = request.device_computed = computed
        if external:
            request.state, request.loaded = "loading", request.loaded + external
            return
        request.state = "running"
        self.waiting.remove(request)
        self.running.append(request)
        self.workers.known.add(request.request_id)
        ids = (list(request.block_ids),)
        if is_resumed:
            cached = output.scheduled_cached_reqs
            cached.req_ids.append(request.request_id)
            cached.resumed_req_ids.add(request.request_id)
            cached.new_block_ids.append(ids)
            cached.num_computed_tokens.append(computed)
        else:
            output.scheduled_new_reqs.append(New(request.request_id, ids, computed))
        output.num_scheduled_tokens[request.request_id] = count
        forwards.append((request, count, 0))
        request.computed += count

    def _forward(self, request: FakeRequest, count: int, drafts: int) -> tuple[FakeRequest, int, list[int]]:
        tokens, begin = request.device_tokens, request.device_computed
        self.check(request, begin)
        real = count - drafts
        accepted = self.random.randint(0, drafts) if drafts else 0
        produced: list[int] = []
        if begin + real >= len(tokens):
            for _ in range(1 + accepted):
                produced.append(next_token(tuple(tokens + produced)))
        whole = tokens + produced
        for position in range(begin, begin + count):
            value = GARBAGE
            if position < begin + real + accepted:
                value = kv_of(self.weights, request.salted(), tuple(whole[: position + 1]))
            self._write(request, position, value)
        request.device_computed = begin + real + accepted
        request.device_tokens = whole
        return request, drafts - accepted, produced

    def _write(self, request: FakeRequest, position: int, value: int) -> None:
        block, offset = request.block_ids[position // self.block], position % self.block
        for rank in range(self.ranks):
            self.pool[rank, block, :, offset] = (value ^ rank, value ^ rank ^ 0xFF)

    def check(self, request: FakeRequest, tokens: int) -> None:
        """What is attended to is right: of weights that this request may have met."""
        for position in range(tokens):
            block, offset = request.block_ids[position // self.block], position % self.block
            prefix = tuple(request.device_tokens[: position + 1])
            right = {kv_of(weights, request.salted(), prefix) for weights in request.weights}
            for rank in range(self.ranks):
                key, value = self.pool[rank, block, :, offset].tolist()
                assert key ^ rank in right, f"{request.request_id}: wrong KV at {position}"
                assert value == key ^ 0xFF

    def settle_outputs(self) -> None:
        outputs, self.outputs = self.outputs, []
        for request, refused, produced in outputs:
            if request.state != "running":
                continue
            request.computed -= refused
            request.all_token_ids += produced
            self._remember(request, min(request.computed, request.device_computed))
            if request.num_tokens >= request.num_prompt_tokens + request.max_tokens:
                self.running.remove(request)
                self._finish(request)

    def run(self, steps: int = 200) -> None:
        """Until every request is over; look-ups end between steps."""
        for _ in range(steps):
            if not self.requests:
                return
            assert self.side.settle()
            self.step()
        raise AssertionError(f"not over: {[(r.request_id, r.state) for r in self.requests.values()]}")

    def close(self) -> None:
        self.scheduling.close()
        self.side.close()
