"""Ray from the outside: a cluster of our own or one that is there, and the router's actor in it.

A private cluster lives in `workdir` and nowhere else: sessions, sockets, token, and the object store's file
on shared memory under a name of its own, so that whoever ends it by force knows what to remove. Its nodes
speak over loopback. Some of Ray's ports (control plane, raylet, workers) listen on every interface whatever
address it is given: its token authentication stays on, with a token made for this cluster alone. About 4 s
to start on two cores.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstore.errors import KVStrataError
from router.errors import StartFailed

if TYPE_CHECKING:
    from router.ray_actor import RouterStart

__all__ = ["RunningRouter", "find_router", "join", "launch_router", "start_private"]

_OBJECT_STORE_NBYTES: Final = 100 << 20
"""Blocks do not travel through it: only actor calls do. Ray asks for at least 75 MiB."""
_NAMESPACE: Final = "kvstrata"
_ROUTER_NAME: Final = "router"
_OPEN_S: Final = 120.0
_CALL_S: Final = 30.0
_LOOPBACK: Final = "127.0.0.2"
"""Ray takes 127.0.0.1 to mean whatever address the machine has just now, and breaks when that changes."""
_PROBE_S: Final = 2.0
_TOKEN_FILE: Final = Path(".ray/auth_token")  # below the home: `ray start` makes and reads it
_SHM: Final = Path("/dev/shm")  # noqa: S108  the kernel's shared memory, not a temporary file

Told = Callable[[str], None]


def start_private(workdir: Path) -> None:
    """Start a cluster of our own and join it. `workdir` must be short: a socket's path has 107 bytes."""
    token = workdir / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    shared = shared_memory_dir(workdir)
    shared.mkdir(mode=0o700)
    # Read when Ray is imported, and passed on to every process of the cluster.
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    )
    os.environ.pop("RAY_ADDRESS", None)
    _init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_NBYTES,
        _temp_dir=str(workdir / "ray"),
        _plasma_directory=str(shared),
        _node_ip_address=_LOOPBACK,
    )


def shared_memory_dir(workdir: Path) -> Path:
    """Where a private cluster keeps its object store: a folder on shared memory named after `workdir`."""
    return (_SHM if _SHM.is_dir() else workdir) / f"kvstrata-{workdir.name}"


def join(address: str) -> None:
    """Join a running cluster: `auto`, the one of this machine or of RAY_ADDRESS, or host:port of its head.

    Raises StartFailed when there is none, within seconds: Ray itself would wait for minutes.
    """
    _present_token()
    # Read when Ray is imported: what refuses it, it asks 20 times, and prints a line each.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
    head = _head(address)
    try:
        host, _, port = head.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
    except OSError:
        found = head if address == "auto" else address
        raise StartFailed(
            f"nothing listens at {found}: give the address of the cluster's head, or `auto`"
        ) from None
    try:
        _init(address=head)
    except ConnectionError:
        raise StartFailed(
            f"the Ray cluster at {head} does not let this process in: where it asks for a token, set "
            "RAY_AUTH_MODE=token, with the token in ~/.ray/auth_token or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StartFailed(f"cannot join the Ray cluster at {head}: {reason}") from None


def _present_token() -> None:
    """Where there is a token, show it: `ray start` finds it and asks for it, but clients must be told."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if given or (Path.home() / _TOKEN_FILE).is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _head(address: str) -> str:
    """host:port of the cluster's head. Raises StartFailed for none."""
    from ray._private.services import canonicalize_bootstrap_address  # what ray.init calls; no public way

    try:
        head: str | None = canonicalize_bootstrap_address(address)
    except ValueError:
        raise StartFailed(f"{address!r} is no address of a cluster: give `auto`, or host:port") from None
    except ConnectionError:
        head = None
    if head is None:
        raise StartFailed(
            "no Ray cluster runs on this machine: start one (`ray start --head`), or set RAY_ADDRESS"
        )
    return head


def _init(**options: Any) -> None:
    import ray

    ray.init(namespace=_NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **options)


@dataclass(frozen=True, slots=True)
class RunningRouter:
    """The router's actor, seen from a process that is in the cluster. Every call is bounded."""

    actor: Any

    def open(self) -> str:
        url: str = _get(self.actor.open.remote(), _OPEN_S)
        return url

    def wait_until_up(self, told: Told, timeout_s: float) -> None:
        """Follow the start line by line. Raises StartFailed in the words of what failed."""
        cursor, deadline = 0, time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            progress = _get(self.actor.progress.remote(cursor), _CALL_S)
            cursor = progress.cursor
            for line in progress.lines:
                told(line)
            if progress.error is not None:
                raise StartFailed(progress.error)
            if progress.done:
                return
        raise StartFailed(f"the service was not up after {timeout_s:.0f} s. See the logs of its actors")

    def flip_stored_byte(self) -> str | None:
        key: str | None = _get(self.actor.flip_stored_byte.remote(), _CALL_S)
        return key

    def is_alive(self) -> bool:
        """Does its process answer?"""
        try:
            _get(self.actor.progress.remote(0), _CALL_S)
        except StartFailed:
            return False
        return True

    def close(self, drain_s: float) -> None:
        """End the service and its actors, whatever state they are in."""
        import ray

        try:
            _get(self.actor.close.remote(drain_s), drain_s + _CALL_S)
        finally:
            ray.kill(self.actor)


def launch_router(start: RouterStart, *, detached: bool) -> RunningRouter:
    """The router's actor on this node. Detached it outlives this process and has a name."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from router.ray_actor import RouterActor

    if detached and find_router() is not None:
        raise StartFailed("a service runs in this cluster already: end it first with `kvstrata down`")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
    if detached:
        options |= {"name": _ROUTER_NAME, "lifetime": "detached"}
    return RunningRouter(ray.remote(RouterActor).options(**options).remote(start))


def find_router() -> RunningRouter | None:
    """The detached router of the cluster we are in."""
    import ray

    try:
        return RunningRouter(ray.get_actor(_ROUTER_NAME, namespace=_NAMESPACE))
    except ValueError:
        return None


def _get(reference: Any, timeout_s: float) -> Any:
    """An actor's answer, bounded; its KVStrataErrors as they were raised."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, KVStrataError):
            raise error.cause from None
        raise StartFailed(f"the router failed: {type(error.cause).__name__}: {error.cause}") from None
    except GetTimeoutError:
        raise StartFailed(f"the router did not answer within {timeout_s:.0f} s") from None
    except RayError as error:
        raise StartFailed(f"the router is gone: {str(error).splitlines()[0]}") from None
