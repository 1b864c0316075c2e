"""`kvstrata up`: the service on this machine, in the foreground; or on a Ray cluster, where it stays."""

from __future__ import annotations

import contextlib
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.say import note, one_json, reported

if TYPE_CHECKING:
    from cli.host import Hosted
    from router.config import ServiceConfig

__all__ = ["Address", "up"]

_ALIVE_EVERY_S = 2.0


class Address(enum.StrEnum):
    LOCAL = "local"
    AUTO = "auto"


def up(
    config: Annotated[Path | None, typer.Argument(help="TOML file; every setting has a default.")] = None,
    model: Annotated[str | None, typer.Option(help="Registry name, folder, GGUF file or hub id.")] = None,
    prefill: Annotated[int | None, typer.Option(min=1, help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(min=1, help="Decode workers.")] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Shards of the store.")] = None,
    address: Annotated[
        Address,
        typer.Option(
            help="local: a private Ray cluster, ended with Ctrl-C. auto: the running cluster; the service "
            "stays until `kvstrata down`."
        ),
    ] = Address.LOCAL,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on. 0: a free one.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow listening beyond loopback.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="KVSTRATA_API_KEY", help="Ask clients for this bearer token.")
    ] = None,
    json_out: Annotated[
        bool, typer.Option("--json", help="One JSON document when it serves; on an error none.")
    ] = False,
) -> None:
    """Serve a model: shards, prefill and decode workers, and an OpenAI-compatible router."""
    flags = {
        "model": model,
        "prefill.workers": prefill,
        "decode.workers": decode,
        "store.shards": shards,
        "router.host": host,
        "router.port": port,
        "router.insecure": insecure or None,
        "router.api_key": api_key,
    }
    raise typer.Exit(reported(lambda: _up(config, flags, address, json_out)))


def _up(path: Path | None, flags: dict[str, Any], address: Address, json_out: bool) -> int:
    from cli.settings import service_config

    config = service_config(path, flags)
    if address is Address.AUTO:
        return _on_cluster(config, json_out)
    from cli.host import host_locally

    return host_locally(config, lambda hosted: _serve(hosted, json_out), note)


def _serve(hosted: Hosted, json_out: bool) -> int:
    """Until SIGTERM (which Ctrl-C becomes below the guardian). 1 when the router is lost."""
    import signal
    import threading

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda _signal, _frame: ended.set())
    _announce(hosted.url, hosted.model, hosted.config, json_out)
    while not ended.wait(_ALIVE_EVERY_S):
        if not hosted.router.is_alive():
            note("error: the router's process is gone: start again; its log was in the cluster's folder")
            return 1
    return 0


def _on_cluster(config: ServiceConfig, json_out: bool) -> int:
    from router.cluster import join, launch_router
    from router.config import check_exposure, served_name
    from router.model_folder import model_folder
    from router.ray_actor import RouterStart

    check_exposure(config.router)
    note("joining the Ray cluster")
    join("auto")
    folder = model_folder(config.model, lambda stage, _done, _total: note(stage))
    router = launch_router(RouterStart(config, folder, config.model), detached=True)
    try:
        url = router.open()
        router.wait_until_up(note, config.router.start_timeout_s)
    except BaseException:
        with contextlib.suppress(Exception):  # the first failure is the one to tell
            router.close(0.0)
        raise
    _announce(url, served_name(config), config, json_out)
    note("it stays in the cluster; end it with: kvstrata down")
    return 0


def _announce(url: str, model: str, config: ServiceConfig, json_out: bool) -> None:
    counts = {
        "shards": config.store.shards,
        "prefill": config.prefill.workers,
        "decode": config.decode.workers,
    }
    if json_out:
        one_json({"url": url, "model": model, **counts})
        return
    key = " -H 'authorization: Bearer ...'" if config.router.api_key else ""
    body = f'{{"model":"{model}","messages":[{{"role":"user","content":"Hello!"}}]}}'
    print(f"\nserving {model} at {url}   ({', '.join(f'{n} {role}' for role, n in counts.items())})")
    print(f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'")
    port = url.rpartition(":")[2]
    print(f"  kvstrata chat, kvstrata status; kvstrata epoch show {model} --store up-{port}", flush=True)
