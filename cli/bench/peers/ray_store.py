"""Ray's object store as a peer: an actor puts, this process gets, over Ray's shared memory.

`ray.get` maps the objects without a copy, so the copy into the caller's own memory is on the clock, as it is
for everyone. Nothing is checked on the way.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cli.bench.oracle import Bytes
from cli.bench.peers.serving import serve

_SLACK_NBYTES: Final = 256 << 20
_GET_S: Final = 60.0


class _Holder:
    """Owns the objects, in a process of its own."""

    def __init__(self) -> None:
        self._refs: list[Any] = []

    def put(self, block: Any) -> list[Any]:
        ray: Any = importlib.import_module("ray")
        self._refs.append(ray.put(np.array(block)))
        return [self._refs[-1]]


class Ray:
    def __init__(self) -> None:
        self._ray: Any = None
        self._holder: Any = None
        self._refs: dict[str, Any] = {}

    def start(self, capacity_nbytes: int, memory: Bytes) -> str:
        ray = self._ray = importlib.import_module("ray")
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=capacity_nbytes * 5 // 4 + _SLACK_NBYTES,
        )
        self._holder = ray.remote(_Holder).remote()
        return f"Ray {ray.__version__}, ray.get and a copy"

    def put(self, name: str, block: Bytes) -> None:
        [self._refs[name]] = self._ray.get(self._holder.put.remote(block), timeout=_GET_S)

    def get(self, names: Sequence[str], into: Sequence[Bytes]) -> None:
        values = self._ray.get([self._refs[name] for name in names], timeout=_GET_S)
        for value, buffer in zip(values, into, strict=True):
            np.copyto(buffer, value)

    def close(self) -> None:
        if self._ray is not None:
            self._ray.shutdown()


if __name__ == "__main__":
    serve(Ray())
