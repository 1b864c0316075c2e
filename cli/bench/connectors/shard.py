"""The stores of a run: a shard each, a process of its own, as `kvstrata store` starts it.

We are a client of it like vLLM is: to know when what was saved can be hit, and to bring the same verified
KV to a store with another tier below. Nothing is measured here.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cli.bench.connectors.plan import SETTLE_S
from cli.bench.jsonlines import Child, ChildFailed

if TYPE_CHECKING:
    from kvstore.nouns import NamespaceSpec
    from kvstore.sync import StoreClient, StoreSession

__all__ = ["Shard"]

_START_S: Final = 60.0
_LOOK_S: Final = 0.02  # between two looks at what has settled


class Shard:
    """Started when it is made, gone when it is closed. Raises ChildFailed where it does not do its part."""

    def __init__(self, folder: Path, capacity_nbytes: int, nvme: dict[str, Any] | None = None) -> None:
        """`folder` gets its token. `nvme`: the section of that name; None: without such a tier."""
        from kvstore.store_file import write_private
        from kvstore.sync import StoreClient

        token = secrets.token_hex(16)
        self.token_file = folder / "token"
        write_private(self.token_file, token.encode())
        self._child = Child.of_module("kvstore.shard_process")
        settings = {"shards": 1, "capacity_nbytes": capacity_nbytes} | ({"nvme": nvme} if nvme else {})
        started = self._child.ask(
            "start", _START_S, shard="bench", store=settings, secret=secrets.token_hex(16), token=token,
            port=0, admin_port=0, drain_s=0.0,
        )  # fmt: skip
        if "error" in started:
            self._child.close()
            raise ChildFailed(f"the store: {started['error']}")
        self.address: str = started["address"]
        self._client: StoreClient = StoreClient.connect_to([self.address], token=token)

    def close(self) -> None:
        self._client.close()
        self._child.close()

    def versions(self) -> int:
        return sum(status.versions for status in self._client.status())

    def until_saved(self, versions: int) -> None:
        """Wait until so many are visible. Raises ChildFailed when they are not in time."""
        _until(lambda: self.versions() >= versions, lambda: f"{self.versions()} of {versions} blocks saved")

    def session(self, spec: NamespaceSpec, weights_digest: bytes) -> StoreSession:
        """At the epoch of these weights, whose number is the store's, or 0 where it knows none."""
        from kvstore.nouns import Epoch, WeightsDigest

        digest = WeightsDigest(weights_digest)
        for known in self._client.epochs(spec.model_id).values():
            for epoch in known.registered:
                if epoch.weights_digest == digest:
                    return self._client.open(spec, epoch)
        return self._client.open(spec, Epoch(0, digest))

    def take(self, token_ids: Sequence[int], source: StoreSession, here: StoreSession) -> None:
        """Copy a prompt's blocks from another store, and wait until they lie on the lowest tier alone.

        Raises ChildFailed when the other store has not all of them, or they do not get down in time.
        """
        size = here.layout.block_tokens
        ids = list(token_ids[: len(token_ids) // size * size])
        hit = source.get(ids, framework="torch")
        if hit.n_tokens < len(ids):
            raise ChildFailed(f"{hit.n_tokens} of {len(ids)} tokens were saved under the expected names")
        before = self._lowest(here)
        here.put(ids, hit.kv)
        wanted = before + len(ids) // size
        _until(
            lambda: self._lowest(here) >= wanted, lambda: f"{self._lowest(here)} of {wanted} blocks on NVMe"
        )

    def _lowest(self, session: StoreSession) -> int:
        """Versions of the namespace that lie on NVMe alone."""
        from kvstore.nouns import Tier

        pages = self._client.listing(session.namespace)
        return sum(listed.tier is Tier.NVME for page in pages for listed in page.versions)


def _until(done: Callable[[], bool], stands: Callable[[], str]) -> None:
    deadline = time.monotonic() + SETTLE_S
    while not done():
        if time.monotonic() > deadline:
            raise ChildFailed(f"after {SETTLE_S:.0f} s only {stands()}")
        time.sleep(_LOOK_S)
