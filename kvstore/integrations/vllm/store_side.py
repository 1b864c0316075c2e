"""A half's way to the store: one client, a session a namespace and epoch, on an event loop in its own thread.

Nothing here makes vLLM's threads wait. The store may be down when vLLM starts, or go away later: then
`session` says None at once, nothing is found or saved, and one caller tries again every RETRY_S (doubling
up to RETRY_S_MAX), within `connect_timeout_s`. Once open, a session turns absent shards into misses itself.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import structlog

from kvstore.client import ClientLimits, StoreClient
from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import EpochConflict, KVStrataError
from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.nouns import Epoch, NamespaceSpec
from kvstore.session import StoreSession

__all__ = ["Connect", "StoreSide", "connect_as", "loop_of_this_process"]

Connect = Callable[[], Awaitable[StoreClient]]
Value = TypeVar("Value")

RETRY_S: Final = 1.0
RETRY_S_MAX: Final = 15.0
SESSIONS_MAX: Final = 256  # ranks times adapters, of the epochs in use
CLOSE_S: Final = 5.0

log = structlog.get_logger(__name__)


def connect_as(config: ConnectorConfig) -> Connect:
    """To the store that the settings name."""

    async def connect() -> StoreClient:
        limits = ClientLimits(connect_timeout_s=config.connect_timeout_s)
        if not config.addresses:
            return await StoreClient.connect_running(
                str(config.store), limits=limits, shared_memory=config.shared_memory
            )
        return await StoreClient.connect_to(
            config.addresses,
            token=config.shown_token(),
            tls=config.client_tls(),
            limits=limits,
            shared_memory=config.shared_memory,
        )

    return connect


class StoreSide:
    """Made and called by vLLM's thread; what is `async` here runs on the loop, by way of `begin`."""

    def __init__(self, config: ConnectorConfig, connect: Connect | None = None, clock: Clock | None = None):
        self.count: Callable[[str], object] = lambda name: None  # of whoever counts for this half
        self.clock = clock or MonotonicClock()
        self.loop = loop_of_this_process(os.getpid())
        self._config = config
        self._connect = connect or connect_as(config)
        self._client: StoreClient | None = None
        self._sessions: OrderedDict[tuple[NamespaceSpec, Epoch], StoreSession] = OrderedDict()
        self._delay_s, self._not_before = RETRY_S, self.clock.now()
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- from vLLM's thread ------------------------------------------------------------------------

    def begin(self, work: Coroutine[Any, Any, Value]) -> concurrent.futures.Future[Value]:
        """Run it on the loop. Its error is logged and counted, and whoever asks the future has it, too."""
        future: concurrent.futures.Future[Value] = concurrent.futures.Future()
        self.loop.call_soon_threadsafe(self._spawn, work, future)
        return future

    def tell(self, call: Callable[..., object], *args: Any) -> None:
        """Call it on the loop, after what was told or begun before."""
        self.loop.call_soon_threadsafe(call, *args)

    def settle(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until nothing is under way. False: the time was up first."""
        done = asyncio.run_coroutine_threadsafe(self._settled(timeout_s), self.loop)
        return done.result(timeout_s + 1.0)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Let what is under way end, cancel what does not, and leave the store. Bounded by twice the time."""
        done = asyncio.run_coroutine_threadsafe(self._close(timeout_s), self.loop)
        try:
            done.result(2 * timeout_s)
        except TimeoutError:
            log.warning("the store's client did not close in time", timeout_s=timeout_s)

    # -- on the loop -------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """As `begin`, for who is on the loop already."""
        self._spawn(work, concurrent.futures.Future())

    async def client(self) -> StoreClient | None:
        """None: the store is not reachable now. Bounded by `connect_timeout_s`."""
        if self._client is not None:
            return self._client
        if self._opening.locked() and self._delay_s > RETRY_S:
            return None  # somebody tries again: do not queue up behind a store that may be dead
        async with self._opening:
            if self._client is None and self.clock.now() >= self._not_before:
                self._client = await self._attempt(self._connect())
            return self._client

    async def session(self, spec: NamespaceSpec, epoch: Epoch) -> StoreSession | None:
        """None: the store is not reachable now. Raises EpochConflict where the number has other weights."""
        session = self._sessions.get((spec, epoch))
        if session is not None:
            self._sessions.move_to_end((spec, epoch))
            return session
        client = await self.client()
        if client is None or self.clock.now() < self._not_before:
            return None
        config = self._config
        session = await self._attempt(
            client.open(spec, epoch, tenant=config.tenant, min_quality=config.min_quality)
        )
        if session is not None:
            self._sessions[spec, epoch] = session
            if len(self._sessions) > SESSIONS_MAX:
                self._sessions.popitem(last=False)
        return session

    async def _attempt(self, opening: Awaitable[Value]) -> Value | None:
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                opened = await opening
        except EpochConflict:
            raise
        except (KVStrataError, OSError) as error:  # TimeoutError is an OSError
            self.count("store_unreachable")
            self._not_before = self.clock.now() + self._delay_s
            log.warning("the store is not reachable", retry_s=self._delay_s, error=str(error))
            self._delay_s = min(2 * self._delay_s, RETRY_S_MAX)
            return None
        self._delay_s = RETRY_S
        return opened

    def _spawn(self, work: Coroutine[Any, Any, Value], future: concurrent.futures.Future[Value]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._ended, future))

    def _ended(self, future: concurrent.futures.Future[Value], task: asyncio.Task[Value]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            future.cancel()
        elif (error := task.exception()) is not None:
            self.count("unexpected_errors")
            log.error("work beside vLLM failed", exc_info=error)
            future.set_exception(error)
        else:
            future.set_result(task.result())

    async def _settled(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        except TimeoutError:
            return False
        return True

    async def _close(self, timeout_s: float) -> None:
        if not await self._settled(timeout_s):
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            client, self._client = self._client, None
            self._sessions.clear()
            await client.close()


@functools.cache
def loop_of_this_process(_pid: int) -> asyncio.AbstractEventLoop:
    """One for both halves, as long as the process lives: gRPC does not let go of a loop it has seen."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="kvstrata-vllm", daemon=True).start()
    return loop
