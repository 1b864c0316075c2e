"""Where the service's shards are, for commands of the same user on the router's machine.

`kvstrata status|epoch|purge --store up-PORT` find them as they find a store that runs alone: in a folder that
others can neither read nor write (kvstore/store_file.py). Admins' calls go to loopback unless configured
otherwise, so from here they reach the shards of this machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Self

from kvstore.config import StoreConfig
from kvstore.store_file import ShardPlace, StoreFile, StoreFolder, write_private
from router.launcher import LaunchedShard

__all__ = ["PublishedStore"]


class PublishedStore:
    def __init__(self, folder: StoreFolder, tls: dict[str, str] | None) -> None:
        self._folder = folder
        self._tls = tls

    @classmethod
    @contextlib.contextmanager
    def at(cls, port: int, store: StoreConfig, token: str) -> Iterator[Self]:
        """Under the port of the service's API, until it ends. Raises ConfigError where one runs already."""
        folder = StoreFolder.of(f"up-{port}")
        with folder.running():
            token_file = folder.path / "token"
            write_private(token_file, token.encode() + b"\n")
            try:
                yield cls(folder, store.client_files())
            finally:
                token_file.unlink(missing_ok=True)

    def write(self, shards: Mapping[str, LaunchedShard]) -> None:
        places = tuple(
            ShardPlace(name, shard.address, shard.admin, shard.pid) for name, shard in sorted(shards.items())
        )
        token = str(self._folder.path / "token")
        StoreFile(self._folder.path.name, places, token, self._tls).write(self._folder.file)
