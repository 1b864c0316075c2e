"""What this process may publish: no better than the least it has loaded, in any request.

vLLM's own prefix cache mixes requests, and a rank's hidden states mix all ranks' KV: so one floor an epoch,
lowered by every rank's blocks, for all that is computed after. It rises with the next epoch, before which
vLLM's caches are reset, and never otherwise (lineage.py says why).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kvstore.lineage import Lineage
from kvstore.nouns import Epoch, Quality

__all__ = ["Floor"]


class Floor:
    """Of both threads. Epochs that were not lowered are not kept."""

    def __init__(self) -> None:
        self._lowered: dict[Epoch, Lineage] = {}
        self._lock = threading.Lock()

    def lower(self, own: Epoch, loaded: Iterable[tuple[Epoch, Quality]]) -> None:
        """Before any of it can be read: KV of these is under what an engine of `own` computes from now on."""
        with self._lock:
            before = lineage = self._lowered.get(own, Lineage(own))
            for epoch, quality in loaded:
                lineage = lineage.absorb(epoch, quality)
            if lineage != before:
                self._lowered[own] = lineage

    def publishable(self, own: Epoch) -> Quality | None:
        """None: nothing."""
        with self._lock:
            lineage = self._lowered.get(own)
        return Quality.LOSSLESS if lineage is None else lineage.publishable
