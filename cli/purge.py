"""`kvstrata purge`: delete KV of a running store, for good."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.at_store import Json, Store, TlsCa, TokenFile, failures, store_client
from cli.say import note, one_json, reported

if TYPE_CHECKING:
    from kvstore.nouns import BlockKey, NamespaceId

__all__ = ["purge"]


def purge(
    namespace: Annotated[
        str | None,
        typer.Option(help="The namespace's id, 32 hex digits; `kvstrata status --store` shows them."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Every namespace of this model, all tenants'.")] = None,
    epoch: Annotated[int | None, typer.Option(min=0, help="Only KV of this epoch.")] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="Only these blocks: keys in hex, with commas, or @FILE with one a line."),
    ] = None,
    store: Store = "default",
    token_file: TokenFile = None,
    tls_ca: TlsCa = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json_out: Json = False,
) -> None:
    """Delete a namespace's or a model's KV for good: no later reader sees it.

    What readers have pinned stays theirs until they let go of it.
    """
    at = (store, token_file, tls_ca)
    scope = (namespace, model, epoch, keys)
    raise typer.Exit(reported(lambda: _purge(scope, at, yes, json_out)))


Scope = tuple[str | None, str | None, int | None, str | None]


def _purge(scope: Scope, at: tuple[str, Path | None, Path | None], yes: bool, json_out: bool) -> int:
    from kvstore.errors import ConfigError, Incomplete

    namespace, model, epoch, keys_text = scope
    if (namespace is None) == (model is None):
        raise ConfigError("say what to delete: either --namespace ID or --model ID")
    keys = None if keys_text is None else _keys(keys_text)
    with store_client(*at, admin=True) as client:
        chosen = [_namespace(namespace)] if namespace is not None else _of_model(client, str(model))
        if not yes and not _agreed(_worded(scope, len(chosen), keys)):
            note("nothing was deleted")
            return 1
        rows: list[dict[str, Any]] = []
        for found in chosen:
            failed: dict[str, str] = {}
            try:
                done = client.purge(found, keys=keys, epoch=epoch)
            except Incomplete as error:
                done, failed = error.done, failures(dict(error.failed))  # type: ignore[assignment]
            totals = [sum(p.versions for p in done.values()), sum(p.nbytes for p in done.values())]
            rows.append(
                {"namespace": found.hex(), "versions": totals[0], "nbytes": totals[1], "done": sorted(done)}
                | {"failed": failed}
            )
    if json_out:
        one_json({"purged": rows})
    for row in rows:
        if not json_out:
            mib = row["nbytes"] / (1 << 20)
            on = ", ".join(row["done"])
            print(f"{row['namespace']}: {_counted(row['versions'], 'block')}, {mib:.1f} MiB freed on {on}")
        for shard, why in row["failed"].items():
            note(f"error: not on {shard}: {why}; repeat the command when that is mended")
    return 1 if any(row["failed"] for row in rows) else 0


def _agreed(what: str) -> bool:
    from kvstore.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError(f"this would delete {what}: say --yes if that is meant")
    return typer.confirm(f"delete {what}, for good?", err=True)


def _worded(scope: Scope, namespaces: int, keys: list[BlockKey] | None) -> str:
    namespace, model, epoch, _ = scope
    what = "everything" if keys is None else _counted(len(keys), "block")
    of = f"namespace {namespace}" if namespace else f"model {model} ({_counted(namespaces, 'namespace')})"
    return f"{what} of {of}" + ("" if epoch is None else f" at epoch {epoch}")


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _namespace(text: str) -> NamespaceId:
    from kvstore.nouns import NAMESPACE_ID_NBYTES, NamespaceId

    return NamespaceId(_hex(text, NAMESPACE_ID_NBYTES, "namespace id"))


def _of_model(client: Any, model: str) -> list[NamespaceId]:
    from kvstore.errors import NotFound

    found = sorted(
        {known.id for shard in client.namespaces().values() for known in shard if known.model_id == model}
    )
    if not found:
        raise NotFound(
            f"no shard has a namespace of model {model} open: `kvstrata status --store NAME` shows those"
        )
    return found


def _keys(text: str) -> list[BlockKey]:
    from kvstore.errors import ConfigError
    from kvstore.nouns import KEY_NBYTES, BlockKey

    if text.startswith("@"):
        try:
            words = Path(text[1:]).read_text().split()
        except OSError as error:
            raise ConfigError(f"{text[1:]} cannot be read: {error.strerror}") from None
    else:
        words = [word.strip() for word in text.split(",")]
    return [BlockKey(_hex(word, KEY_NBYTES, "block key")) for word in words if word]


def _hex(text: str, nbytes: int, what: str) -> bytes:
    from kvstore.errors import ConfigError

    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != nbytes:
        raise ConfigError(f"{text!r} is no {what}: {2 * nbytes} hex digits")
    return data
