"""One Pipeline stream as the shard serves it: calls in, answers out as they are ready.

A call that only asks the core is answered before the next message is read, without a task of its own; the
others run beside, a bounded number of them. Answers are written one message at a time, so a client that does
not read stops being read from: what one stream can hold here is bounded by its calls. Nothing a client sends
ends the stream but a message that is none, since nobody could be told which call that was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import DecodeError

from kvstore import trace
from kvstore.access import Caller
from kvstore.errors import ConfigError, DeadlineExceeded, KVStrataError, OverLimit, WireVersionMismatch
from kvstore.transport.grpc import faults
from kvstore.transport.grpc.begun import Begun
from kvstore.transport.grpc.calls import TIMEOUT_S_MAX, Context
from kvstore.transport.grpc.control_service import Call, Served
from kvstore.v1 import control_pb2 as control

log = structlog.get_logger(__name__)

CALLS_A_MESSAGE: Final = 256
TURN_NBYTES: Final = 64 << 10  # of requests answered in a row: some 2,000 keys
WAITING_MAX: Final = 64  # calls of one stream that wait for more than the core
RETRY_AFTER_S: Final = 0.05
Admit = Callable[[], Any]
"""A context manager: a place among the shard's calls that wait. Raises OverLimit."""


class PipelineStream:
    def __init__(
        self, table: Mapping[str, Served], context: Context, caller: Caller, admit: Admit, *, admin: bool
    ) -> None:
        self._table = table
        self._context = context
        self._caller = caller
        self._admit = admit
        self._admin = admin
        self._waiting: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._draining = self._drained = self._peer_left = False
        self._reading: asyncio.Task[Any] | None = None

    async def run(self) -> None:
        """Until the client ends the stream, or `drain` does. Raises ConfigError for what is no message."""
        try:
            while (data := await self._next()) is not None:
                await self._take(data)
            await asyncio.gather(*self._waiting)
        finally:
            for task in self._waiting:
                task.cancel()

    def drain(self) -> None:
        """Take no more calls; those under way are answered, then the stream ends."""
        self._draining = True
        if self._reading is not None:
            self._drained = True
            self._reading.cancel()

    async def _next(self) -> bytes | None:
        if self._draining:
            return None
        reading = self._reading = asyncio.current_task()
        try:
            data: Any = await self._context.read()
        except asyncio.CancelledError:
            if not self._drained or reading is None:
                raise
            reading.uncancel()  # it was drain(): not the client, nor the server, who gave up
            return None
        finally:
            self._reading = None
        return None if data is grpc.aio.EOF else data

    async def _take(self, data: bytes) -> None:
        try:
            calls = control.PipelineRequest.FromString(data).calls
        except DecodeError:
            raise ConfigError("a message that is no PipelineRequest: the stream cannot go on") from None
        if len(calls) > CALLS_A_MESSAGE:
            raise ConfigError(f"a message of {len(calls)} calls: at most {CALLS_A_MESSAGE}")
        answers, asked_nbytes = [], 0
        for asked in calls:
            answer = self._begun(asked)
            if answer is not None:
                answers.append(answer)
            asked_nbytes += len(asked.request)
            if asked_nbytes >= TURN_NBYTES:
                await self._write(answers)  # also everybody else's turn
                answers, asked_nbytes = [], 0
        await self._write(answers)

    def _begun(self, asked: control.PipelineCall) -> control.PipelineAnswer | None:
        """The answer, where there is one at once; None where a task will write it."""
        served = self._table.get(asked.method)
        if served is None:
            return _failed(
                asked, WireVersionMismatch(f"{asked.method[:64]!r} is no call here: upgrade the shard")
            )
        timeout_s = min(asked.timeout_ms / 1000 or TIMEOUT_S_MAX, TIMEOUT_S_MAX)
        work = served.answer(asked.request, Call(self._caller, timeout_s, self._admin))
        begun: Begun[bytes] | None = None
        if not served.waits and not asked.traceparent:
            try:
                begun = Begun(work)
            except StopIteration as answered:
                return control.PipelineAnswer(id=asked.id, response=answered.value)
            except Exception as error:
                return self._ended(asked, error)
        if len(self._waiting) >= WAITING_MAX:
            work.close()
            full = OverLimit(f"{WAITING_MAX} calls of this stream wait", retry_after_s=RETRY_AFTER_S)
            return _failed(asked, full)
        task = asyncio.create_task(self._beside(asked, begun or work, timeout_s))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return None

    async def _beside(self, asked: control.PipelineCall, work: Awaitable[bytes], timeout_s: float) -> None:
        traced = trace.checked(asked.traceparent) if asked.traceparent else ""
        with structlog.contextvars.bound_contextvars(**({"traceparent": traced} if traced else {})):
            try:
                with self._admit():
                    async with asyncio.timeout(timeout_s):
                        answer = control.PipelineAnswer(id=asked.id, response=await work)
            except TimeoutError:
                took = f"{asked.method} took longer than {timeout_s:.3f} s"
                answer = _failed(asked, DeadlineExceeded(took))
            except Exception as error:
                answer = self._ended(asked, error)
            finally:
                if isinstance(work, Coroutine):
                    work.close()  # which was never begun, where there was no place for it
        await self._write([answer])

    def _ended(self, asked: control.PipelineCall, error: Exception) -> control.PipelineAnswer:
        if isinstance(error, KVStrataError):
            return _failed(asked, error)
        log.error("a call failed", method=asked.method, exc_info=error)
        return control.PipelineAnswer(id=asked.id, error=faults.INTERNAL, detail=faults.INTERNAL_DETAIL)

    async def _write(self, answers: Sequence[control.PipelineAnswer]) -> None:
        if answers:
            message = control.PipelineResponse(answers=answers).SerializeToString()
            async with self._writing:
                if not self._peer_left:
                    await self._send(message)

    async def _send(self, message: bytes) -> None:
        try:
            await self._context.write(message)
        except grpc.aio.InternalError:
            self._peer_left = True  # the next read says so too


def _failed(asked: control.PipelineCall, error: KVStrataError) -> control.PipelineAnswer:
    return control.PipelineAnswer(
        id=asked.id,
        error=type(error).__name__,
        detail=str(error),
        retry_after_ms=faults.retry_ms_of(error),
    )
