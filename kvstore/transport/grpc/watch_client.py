"""A watch as a client makes it: streams of a minute, one after the other, without a gap between them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import grpc

from kvstore.deadline import Deadline
from kvstore.errors import DeadlineExceeded
from kvstore.nouns import NamespaceId, Revision
from kvstore.transport.base import WatchBatch
from kvstore.transport.grpc import wire, wire_history
from kvstore.v1 import control_pb2 as control

OpenWatch = Callable[[control.WatchRequest, float], Any]
"""The call, for so many seconds."""
Guard = Callable[[], AbstractContextManager[None]]
"""Turns what fails inside into errors of our tree."""


async def watch_until(
    deadline: Deadline,
    open_watch: OpenWatch,
    namespaces: Sequence[NamespaceId],
    after: Revision | None,
    named_errors: Guard,
    understood: Guard,
) -> AsyncGenerator[WatchBatch, None]:
    """Batches in revision order. Ends at the deadline, or when a stream ends early without a word."""
    while (left_s := deadline.left()) > 0:
        seen = after
        asked = control.WatchRequest(
            namespace_ids=namespaces, after=None if after is None else wire.revision_out(after)
        )
        stream = open_watch(asked, left_s)
        try:
            async for batch in _batches(stream, named_errors, understood):
                yield batch
                after = batch.revision
        finally:
            stream.cancel()
        if after is seen and deadline.left() > 0:
            return  # it told us nothing and ended early: it drains, and the caller asks who took over


async def _batches(stream: Any, named_errors: Guard, understood: Guard) -> AsyncIterator[WatchBatch]:
    while True:
        try:
            with named_errors():
                message = await stream.read()
        except DeadlineExceeded:
            return  # it is over, as asked for
        if message is grpc.aio.EOF:
            return
        with understood():
            batch = wire_history.batch_in(message)
        yield batch
