"""How commands reach a running store: by its name on this machine, or by the addresses of its shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kvstore.sync import StoreClient

__all__ = ["Json", "Store", "TlsCa", "TokenFile", "failures", "store_client"]

Store = Annotated[
    str,
    typer.Option(
        "--store",
        help="A running store: the name it was given, or addresses of its shards, HOST:PORT,HOST:PORT. What "
        "changes a store goes to its admin addresses, all of them.",
        envvar="KVSTRATA_STORE_AT",
    ),
]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with the store's token, when it is known by addresses.")
]
TlsCa = Annotated[
    Path | None, typer.Option(help="PEM root of the store's certificates, when it is known by addresses.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")]


@contextlib.contextmanager
def store_client(
    store: str, token_file: Path | None, tls_ca: Path | None, *, admin: bool
) -> Iterator[StoreClient]:
    """A connected client. Raises errors of kvstore/errors.py, told in flags."""
    from kvstore.errors import PermissionDenied, Unauthenticated

    try:
        with _opened(store, token_file, tls_ca, admin) as client:
            yield client
    except Unauthenticated:
        raise Unauthenticated(
            f"{store} does not know this token: give the store's with --token-file; `kvstrata store` says "
            "where it lies"
        ) from None
    except PermissionDenied as error:
        raise PermissionDenied(
            f"{error}: give --store the admin addresses of all shards, as `kvstrata store` prints them"
        ) from None


def _opened(store: str, token_file: Path | None, tls_ca: Path | None, admin: bool) -> StoreClient:
    from kvstore.errors import ConfigError
    from kvstore.store_file import read_private
    from kvstore.sync import StoreClient
    from kvstore.tls import ClientTls

    if ":" not in store:
        if token_file is not None or tls_ca is not None:
            raise ConfigError(f"--token-file and --tls-ca go with addresses; {store} is a store's name")
        return StoreClient.connect_running(store, admin=admin)
    token = None if token_file is None else read_private(token_file).decode().strip()
    tls = None if tls_ca is None else ClientTls(ca=tls_ca)
    addresses = [address.strip() for address in store.split(",") if address.strip()]
    return StoreClient.connect_to(addresses, token=token, tls=tls, admin=admin)


def failures(failed: dict[Any, Exception]) -> dict[str, str]:
    """By shard, in one line each."""
    return {str(shard): " ".join(str(error).split()) for shard, error in failed.items()}
