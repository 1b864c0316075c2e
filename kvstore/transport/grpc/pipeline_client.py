"""Many small calls over one open stream: half of what a call of its own costs (benchmarks/latency.py).

    GrpcTransport --call()--> outbox --Begun, writer task--> stream --> shard
                  <--future-- waiting, by id <--reader task-- stream <--

A call ends by its answer, its own deadline, its caller's cancellation, or the stream's end, which all calls
under way share; the next call opens a new one. A caller may begin a message, never wait for it: gRPC ends a
stream whose writer is cancelled, and one caller's cancellation must harm no other.

At most IN_FLIGHT_MAX calls are under way; more wait their turn within their deadlines. The answer of a call
that nobody waits for any more is given to its `late`, so that what it granted can be given back.
"""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from kvstore import trace
from kvstore.errors import DeadlineExceeded, KVStrataError, OverLimit, Unavailable
from kvstore.transport.grpc import faults, methods
from kvstore.transport.grpc.begun import Begun
from kvstore.transport.grpc.options import MESSAGE_NBYTES_MAX
from kvstore.v1 import control_pb2 as control

IN_FLIGHT_MAX: Final = 256
OUTBOX_MAX: Final = 2 * IN_FLIGHT_MAX  # calls that ended may be unsent still
CALLS_A_MESSAGE: Final = 64
MESSAGE_NBYTES: Final = 64 << 10  # a message that is this large takes no more calls
ENVELOPE_NBYTES_MAX: Final = 1_024
Late = Callable[[bytes], None]


class Pipeline:
    """One a channel. Belongs to one event loop."""

    def __init__(self, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...], shard: str) -> None:
        self._channel = channel
        self._metadata = metadata
        self._shard = shard
        self._stream: _Stream | None = None
        self._turns = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._calls = 0

    async def call(self, method: str, request: bytes, timeout_s: float, late: Late | None = None) -> bytes:
        """The answer's bytes. Raises what the shard names, DeadlineExceeded, OverLimit for a request that
        no message can hold, and Unavailable when the stream breaks."""
        if len(request) > MESSAGE_NBYTES_MAX - MESSAGE_NBYTES - ENVELOPE_NBYTES_MAX:
            raise OverLimit(f"a request of {len(request)} bytes: ask for less at a time")
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        await self._turn(ends_at)
        try:
            stream = self._opened()
            self._calls += 1
            number = self._calls
            left_s = ends_at - loop.time()
            call = control.PipelineCall(
                id=number,
                method=method,
                request=request,
                timeout_ms=max(1, round(left_s * 1000)),
                traceparent=trace.current(),
            )
            answer = stream.send(number, _message_of(call))
            expiry = loop.call_later(left_s, stream.expire, number)
            try:
                return await answer
            except asyncio.CancelledError:
                # Both may come in one turn of the loop: then it is answered, and nobody takes it.
                if late is not None and answer.done() and not answer.cancelled() and not answer.exception():
                    late(answer.result())
                raise
            finally:
                expiry.cancel()
                stream.forget(number, late)
        finally:
            self._turns.release()

    def tell(self, method: str, request: bytes, timeout_s: float) -> None:
        """Send a call whose answer nobody waits for; nothing where no stream is open."""
        if self._stream is not None and self._stream.error is None:
            self._calls += 1
            call = control.PipelineCall(
                id=self._calls, method=method, request=request, timeout_ms=round(timeout_s * 1000)
            )
            self._stream.post(_message_of(call))

    async def close(self) -> None:
        """What is under way ends in Unavailable."""
        if self._stream is not None:
            await self._stream.close()

    async def _turn(self, ends_at: float) -> None:
        if not self._turns.locked():
            await self._turns.acquire()
            return
        try:
            async with asyncio.timeout_at(ends_at):
                await self._turns.acquire()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{IN_FLIGHT_MAX} calls to shard {self._shard} were under way all the while: ask for less"
            ) from None

    def _opened(self) -> _Stream:
        if self._stream is None or self._stream.error is not None:
            call: Any = self._channel.stream_stream(methods.PIPELINE.path)
            self._stream = _Stream(call(metadata=self._metadata), self._shard)
        return self._stream


class _Stream:
    """One open stream and the two tasks that own it. `error` says why it is over, once it is."""

    def __init__(self, call: Any, shard: str) -> None:
        self.error: KVStrataError | None = None
        self._call = call
        self._shard = shard
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._late: OrderedDict[int, Late] = OrderedDict()
        self._outbox: deque[bytes] = deque()
        self._sending: Begun[None] | None = None  # the writer task's, once begun
        self._sent = asyncio.Event()
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def send(self, number: int, call: bytes) -> asyncio.Future[bytes]:
        """Raises Unavailable where the shard has long stopped to read."""
        if len(self._outbox) >= OUTBOX_MAX:
            raise Unavailable(
                f"shard {self._shard} does not read: {len(self._outbox)} calls are still unsent"
            )
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self.post(call)
        return answer

    def post(self, call: bytes) -> None:
        """Sent at once where no other message is on its way, else with the next."""
        self._outbox.append(call)
        if self._sending is None:
            self._send_next()

    def _send_next(self) -> None:
        while self._outbox and self._sending is None:
            try:
                self._sending = Begun(self._call.write(self._next_message()))
            except StopIteration:
                continue
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return  # the stream is over: the reader is told why
        self._sent.set()

    def expire(self, number: int) -> None:
        answer = self._waiting.get(number)
        if answer is not None and not answer.done():
            answer.set_exception(DeadlineExceeded(f"shard {self._shard} did not answer in time"))

    def forget(self, number: int, late: Late | None) -> None:
        """Its caller waits no more. If it never had its answer, that goes to `late`."""
        if self._waiting.pop(number, None) is not None and late is not None and self.error is None:
            self._late[number] = late
            if len(self._late) > IN_FLIGHT_MAX:
                self._late.popitem(last=False)

    async def close(self) -> None:
        self._break(Unavailable(f"the connection to shard {self._shard} was closed"))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self) -> None:
        """Sees every message to its end, and sends what has gathered meanwhile."""
        while True:
            await self._sent.wait()
            self._sent.clear()
            if self._sending is not None:
                try:
                    await self._sending
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the stream is over: the reader is told why
            self._sending = None
            if self._outbox:
                self._send_next()

    def _next_message(self) -> bytes:
        """All that is at hand, within bounds: under load, messages cost more than calls."""
        calls = [self._outbox.popleft()]
        nbytes = len(calls[0])
        while self._outbox and len(calls) < CALLS_A_MESSAGE and nbytes < MESSAGE_NBYTES:
            calls.append(self._outbox.popleft())
            nbytes += len(calls[-1])
        return b"".join(calls)  # messages of repeated fields, one after the other, are one message

    async def _read(self) -> None:
        error: KVStrataError = Unavailable(f"the connection to shard {self._shard} was closed")
        try:
            while (data := await self._call.read()) is not grpc.aio.EOF:
                for answer in control.PipelineResponse.FromString(data).answers:
                    self._resolve(answer)
            error = Unavailable(f"shard {self._shard} ended the connection: it drains, or restarts")
        except grpc.aio.AioRpcError as ended:
            error = faults.error_in(ended, self._shard)
        except DecodeError:
            error = Unavailable(f"shard {self._shard} answers what we do not understand")
        finally:
            self._break(error)

    def _resolve(self, answer: control.PipelineAnswer) -> None:
        waiting = self._waiting.pop(answer.id, None)
        if waiting is None:
            late = self._late.pop(answer.id, None)
            if late is not None and not answer.error:
                late(answer.response)
        elif not waiting.done():
            if answer.error:
                waiting.set_exception(
                    faults.named(answer.error, answer.detail, answer.retry_after_ms, self._shard)
                )
            else:
                waiting.set_result(answer.response)

    def _break(self, error: KVStrataError) -> None:
        if self.error is not None:
            return
        self.error = error
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(copy.copy(error))  # one each: raising adds a traceback to it
        self._waiting.clear()
        self._late.clear()
        self._outbox.clear()
        self._call.cancel()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()


def _message_of(call: control.PipelineCall) -> bytes:
    return control.PipelineRequest(calls=(call,)).SerializeToString()
