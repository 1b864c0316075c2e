"""A live server over scripted workers: uvicorn on a free loopback port, in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from router.api.app import build_app
from tests.router.fakes import FakeService, fake_service

START_S = 20.0
BODY_NBYTES_MAX = 64 << 10


@dataclass
class LiveServer:
    url: str
    service: FakeService
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], Any]) -> Any:
        """Run on the server's loop, where the service's objects live."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(_async(function), self.loop)
        return future.result(START_S)


async def _async(function: Callable[[], Any]) -> Any:
    return function()


def serve(
    folder: Path, api_key: str | None = None, admin_token: str | None = None, **options: Any
) -> Iterator[LiveServer]:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    started: Future[tuple[uvicorn.Server, FakeService, asyncio.AbstractEventLoop]] = Future()

    async def main() -> None:
        service = fake_service(folder, **options)
        app = build_app(
            service.backend, api_key=api_key, body_nbytes_max=BODY_NBYTES_MAX, admin_token=admin_token
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        started.set_result((server, service, asyncio.get_running_loop()))
        await server.serve(sockets=[listener])
        await service.backend.orchestrator.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="live server")
    thread.start()
    server, service, loop = started.result(START_S)
    try:
        yield LiveServer(f"http://127.0.0.1:{port}", service, loop)
    finally:
        server.should_exit = True
        thread.join(START_S)
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One a module: tests must not change its service."""
    yield from serve(tmp_path_factory.mktemp("model"))


@pytest.fixture
def live_with(tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """A server of the test's own, made by its first call."""
    servers: list[Iterator[LiveServer]] = []

    def make(**options: Any) -> LiveServer:
        servers.append(serve(tmp_path, **options))
        return next(servers[-1])

    yield make
    for server in servers:
        with pytest.raises(StopIteration):
            next(server)
