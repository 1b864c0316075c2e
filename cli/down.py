"""`kvstrata down`: ends what `kvstrata up --address auto` left in a Ray cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.say import note, one_json, reported

__all__ = ["down"]


def down(
    address: Annotated[
        str, typer.Option(help="The Ray cluster: auto, the one of this machine; or its head's host:port.")
    ] = "auto",
    drain: Annotated[float, typer.Option(min=0, help="Seconds for running requests to finish.")] = 5.0,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")] = False,
) -> None:
    """End the service in a Ray cluster. (A local one ends with Ctrl-C where it runs.)"""
    raise typer.Exit(reported(lambda: _down(address, drain, json_out)))


def _down(address: str, drain_s: float, json_out: bool) -> int:
    from kvstore.errors import ConfigError
    from router.cluster import find_router, join

    if address == "local":
        raise ConfigError(
            "a local service ends with Ctrl-C where it runs; `down` is for clusters: auto or host:port"
        )
    note("joining the Ray cluster")
    join(address)
    router = find_router()
    if router is None:
        note("no service runs in this cluster")
    else:
        note("ending the service")
        router.close(drain_s)
    if json_out:
        one_json({"ended": router is not None})
    return 0
