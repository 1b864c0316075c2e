"""How dear a version is to its tenant, and for how long: what goes before a replacement policy's own order.

Of a tenant's idle versions of one epoch those of the lowest priority go first; among equals the policy says
who. A time to live counts from a version's last use (its commit is one), on the core's own time, and starts
anew with every use; once it is over the version is worth what one is of which nobody said anything, until it
is used again. Priorities, their default and where they fall back to are those of TensorRT-LLM's
KvCacheRetentionConfig.

Cost: five bytes a version, and a heap entry for each whose priority ends. Out of range is a ConfigError.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvstore.errors import ConfigError

PRIORITY_MAX: Final = 100
PRIORITY_DEFAULT: Final = 35
"""Of what nobody said anything of, and of what one said it of too long ago."""
TTL_S_MAX: Final = 30 * 86_400.0
_HEAP_SLACK: Final = 64


@dataclass(frozen=True, slots=True)
class Retention:
    """`priority`: 0 goes first, 100 last. `ttl_s`: for so long after its last use; None: as long as it is
    there. Raises ConfigError out of bounds."""

    priority: int = PRIORITY_DEFAULT
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.priority <= PRIORITY_MAX:
            raise ConfigError(f"a priority of {self.priority}: give one from 0 to {PRIORITY_MAX}")
        if self.ttl_s is not None and not 0.001 <= self.ttl_s <= TTL_S_MAX:  # not a number is neither
            raise ConfigError(
                f"a ttl_s of {self.ttl_s}: give 0.001 to {TTL_S_MAX:.0f} seconds, or None for one without end"
            )


class Retentions:
    """The retention of each slot's version, in columns. `kept`: how many have another priority than the
    default; while there are none nobody need look."""

    __slots__ = ("_ttls_ms", "kept", "priorities")

    def __init__(self) -> None:
        self.priorities = bytearray()
        self._ttls_ms = array("I")  # 0: without end
        self.kept = 0

    def put(self, slot: int, retention: Retention | None) -> None:
        """None: the default."""
        missing = slot + 1 - len(self.priorities)
        if missing > 0:
            self.priorities.extend(bytes((PRIORITY_DEFAULT,)) * missing)
            self._ttls_ms.frombytes(bytes(missing * self._ttls_ms.itemsize))
        before = self.priorities[slot]
        if retention is None:
            if before == PRIORITY_DEFAULT:
                return
            retention = Retention()
        self.kept += (retention.priority != PRIORITY_DEFAULT) - (before != PRIORITY_DEFAULT)
        self.priorities[slot] = retention.priority
        ends = retention.priority != PRIORITY_DEFAULT and retention.ttl_s is not None
        self._ttls_ms[slot] = max(1, round((retention.ttl_s or 0) * 1000)) if ends else 0

    def of(self, slot: int) -> Retention | None:
        """What was said of it; None when that is the default."""
        if self.priorities[slot] == PRIORITY_DEFAULT:
            return None
        ttl_ms = self._ttls_ms[slot]
        return Retention(self.priorities[slot], ttl_ms / 1000 if ttl_ms else None)

    def end(self, slot: int, used_s: float) -> float:
        """When its priority ends if it was last used then; infinity: never."""
        ttl_ms = self._ttls_ms[slot]
        return used_s + ttl_ms / 1000 if ttl_ms else math.inf

    def priority(self, slot: int, used_s: float, now: float) -> int:
        """What it is worth now, last used at `used_s`."""
        return self.priorities[slot] if now < self.end(slot, used_s) else PRIORITY_DEFAULT


class Ends:
    """Slots whose priority ends some time: a heap that is put right when an entry comes up, so that a use,
    which only moves the end away, costs one look-up. Never much more than twice the slots expected."""

    __slots__ = ("_due", "_heap")

    def __init__(self) -> None:
        self._due: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def expect(self, slot: int, end: float) -> None:
        """Name the slot in `past` at its end, or before; infinity is not waited for."""
        if end < self._due.get(slot, math.inf):
            self._due[slot] = end
            heapq.heappush(self._heap, (end, slot))
            if len(self._heap) > 2 * len(self._due) + _HEAP_SLACK:
                self._heap = [(due, of) for of, due in self._due.items()]
                heapq.heapify(self._heap)

    def forget(self, slot: int) -> None:
        self._due.pop(slot, None)

    def past(self, now: float) -> Iterator[int]:
        """Those that are due, each once; not expected any more. They may be expected again meanwhile."""
        while self._heap and self._heap[0][0] <= now:
            end, slot = heapq.heappop(self._heap)
            if self._due.get(slot) == end:
                del self._due[slot]
                yield slot
