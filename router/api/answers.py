"""Jobs to HTTP responses, whole or streamed; and what happens when the client goes away.

Until the first token there is no response: whatever fails before it has a proper status. After it, an error
is an event of the stream. In both, a client that leaves ends the generation: closing the generator frees
the workers. One that stays and reads nothing is taken for gone after a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

import structlog
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.api.backend import Backend
from router.api.errors import ClientGone, as_request_error, error_body
from router.api.forms import DONE, Form, event
from router.api.tally import Tally
from router.attempts import Job
from router.orchestrator import Orchestrator, Piece

__all__ = ["answer"]

T = TypeVar("T")
Indexed = tuple[int, Piece]

log = structlog.get_logger(__name__)


async def answer(
    request: Request, backend: Backend, jobs: Sequence[Job], form: Form, *, n: int, stream: bool
) -> Response:
    """Generate for all jobs at once: `n` choices of each prompt side by side. Raises RequestError as long as
    nothing was sent."""
    tally = Tally(jobs, backend.clock, n)
    pieces = _run(backend.orchestrator, jobs, "prompt" if len(jobs) > n else "n")
    try:
        if stream:
            first = await _unless_gone(request, anext(pieces))
            return _EventStream(_events(first, pieces, tally, form), backend.send_timeout_s)
        await _unless_gone(request, _collect(pieces, tally))
    except BaseException:
        await pieces.aclose()
        raise
    return JSONResponse(form.whole(tally))


async def _collect(pieces: AsyncIterator[Indexed], tally: Tally) -> None:
    async for index, piece in pieces:
        tally.add(index, piece)


async def _run(orchestrator: Orchestrator, jobs: Sequence[Job], field: str) -> AsyncGenerator[Indexed]:
    """Every job's pieces as they come, each with its job's index. `field` makes them many."""
    with orchestrator.admit(len(jobs), field):
        if len(jobs) == 1:
            async with contextlib.aclosing(orchestrator.generate(jobs[0])) as pieces:
                async for piece in pieces:
                    yield 0, piece
            return
        async with contextlib.aclosing(_interleaved(orchestrator, jobs)) as merged:
            async for indexed in merged:
                yield indexed


async def _interleaved(orchestrator: Orchestrator, jobs: Sequence[Job]) -> AsyncGenerator[Indexed]:
    """One task a job, all into one queue of one place: none runs ahead of the reader by more than a piece."""
    queue: asyncio.Queue[Indexed | Exception | None] = asyncio.Queue(maxsize=1)

    async def feed(index: int, job: Job) -> None:
        try:
            async with contextlib.aclosing(orchestrator.generate(job)) as pieces:
                async for piece in pieces:
                    await queue.put((index, piece))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(feed(index, job)) for index, job in enumerate(jobs)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(
    first: Indexed, pieces: AsyncGenerator[Indexed], tally: Tally, form: Form
) -> AsyncGenerator[bytes]:
    """The stream's bytes. Closing it closes `pieces`."""
    opened: set[int] = set()
    try:
        indexed: Indexed | None = first
        while indexed is not None:
            index, piece = indexed
            tally.add(index, piece)
            if index not in opened:
                opened.add(index)
                opening = form.opening(index, tally)
                if opening is not None:
                    yield _chunk_event(form, opening)
            for choice in _choices(index, piece, form):
                last = all(choice.finish is not None for choice in tally.choices)
                body = form.chunk([choice])
                if last and choice["finish_reason"] is not None and not form.include_usage:
                    body["kvstrata"] = tally.provenance()
                yield _chunk_event(form, body)
            indexed = await anext(pieces, None)
        if form.include_usage:
            yield event(form.chunk([]) | {"usage": tally.usage(), "kvstrata": tally.provenance()})
    except Exception as error:
        told = as_request_error(error)
        yield event(error_body(str(told), told.kind, told.param, told.code))
    finally:
        await pieces.aclose()
    yield DONE


def _choices(index: int, piece: Piece, form: Form) -> list[dict[str, object]]:
    """A piece's text (left out where there is nothing to show), then how it ended."""
    shows = piece.text or form.with_ids or piece.logprobs is not None
    choices = [form.token(index, piece)] if shows else []
    return choices if piece.finish is None else [*choices, form.ending(index, piece)]


def _chunk_event(form: Form, body: dict[str, object]) -> bytes:
    return event(body | {"usage": None} if form.include_usage else body)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result, or ClientGone (and the work cancelled) when the client leaves first."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _ended(task, leaving)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(Response):
    """Server-sent events that stop being made as soon as the client is gone, not at the next write; or when
    it takes nothing for `send_s`: then the connection breaks off, and its place is another's."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes], send_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._send_s = send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except TimeoutError:
            log.info("a client stopped reading", send_s=self._send_s)
        finally:
            await _ended(sending, leaving)
            await self._chunks.aclose()

    async def _send(self, send: Send) -> None:
        async for chunk in self._chunks:
            async with asyncio.timeout(self._send_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        async with asyncio.timeout(self._send_s):
            await send({"type": "http.response.body", "body": b"", "more_body": False})
