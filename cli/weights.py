"""`kvstrata weights`: other weights for a running service, while it runs."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cli.at_store import Json
from cli.http import ApiKey, Url
from cli.say import note, one_json, reported

__all__ = ["weights"]

_LOAD_S: Final = 900.0
"""For every worker to load them, beside what is waited for."""

weights = typer.Typer(help="The weights of a running service.", no_args_is_help=True)


class Mode(enum.StrEnum):
    """Those of engine.types.UpdateMode, without what it imports."""

    DRAIN = "drain"
    ABORT = "abort"
    KEEP = "keep"
    RECOMPUTE = "recompute"


@weights.command()
def update(
    path: Annotated[
        str,
        typer.Argument(help="Folder, GGUF file, registry name or hub id, as every worker finds it."),
    ],
    epoch: Annotated[int, typer.Option(min=0, help="Their number: higher than that of those that run.")],
    mode: Annotated[
        Mode,
        typer.Option(
            help="What runs: drain (ends first, with the old weights), abort (ends at once, with an error), "
            "keep (goes on over the KV it has), recompute (its tokens are computed anew, then it goes on)."
        ),
    ] = Mode.DRAIN,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for what runs to end (drain).")] = 600.0,
    url: Url = "http://127.0.0.1:8000",
    api_key: ApiKey = None,
    json_out: Json = False,
) -> None:
    """Change the weights of a service on this machine, of the same user; the store's epoch advances with
    them. Same architecture, layout and tokenizer. If it fails, nothing has changed."""
    raise typer.Exit(reported(lambda: _update(path, epoch, mode, timeout, (url, api_key), json_out)))


def _update(
    path: str, epoch: int, mode: Mode, timeout_s: float, at: tuple[str, str | None], json_out: bool
) -> int:
    """Exit code 1 also when a shard did not advance."""
    from cli.http import service

    local = Path(path).expanduser()
    body = {"path": str(local.resolve()) if local.exists() else path, "epoch": epoch}
    body |= {"mode": mode.value, "timeout_s": timeout_s}
    with service(*at) as client:
        headers = {"X-Kvstrata-Admin": _admin_token(client.base_url.port)}
        note(f"loading {path} beside the weights that run" + (", then draining" if mode == "drain" else ""))
        answer = client.post(
            "/kvstrata/weights", json=body, headers=headers, timeout=timeout_s + _LOAD_S
        ).raise_for_status()
    document: dict[str, Any] = answer.json()
    if json_out:
        one_json(document)
    else:
        digest, workers = document["weights_digest"], ", ".join(document["changed"]) or "no worker"
        print(f"epoch {epoch} ({digest}) on {workers} after {document['seconds']:.1f} s")
    for worker in document["replaced"]:
        note(f"{worker} could not change its weights and is replaced by a new one that has them")
    for shard, why in document["not_advanced"].items():
        note(f"error: {shard} did not advance: {why}; `kvstrata epoch` repeats it when that is mended")
    return 1 if document["not_advanced"] else 0


def _admin_token(port: int | None) -> str:
    """What the service of this port asks of its own user. Raises KVStrataErrors."""
    from kvstore.errors import Unavailable
    from kvstore.store_file import StoreFile, StoreFolder

    folder = StoreFolder.of(f"up-{port or 80}")
    if not folder.file.exists():
        raise Unavailable(
            f"no service of yours listens on port {port or 80} of this machine: name it with --url, and run "
            "this as the user who started it, where it runs"
        )
    return StoreFile.read(folder.file).token()
