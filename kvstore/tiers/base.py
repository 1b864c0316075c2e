"""The storage seam of a tier: five methods, and nothing about versions, leases or keys.

Real tiers, the tests' crashing ones and the simulator's all obey it. A slot's bytes are one whole frame.
"""

from __future__ import annotations

from typing import Protocol

from kvstore.nouns import Tier


class TierStorage(Protocol):
    @property
    def tier(self) -> Tier: ...

    def write(self, slot: int, frame: bytearray) -> None:
        """Keep `frame` under `slot`; the storage owns the buffer from here on. Raises OSError."""
        ...

    def read(self, slot: int) -> memoryview | None:
        """The slot's bytes, or None when it holds none. Valid until the slot is written or discarded."""
        ...

    def sync(self) -> None:
        """What was written before survives from here on, where the tier can promise that."""
        ...

    def discard(self, slot: int) -> None:
        """Forget the slot's bytes. Idempotent."""
        ...
