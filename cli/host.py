"""What runs below the guardian: a private cluster, the router, then some work. `up` and `demo` use it."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cli.guardian import guarded
from cli.say import reported
from router.cluster import RunningRouter, launch_router, shared_memory_dir, start_private
from router.config import ServiceConfig, check_exposure, served_name
from router.listener import listen
from router.model_folder import model_folder

__all__ = ["Hosted", "host_locally"]

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Hosted:
    """A service that is up, for as long as the work lasts that was given it."""

    url: str
    model: str  # its name in the API
    folder: Path  # of the model
    config: ServiceConfig
    router: RunningRouter


def host_locally(config: ServiceConfig, work: Callable[[Hosted], int], told: Told) -> int:
    """Bring the service up on a private cluster, run `work` with it, end everything. The exit code.

    Raises ConfigError, before anything is started, when the port is taken. All that is started ends with
    this call, also on Ctrl-C at any moment. `work` then simply ends, unless it handles SIGTERM.
    """
    check_exposure(config.router)
    listen(config.router.host, config.router.port).close()
    return guarded(
        lambda workdir: reported(lambda: _host(config, work, told, workdir)), also_remove=shared_memory_dir
    )


def _host(config: ServiceConfig, work: Callable[[Hosted], int], told: Told, workdir: Path) -> int:
    # Most of the cluster's start is waiting: the router's imports have room beside it.
    threading.Thread(target=importlib.import_module, args=("router.ray_actor",), daemon=True).start()
    folder = model_folder(config.model, _stages(told))
    told("starting a Ray cluster of our own")
    start_private(workdir)
    from router.ray_actor import RouterStart

    router = launch_router(RouterStart(config, folder, str(folder)), detached=False)
    try:
        url = router.open()
        router.wait_until_up(told, config.router.start_timeout_s)
        return work(Hosted(url, served_name(config), folder, config, router))
    finally:
        router.close(config.router.drain_timeout_s)


def _stages(told: Told) -> Callable[[str, int, int], None]:
    """Progress of a model's making: a line a stage, and one every tenth of it."""
    last: tuple[str, int] | None = None

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        step = (stage, 10 * done // total if total else 0)
        if step != last:
            last = step
            told(f"{stage} {100 * done // total}%" if total else stage)

    return progress
