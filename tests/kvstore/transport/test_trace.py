"""A trace goes with every call, into the shard's log lines and nowhere it could do harm."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from kvstore import trace
from kvstore.transport.grpc.client import GrpcTransport
from tests.kvstore.conftest import Served
from tests.kvstore.oracle import TIMEOUT

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(("traceparent", "bound"), [(TRACEPARENT, TRACEPARENT), ("x\nforged line", None)])
async def test_a_trace_reaches_the_shards_log(
    served: Served,
    transport: GrpcTransport,
    monkeypatch: pytest.MonkeyPatch,
    traceparent: str,
    bound: str | None,
) -> None:
    seen: list[dict[str, Any]] = []
    status, hello = served.driver.status, served.driver.hello

    async def listen(**named: Any) -> Any:
        seen.append(dict(structlog.contextvars.get_contextvars()))
        return await status(**named)

    async def listen_to_hello(**named: Any) -> Any:
        seen.append(dict(structlog.contextvars.get_contextvars()))
        return await hello(**named)

    monkeypatch.setattr(served.driver, "status", listen)
    monkeypatch.setattr(served.driver, "hello", listen_to_hello)
    with trace.tracing(traceparent):
        await transport.status(timeout_s=TIMEOUT)  # the hello in a call of its own, then over the stream
    await transport.status(timeout_s=TIMEOUT)
    assert [one.get("traceparent") for one in seen] == [bound, bound, None]
