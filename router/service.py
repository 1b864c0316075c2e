"""The router's process from the inside: HTTP server, orchestrator and supervisor on one event loop.

    open()      take the port, answer /health with 503 from now on
    bring_up()  shards and workers, all at once, then the supervisor's loop
    close()     no new requests, running ones finish within a bound, everything ends

Knows nothing of Ray: `ray_actor.RouterActor` hosts it, with a launcher that makes actors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import structlog
import uvicorn

from engine.tokenizer import Tokenizer
from kvstore.clock import Clock, MonotonicClock, wall_clock_seconds
from router.api.app import build_app
from router.api.backend import Backend
from router.attempts import AttemptLimits
from router.config import RouterConfig, ServiceConfig, check_exposure, served_name
from router.launcher import LaunchedShard, LaunchedWorker, Launcher
from router.listener import end_unread, listen
from router.metrics import RouterMetrics
from router.orchestrator import Orchestrator
from router.status import shard_rows, worker_rows
from router.supervisor import Supervision, Supervisor
from router.updating import FleetUpdate, WantedWeights

__all__ = ["RouterService"]

_HTTP_END_S: Final = 5.0

log = structlog.get_logger(__name__)


class RouterService:
    def __init__(
        self,
        config: ServiceConfig,
        folder: Path,
        launcher: Launcher,
        *,
        told: Callable[[str], None],
        clock: Clock | None = None,
        shards_changed: Callable[[Mapping[str, LaunchedShard]], None] | None = None,
        admin_token: str | None = None,
    ) -> None:
        """`admin_token` is asked of who changes the service itself; None: nobody may."""
        check_exposure(config.router)
        self._config = config
        self._clock = clock or MonotonicClock()
        self._began = self._clock.now()
        self._metrics = RouterMetrics()
        self._reason: str | None = "the service is starting"
        self._told = told
        self._orchestrator = Orchestrator(
            tokenizer := Tokenizer.from_folder(folder),
            self._metrics,
            running_max=config.router.running_max,
            limits=_limits(config.router),
            clock=self._clock,
            gone=self._worker_gone,
        )
        self._supervisor = Supervisor(
            _plan(config),
            launcher,
            self._orchestrator,
            self._metrics,
            told=self._say,
            clock=self._clock,
            shards_changed=shards_changed,
        )
        self._backend = Backend(
            served_name(config),
            wall_clock_seconds(),
            tokenizer,
            self._orchestrator,
            self._metrics,
            self,
            self._clock,
            config.router.max_tokens_default,
            config.router.send_timeout_s,
        )
        self._admin_token = admin_token
        self._update = FleetUpdate(
            self._supervisor,
            self._orchestrator.fleet,
            served_name(config),
            config.router.start_timeout_s,
            self._clock,
        )
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._supervising: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------

    async def open(self) -> str:
        """Listen; the URL. Raises ConfigError when the port is taken."""
        router = self._config.router
        listener = listen(router.host, router.port)
        end_unread(listener, router.send_timeout_s)
        key = router.api_key.get_secret_value() if router.api_key else None
        app = build_app(
            self._backend, api_key=key, body_nbytes_max=router.body_nbytes_max, admin_token=self._admin_token
        )
        settings = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            access_log=False,
            timeout_graceful_shutdown=int(router.drain_timeout_s) + 1,
        )
        self._server = uvicorn.Server(settings)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        host, port = listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def bring_up(self) -> None:
        """Raises what the first shard or worker that failed raised."""
        await self._supervisor.start()
        self._reason = None
        self._supervising = asyncio.create_task(self._supervisor.run(), name="supervisor")

    async def close(self, drain_s: float) -> None:
        """Bounded by about `drain_s` twice and some seconds. Idempotent."""
        self._reason = "the service is ending"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._orchestrator.idle.wait()
        await self._end_tasks()
        await self._supervisor.stop(0.0)
        await self._orchestrator.close()

    async def _end_tasks(self) -> None:
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)
        if self._server is not None and self._serving is not None:
            self._server.should_exit = self._server.force_exit = True
            await asyncio.wait([self._serving], timeout=_HTTP_END_S)

    def _say(self, line: str) -> None:
        if self._reason is not None:
            self._reason = f"the service is starting ({line})"
        log.info(line)
        self._told(line)

    def _worker_gone(self, worker_id: str) -> None:
        self._supervisor.report_gone(worker_id)

    # -- what the routes ask -----------------------------------------------------------------------

    def not_ready(self) -> str | None:
        if self._reason is not None:
            return self._reason
        if self._supervising is not None and self._supervising.done():
            return "nobody watches over shards and workers any more: see the router's log, and restart it"
        if not self._orchestrator.fleet.epochs():
            down = [f"{p.name}: {p.why_down}" for p in self._supervisor.places if p.running is None]
            return "no pair of prefill and decode workers is alive (" + "; ".join(down) + ")"
        stalled, limit = self._orchestrator.stalled_s(), self._config.router.progress_timeout_s
        return f"requests run, and for {stalled:.0f} s none of them got a token" if stalled > limit else None

    async def gather(self) -> None:
        await self._supervisor.gather(self._config.router.gather_timeout_s)

    async def status(self) -> dict[str, Any]:
        await self.gather()
        totals = self._metrics.totals
        return {
            "model": self._backend.model,
            "ready": self.not_ready() is None,
            "reason": self.not_ready(),
            "uptime_s": round(self._clock.now() - self._began, 3),
            "requests_running": self._orchestrator.running,
            "epochs": sorted({epoch.number for epoch in self._orchestrator.fleet.epochs()}),
            "topology_version": self._supervisor.topology.version,
            "ownerless_bytes": totals.ownerless_nbytes,
            "workers": worker_rows(self._supervisor, totals, self._orchestrator.fleet),
            "shards": shard_rows(self._supervisor, totals),
            "counters": dict(totals.workers),
        }

    async def update_weights(self, wanted: WantedWeights) -> dict[str, Any]:
        return await self._update.run(wanted)

    async def flip_stored_byte(self) -> str | None:
        """Break one stored block, on the first shard that has one; its key. Needs store.faults.

        The workers forget what lies in their own pools first: the next read is to meet what was broken.
        """
        for place in self._supervisor.places:
            if isinstance(place.running, LaunchedWorker):
                await place.running.process.forget_local()
        for place in self._supervisor.places:
            if isinstance(place.running, LaunchedShard):
                key = await place.running.process.flip_stored_byte()
                if key is not None:
                    return key
        return None


def _limits(router: RouterConfig) -> AttemptLimits:
    return AttemptLimits(
        attempts_max=router.attempts_max,
        prefill_s=router.prefill_timeout_s,
        call_s=router.call_timeout_s,
        stall_s=router.stall_timeout_s,
        recovery_s=router.recovery_timeout_s,
    )


def _plan(config: ServiceConfig) -> Supervision:
    router = config.router
    return Supervision(
        shards=config.store.shards,
        prefill=config.prefill.workers,
        decode=config.decode.workers,
        start_s=router.start_timeout_s,
        ping_interval_s=router.ping_interval_s,
        ping_s=router.ping_timeout_s,
        pings_missed_max=router.pings_missed_max,
        restart_delay_s=router.restart_delay_s,
        restart_delay_s_max=router.restart_delay_s_max,
    )
