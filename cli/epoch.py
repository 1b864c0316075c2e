"""`kvstrata epoch`: which weights a model's epochs stand for, and which is current, on a running store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.at_store import Json, Store, TlsCa, TokenFile, failures, store_client
from cli.say import note, one_json, reported

if TYPE_CHECKING:
    from kvstore.nouns import Epoch, EpochPolicy, EpochsOfModel

__all__ = ["epoch"]

epoch = typer.Typer(
    help="Epochs of a running store: one number for each set of a model's weights.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="The model's id, as its engines open it.")]
Number = Annotated[int, typer.Argument(min=0, help="The epoch's number. New weights take a higher one.")]


@epoch.command()
def show(
    model: Model,
    store: Store = "default",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    json_out: Json = False,
) -> None:
    """Show a model's epochs. Exit code 1 when the shards do not agree."""
    raise typer.Exit(reported(lambda: _show(model, (store, token_file, tls_ca), json_out)))


@epoch.command()
def register(
    model: Model,
    number: Number,
    weights: Annotated[str, typer.Argument(help="Digest of the weights: 32 hex digits.")],
    store: Store = "default",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    json_out: Json = False,
) -> None:
    """Bind a number to a set of weights, for ever. Engines do it themselves when they open the store."""
    raise typer.Exit(
        reported(lambda: _register(model, number, weights, (store, token_file, tls_ca), json_out))
    )


@epoch.command()
def advance(
    model: Model,
    number: Number,
    policy: Annotated[
        str,
        typer.Option(
            help="What older KV is worth: isolate (nothing to newer weights), allow-stale=K (something to "
            "readers that ask for it, up to K epochs back), drop (nothing to anybody)."
        ),
    ] = "isolate",
    store: Store = "default",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    json_out: Json = False,
) -> None:
    """Make a registered epoch the current one. Instant, whatever the store holds; pinned KV stays."""
    at = (store, token_file, tls_ca)
    raise typer.Exit(reported(lambda: _advance(model, number, policy, at, json_out)))


At = tuple[str, Path | None, Path | None]


def _show(model: str, at: At, json_out: bool) -> int:
    with store_client(*at, admin=False) as client:
        known = client.epochs(model)
    agree = len(set(known.values())) == 1
    if json_out:
        one_json({"model": model, "agree": agree, "shards": {s: _document(e) for s, e in known.items()}})
        return 0 if agree else 1
    if not agree:
        note("the shards do not agree: repeat `kvstrata epoch register` and `advance` for what is missing")
    _draw(model, known, agree)
    return 0 if agree else 1


def _register(model: str, number: int, weights: str, at: At, json_out: bool) -> int:
    bound = _epoch(number, weights)

    def work(client: Any) -> Mapping[Any, object]:
        done: Mapping[Any, object] = client.register_epoch(model, bound)
        return done

    document = {"model": model, "epoch": number, "weights": weights.lower()}
    return _on_all(at, False, work, document, f"epoch {number} of {model} is registered", json_out)


def _advance(model: str, number: int, policy: str, at: At, json_out: bool) -> int:
    meant = _policy(policy)

    def work(client: Any) -> Mapping[Any, object]:
        from kvstore.errors import ConfigError, EpochUnknown

        try:
            done = client.advance_epoch(model, number, meant)
        except EpochUnknown:
            raise EpochUnknown(
                f"epoch {number} of {model} is not registered: `kvstrata epoch register {model} {number} "
                "WEIGHTS` first, or let an engine that runs these weights open the store"
            ) from None
        for shard, known in client.epochs(model).items():
            if known.current > number:
                raise ConfigError(
                    f"{model} is at epoch {known.current} on {shard} already, and epochs never go back: "
                    f"register the weights under {known.current + 1} and advance to that"
                )
        return {shard: revision._asdict() for shard, revision in done.items()}

    document = {"model": model, "epoch": number, "policy": policy}
    return _on_all(at, True, work, document, f"{model} is at epoch {number} ({policy})", json_out)


def _on_all(at: At, admin: bool, work: Any, document: dict[str, Any], said: str, json_out: bool) -> int:
    """Do it on all shards and say so; when only some did it, that is what is said, with exit code 1."""
    from kvstore.errors import Incomplete

    failed: dict[str, str] = {}
    with store_client(*at, admin=admin) as client:
        try:
            done = work(client)
        except Incomplete as error:
            done, failed = error.done, failures(dict(error.failed))
    if json_out:
        one_json(document | {"done": sorted(done), "failed": failed})
    else:
        print(f"{said} on {', '.join(sorted(done))}")
    for shard, why in failed.items():
        note(f"error: not on {shard}: {why}; repeat the command when that is mended")
    return 1 if failed else 0


def _epoch(number: int, weights: str) -> Epoch:
    from kvstore.errors import ConfigError
    from kvstore.nouns import Epoch, WeightsDigest

    if not re.fullmatch(r"[0-9a-fA-F]{32}", weights):
        raise ConfigError(
            f"{weights!r} is no digest of weights: 32 hex digits (`kvstore.digest16(...).hex()`)"
        )
    return Epoch(number, WeightsDigest(bytes.fromhex(weights)))


def _policy(text: str) -> EpochPolicy:
    from kvstore.errors import ConfigError
    from kvstore.nouns import DROP, ISOLATE, allow_stale

    if text in ("isolate", "drop"):
        return DROP if text == "drop" else ISOLATE
    found = re.fullmatch(r"allow-stale=([0-9]{1,9})", text)
    if found is None:
        raise ConfigError(f"--policy {text}: use isolate, allow-stale=K (like allow-stale=1) or drop")
    return allow_stale(int(found[1]))


def _document(known: EpochsOfModel) -> dict[str, Any]:
    registered = [{"number": e.number, "weights": e.weights_digest.hex()} for e in known.registered]
    return asdict(known) | {"registered": registered}


def _draw(model: str, known: Mapping[Any, EpochsOfModel], agree: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for shard, epochs in list(known.items())[: 1 if agree else None]:
        if not epochs.registered:
            console.print(f"{model}: no epoch is registered" + ("" if agree else f" on {shard}"))
            continue
        table = Table("epoch", "weights", "", title=model if agree else f"{model} on {shard}")
        for registered in epochs.registered:
            table.add_row(
                str(registered.number), registered.weights_digest.hex(), _state(epochs, registered.number)
            )
        console.print(table)


def _state(epochs: EpochsOfModel, number: int) -> str:
    if number == epochs.current:
        lag = epochs.stale_lag_max
        return "current" + (f", stale reads up to {lag} back" if lag else "")
    if number < epochs.oldest:
        return "dropped"
    return "older" if number < epochs.current else "to come"
