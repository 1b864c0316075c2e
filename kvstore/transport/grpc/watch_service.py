"""Watches as the shard serves them: a bounded number, each for a minute at most.

The shard's log is what a watcher reads from, at its own pace: one that does not read is not written to, so
it costs what gRPC holds of one stream and its place. Where the log has forgotten what it still needs, its
stream ends as Compacted.
"""

from __future__ import annotations

import asyncio
from typing import Final

from google.protobuf.message import DecodeError

from kvstore.closing import closing
from kvstore.errors import ConfigError, OverLimit, Unavailable
from kvstore.transport.base import ShardTransport
from kvstore.transport.grpc import wire_history
from kvstore.transport.grpc.calls import Context
from kvstore.transport.grpc.control_service import Call, ControlService
from kvstore.v1 import control_pb2 as control

WATCH_S_MAX: Final = 60.0
RETRY_AFTER_S: Final = 1.0


class Watches:
    def __init__(self, shard: ShardTransport, service: ControlService, watches_max: int) -> None:
        self._shard = shard
        self._service = service
        self._watches_max = watches_max
        self._ends: set[asyncio.Timeout] = set()
        self._draining = False

    def __len__(self) -> int:
        return len(self._ends)

    def drain(self) -> None:
        """All end now, with OK: watchers go on elsewhere from the last revision they saw."""
        self._draining = True
        now = asyncio.get_running_loop().time()
        for end in self._ends:
            end.reschedule(now)

    async def serve(self, request: bytes, context: Context, call: Call) -> None:
        """Raises ConfigError, OverLimit where all places are taken, and what the shard raises."""
        try:
            asked = control.WatchRequest.FromString(request)
        except DecodeError:
            raise ConfigError("a message that is no WatchRequest") from None
        namespaces = [
            self._service.namespace(data, call.caller)
            for data in wire_history.namespaces_in(asked.namespace_ids)
        ]
        if self._draining:
            raise Unavailable("the shard drains: ask the topology who takes over")
        if len(self._ends) >= self._watches_max:
            raise OverLimit(f"{len(self._ends)} watches are open on this shard", retry_after_s=RETRY_AFTER_S)
        timeout_s = watch_s(call.timeout_s)
        watch = self._shard.watch(namespaces, wire_history.after_in(asked), timeout_s=timeout_s)
        try:
            async with closing(watch) as batches, asyncio.timeout(call.timeout_s) as end:
                self._ends.add(end)
                async for batch in batches:
                    for message in wire_history.batches_out(batch):
                        await context.write(message.SerializeToString())
        except TimeoutError:
            if not end.expired():
                raise
        finally:
            self._ends.discard(end)


def watch_s(timeout_s: float) -> float:
    """How long a watch is served: short of the caller's deadline, so that it ends by OK and not by that."""
    return min(WATCH_S_MAX, timeout_s) - min(0.5, timeout_s / 10)
