"""An engine that computes nothing, a sink that listens, and a loop around them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engine.types import CompletedBlock, FinishReason, GenerationRequest, StepResult, TailKV, TokenEvent
from tests.role_parts import WAIT_S, request


class FakeEngine:
    """Room for `slots` sequences; each step gives every running one a token. Stands still while `shut`."""

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.sequences: dict[str, GenerationRequest] = {}
        self.given: dict[str, int] = {}
        self.hold: set[str] = set()
        self.parked: set[str] = set()
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.fail_steps = 0
        self.preempt_at: int | None = None  # tokens
        self.refused = threading.Event()
        self.entered = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def can_ever_admit(self, request: GenerationRequest) -> bool:
        return len(request.prompt_ids) < 100

    def blocks_needed(self, request: GenerationRequest, *, hold: bool = False) -> int:
        return 1

    def can_admit(self, request: GenerationRequest, *, hold: bool = False, lent: int = 0) -> bool:
        self._called("can_admit")
        if len(self.sequences) < self.slots:
            return True
        self.refused.set()
        return False

    def admit(
        self,
        request: GenerationRequest,
        *,
        lent: Sequence[int] = (),
        blocks: Sequence[Any] = (),
        tail: TailKV | None = None,
        hold: bool = False,
        keep: bool = False,
        arrival: int | None = None,
    ) -> tuple[int, ...]:
        self._called(f"admit {request.request_id}/{request.attempt}")
        self.entered.set()
        assert self.open.wait(WAIT_S)
        assert request.request_id not in self.sequences, "the earlier attempt must be released first"
        self.sequences[request.request_id] = request
        self.given[request.request_id] = len(request.output_ids)
        if hold:
            self.hold.add(request.request_id)
        return ()

    def slots_lacking(self) -> int:
        return 0

    def step(self) -> StepResult:
        self._called("step")
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("the matrix is singular")
        self.entered.set()
        assert self.open.wait(WAIT_S)
        running = [r for r in self.sequences.values() if r.request_id not in self.parked]
        for wanted in running:
            if self.preempt_at is not None and self.given[wanted.request_id] == self.preempt_at:
                self.preempt_at = None
                del self.sequences[wanted.request_id]
                output = tuple(range(self.given[wanted.request_id]))
                return StepResult(preempted=(replace(wanted, output_ids=output),))
        events = [self._token(request) for request in running]
        payload = np.zeros(8, np.uint8)
        blocks = [CompletedBlock(e.request_id, e.attempt, 1, payload) for e in events if e.index == 1]
        return StepResult(tuple(events), tuple(blocks), len(events))

    def take_tail(self, request_id: str) -> TailKV | None:
        return None

    def release(self, request_id: str) -> None:
        self._called(f"release {request_id}")
        self.sequences.pop(request_id, None)
        self.parked.discard(request_id)

    def has_work(self) -> bool:
        return self.sequences.keys() > self.parked

    def _token(self, request: GenerationRequest) -> TokenEvent:
        index = self.given[request.request_id]
        self.given[request.request_id] += 1
        if request.request_id in self.hold:
            self.parked.add(request.request_id)
        last = index + 1 == request.sampling.max_tokens
        if last:
            del self.sequences[request.request_id]
        finish = FinishReason.LENGTH if last else None
        return TokenEvent(request.request_id, request.attempt, index, index, finish)

    def _called(self, what: str) -> None:
        self.calls.append(what)
        self.threads.add(threading.get_ident())


class Sink:
    """Remembers what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.errors: list[Exception] = []
        self.began = asyncio.Event()
        self.ended = asyncio.Event()

    def on_block(self, block: CompletedBlock) -> None:
        self.told.append(f"block {block.chain_index}")

    def on_token(self, event: TokenEvent) -> None:
        self.told.append(f"token {event.index}")
        self.began.set()
        if event.finish is not None:
            self.ended.set()

    def on_error(self, error: Exception) -> None:
        self.errors.append(error)
        self.ended.set()

    async def first(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self.began.wait()

    async def end(self) -> list[str]:
        async with asyncio.timeout(WAIT_S):
            await self.ended.wait()
        return self.told


def ask(name: str, max_tokens: int = 3, attempt: int = 1) -> GenerationRequest:
    return request((1, 2, 3), name=name, max_tokens=max_tokens, attempt=attempt)
