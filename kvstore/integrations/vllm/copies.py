"""The seam between a worker and the device its pool lies on: out of the pool, and into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from kvstore.errors import ConfigError
from kvstore.integrations.vllm.conversion import Pieces, Pool

__all__ = ["Copies", "HostCopies", "copies_of"]

Wait = Callable[[], None]


class Copies(Protocol):
    """`payloads` is memory of the host, flat, of the pool's dtype."""

    def out(self, pieces: Pieces, payloads: torch.Tensor) -> Wait | None:
        """On vLLM's thread: copy what its work issued so far leaves there; the blocks may change hands from
        here on. What has to be called, on another thread, before `payloads` is read; None: nothing."""
        ...

    def mark(self) -> Wait | None:
        """On vLLM's thread: what `into` has to come after."""
        ...

    def into(self, pieces: Pieces, payloads: torch.Tensor, after: Wait | None) -> None:
        """On any other thread: done when it returns, behind `after`."""
        ...


class HostCopies:
    """A pool in the host's memory: everything at once."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def out(self, pieces: Pieces, payloads: torch.Tensor) -> None:
        self._pool.gather(pieces, payloads)

    def mark(self) -> None:
        return

    def into(self, pieces: Pieces, payloads: torch.Tensor, after: Wait | None) -> None:
        self._pool.scatter(pieces, payloads)


def copies_of(pool: Pool) -> Copies:
    """Raises ConfigError for a device that is not served."""
    kind = pool.groups[0].tensor.device.type
    if kind == "cpu":
        return HostCopies(pool)
    if kind != "cuda":
        raise ConfigError(f"KV on {kind} is not served: CPUs and CUDA are")
    try:
        from kvstore.integrations.vllm.device_copy import DeviceCopies
    except ImportError:
        raise ConfigError("KV on CUDA needs triton: pip install triton") from None
    return DeviceCopies(pool)
