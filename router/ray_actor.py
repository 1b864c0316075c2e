"""The router as a Ray actor: one process with the service, which owns every shard's and worker's actor.

The actor is asynchronous: Ray runs its methods and the service on one event loop. Whoever started it
follows the start through `progress` and needs nothing else; detached, it is found by its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvstore.errors import KVStrataError
from kvstore.logs import log_plainly
from router.config import ServiceConfig
from router.launcher import LaunchedShard
from router.published import PublishedStore
from router.service import RouterService

__all__ = ["RouterActor", "RouterStart", "StartProgress"]

_SECRET_NBYTES: Final = 32
_PROGRESS_WAIT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class RouterStart:
    """`folder` has the model's tokenizer on the router's node; workers load `worker_model`."""

    config: ServiceConfig
    folder: Path
    worker_model: str
    cluster_secret: bytes = field(default_factory=lambda: secrets.token_bytes(_SECRET_NBYTES), repr=False)
    token: str = field(default_factory=lambda: secrets.token_hex(_SECRET_NBYTES), repr=False)


@dataclass(frozen=True, slots=True)
class StartProgress:
    """Lines since a cursor. `done` when the service is up, `error` when it will not be."""

    cursor: int
    lines: tuple[str, ...]
    done: bool
    error: str | None


class RouterActor:
    def __init__(self, start: RouterStart) -> None:
        log_plainly(logging.INFO)
        self._start = start
        self._lines: list[str] = []
        self._news = asyncio.Event()
        self._service: RouterService | None = None
        self._published: PublishedStore | None = None
        self._ending = contextlib.ExitStack()
        self._bringing_up: asyncio.Task[None] | None = None

    async def open(self) -> str:
        """Listen, and begin to bring everything up; the URL. Raises ConfigError and ModelError."""
        from router.ray_launcher import RayLauncher

        start = self._start
        secret = start.config.store.kept_secret() or start.cluster_secret
        launcher = RayLauncher(start.config, start.worker_model, secret, start.token)
        service = await asyncio.to_thread(
            RouterService,
            start.config,
            start.folder,
            launcher,
            told=self._tell,
            shards_changed=self._publish,
            admin_token=start.token,
        )
        url = await service.open()
        port = int(url.rpartition(":")[2])
        self._published = self._ending.enter_context(PublishedStore.at(port, start.config.store, start.token))
        self._service = service
        self._bringing_up = asyncio.create_task(service.bring_up(), name="bring up")
        self._bringing_up.add_done_callback(lambda _: self._news.set())
        return url

    async def progress(self, cursor: int) -> StartProgress:
        """Wait (bounded) for lines after the cursor, or the end of the start."""
        task = self._bringing_up
        if cursor >= len(self._lines) and task is not None and not task.done():
            self._news.clear()
            try:
                async with asyncio.timeout(_PROGRESS_WAIT_S):
                    await self._news.wait()
            except TimeoutError:
                pass
        done = task is not None and task.done()
        error = task.exception() if task is not None and task.done() else None
        lines = tuple(self._lines[cursor:])
        return StartProgress(cursor + len(lines), lines, done, None if error is None else _words(error))

    async def status(self) -> dict[str, Any]:
        return await self._running().status()

    async def flip_stored_byte(self) -> str | None:
        return await self._running().flip_stored_byte()

    async def close(self, drain_s: float) -> None:
        """End the service. The actor may be killed after."""
        if self._bringing_up is not None:
            self._bringing_up.cancel()
            await asyncio.gather(self._bringing_up, return_exceptions=True)
        if self._service is not None:
            await self._service.close(drain_s)
        self._ending.close()

    def _publish(self, shards: Mapping[str, LaunchedShard]) -> None:
        if self._published is not None:
            self._published.write(shards)

    def _running(self) -> RouterService:
        if self._service is None:
            raise KVStrataError("the router has not been opened yet")
        return self._service

    def _tell(self, line: str) -> None:
        self._lines.append(line)
        self._news.set()


def _words(error: BaseException) -> str:
    if isinstance(error, KVStrataError):
        return str(error)
    return f"{type(error).__name__}: {error}; the router's log has the details"
