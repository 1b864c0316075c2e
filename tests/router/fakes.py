"""Scripted workers: they answer with tokens of a given text, and fail where a test says so.

A fleet of them shares a script, as real workers share weights: whichever goes on, token i is the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.tokenizer import Tokenizer
from engine.types import (
    FinishReason,
    FirstToken,
    GenerationRequest,
    Handoff,
    PrefillStats,
    TokenEvent,
    TokenLogprobs,
)
from kvstore.clock import Clock, MonotonicClock
from kvstore.nouns import Epoch, NamespaceId, Quality, WeightsDigest
from router.api.backend import Backend
from router.attempts import AttemptLimits
from router.errors import WorkerGone
from router.fleet import Member
from router.handles import WorkerFacts
from router.metrics import RouterMetrics
from router.orchestrator import Orchestrator
from router.updating import WantedWeights
from tests.tiny_model import make_tiny_model

MODEL = "tiny"
MAX_MODEL_LEN = 512
EOS = 2
EPOCH = Epoch(1, WeightsDigest(bytes(16)))


def facts(worker_id: str, epoch: Epoch = EPOCH) -> WorkerFacts:
    return WorkerFacts(worker_id, epoch, MAX_MODEL_LEN, pid=1)


@dataclass
class Script:
    """What the model would say: these tokens, then its end token."""

    tokens: list[int]

    def event(self, request: GenerationRequest, index: int) -> TokenEvent:
        token = self.tokens[index] if index < len(self.tokens) else EOS
        finish = None
        if (token == EOS and not request.sampling.ignore_eos) or token in request.sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif index + 1 >= request.sampling.max_tokens:
            finish = FinishReason.LENGTH
        logprobs = scripted_logprobs(token, request.sampling.logprobs)
        return TokenEvent(request.request_id, request.attempt, index, token, finish, logprobs=logprobs)


def scripted_logprobs(token: int, top: int | None) -> TokenLogprobs | None:
    """The token itself is the most probable one, then those of the next ids."""
    if top is None:
        return None
    return TokenLogprobs(-0.5, tuple(token + i for i in range(top)), tuple(-0.5 - i for i in range(top)))


@dataclass
class FakePrefill:
    script: Script
    cached: int = 0
    dead: bool = False
    refuse: Exception | None = None
    hang: asyncio.Event | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[tuple[str, int]] = field(default_factory=list)
    announced: list[GenerationRequest] = field(default_factory=list)

    async def announce(self, request: GenerationRequest) -> None:
        self.announced.append(request)

    async def prefill(self, request: GenerationRequest) -> FirstToken:
        self.requests.append(request)
        if self.dead:
            raise WorkerGone("the prefill worker died")
        if self.refuse is not None:
            raise self.refuse
        if self.hang is not None:
            await self.hang.wait()
        cached = min(self.cached, len(request.prompt_ids))
        stats = PrefillStats(
            len(request.prompt_ids), cached, {"host": cached}, {"absent": 1}, (EPOCH.number,)
        )
        return FirstToken(self.script.event(request, len(request.output_ids)), stats)

    async def handoff(self, request_id: str, attempt: int) -> Handoff | None:
        request = next(r for r in self.requests if (r.request_id, r.attempt) == (request_id, attempt))
        event = self.script.event(request, len(request.output_ids))
        grown = GenerationRequest(
            request_id, attempt, request.prompt_ids, request.sampling, (*request.output_ids, event.token_id)
        )
        position = len(request.prompt_ids) + len(request.output_ids)
        return Handoff(
            grown, NamespaceId(bytes(16)), EPOCH, Quality.LOSSLESS, False, (), (), None, position + 1
        )

    async def abort(self, request_id: str, attempt: int) -> None:
        self.aborted.append((request_id, attempt))

    async def counters(self) -> Mapping[str, float]:
        return {"verified_blocks": 3.0, "rejected:checksum": 1.0, "miss:absent": 2.0}


@dataclass(frozen=True)
class Polled:
    cursor: int
    events: Sequence[TokenEvent]
    preempted: Sequence[tuple[str, int]] = ()


@dataclass
class FakeDecode:
    """`dies_after` tokens every poll fails; `silent_after` tokens nothing more is said."""

    script: Script
    dies_after: int | None = None
    silent_after: int | None = None
    mangle: Callable[[list[TokenEvent]], list[TokenEvent]] = list
    started: list[Handoff] = field(default_factory=list)
    aborted: list[tuple[str, int]] = field(default_factory=list)
    preempted: list[tuple[str, int]] = field(default_factory=list)
    _log: list[TokenEvent] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, handoff: Handoff) -> None:
        self.started.append(handoff)
        request, index = handoff.request, len(handoff.request.output_ids)
        limit = self.silent_after if self.silent_after is not None else self.dies_after
        said = 0
        while limit is None or said < limit:
            event = self.script.event(request, index)
            self._log.append(event)
            said, index = said + 1, index + 1
            if event.finish is not None:
                break
        self._log[:] = self.mangle(self._log)
        self._news.set()

    async def poll(self, cursor: int, timeout_s: float) -> Polled:
        while cursor >= len(self._log):
            if self.dies_after is not None and self.started:
                raise WorkerGone("the decode worker died")
            self._news.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                break
        return Polled(len(self._log), self._log[cursor:], self.preempted)

    async def abort(self, request_id: str, attempt: int) -> None:
        self.aborted.append((request_id, attempt))

    async def counters(self) -> Mapping[str, float]:
        return {"verified_blocks": 4.0}


@dataclass
class FakeOperations:
    backend_metrics: RouterMetrics
    workers: dict[str, Any]
    reason: str | None = None
    updates: list[WantedWeights] = field(default_factory=list)
    update_fails: Exception | None = None

    def not_ready(self) -> str | None:
        return self.reason

    async def gather(self) -> None:
        for name, worker in self.workers.items():
            self.backend_metrics.totals.fold(name, await worker.counters())

    async def status(self) -> dict[str, Any]:
        return {"ready": self.reason is None}

    async def update_weights(self, wanted: WantedWeights) -> dict[str, Any]:
        if self.update_fails is not None:
            raise self.update_fails
        self.updates.append(wanted)
        return {
            "epoch": wanted.number,
            "weights_digest": "00",
            "mode": wanted.mode.value,
            "changed": ["d0"],
            "replaced": [],
            "not_advanced": {},
            "seconds": 0.1,
        }


@dataclass
class FakeService:
    """A backend over scripted workers. Build it inside the event loop it will run on."""

    backend: Backend
    operations: FakeOperations
    prefill: list[FakePrefill]
    decode: list[FakeDecode]


def fake_service(
    folder: Path,
    text: str = "The tide.",
    *,
    prefill: int = 1,
    decode: int = 1,
    running_max: int = 8,
    limits: AttemptLimits | None = None,
    gone: Callable[[str], None] = lambda _worker_id: None,
    clock: Clock | None = None,
    send_timeout_s: float = 60.0,
) -> FakeService:
    make_tiny_model(folder)
    tokenizer = Tokenizer.from_folder(folder)
    script = Script(tokenizer.encode(text))
    metrics = RouterMetrics()
    clock = clock or MonotonicClock()
    orchestrator = Orchestrator(
        tokenizer, metrics, running_max=running_max, limits=limits, gone=gone, clock=clock
    )
    prefills = [FakePrefill(script) for _ in range(prefill)]
    decodes = [FakeDecode(script) for _ in range(decode)]
    for number, prefill_worker in enumerate(prefills):
        orchestrator.add_prefill(Member(facts(f"prefill-{number}"), prefill_worker))
    for number, decode_worker in enumerate(decodes):
        orchestrator.add_decode(Member(facts(f"decode-{number}"), decode_worker))
    workers = {f"p{i}": w for i, w in enumerate(prefills)} | {f"d{i}": w for i, w in enumerate(decodes)}
    operations = FakeOperations(metrics, workers)
    backend = Backend(
        MODEL, 1, tokenizer, orchestrator, metrics, operations, clock, send_timeout_s=send_timeout_s
    )
    return FakeService(backend, operations, prefills, decodes)
