"""Versions of one tier that came up as the victim too early, and wait outside their queues: the deepest.

Each tenant's stand in a heap by chain index, with lazy deletion: an entry that does not count any more is
dropped when it comes up, and all of those at once when they are more than half. Who is pinned when it comes
up loses its entry, and gets another when it is let go of. Cost: O(log n) each, O(tenants) for the deepest of
all. Nothing here fails.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Final

from kvstore.core.versions import Versions

Where = tuple[str, int, int]
"""Which queue: tenant, epoch, priority."""
Entry = tuple[int, int, int]  # minus the chain index, order of entry, slot

_HEAP_MIN: Final = 64  # shorter ones are not worth tidying


class Lifted:
    def __init__(self, versions: Versions) -> None:
        self._versions = versions
        self._queues: dict[int, Where] = {}  # of each slot that is lifted
        self._of_queue: Counter[Where] = Counter()
        self._entries: dict[int, Entry] = {}  # the one that counts, of each slot that has one
        self._heaps: dict[str, list[Entry]] = {}
        self._tidy_at: dict[str, int] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self._queues)

    def __contains__(self, slot: int) -> bool:
        return slot in self._queues

    def any_of(self, queue: Where) -> bool:
        return queue in self._of_queue

    def add(self, slot: int, queue: Where) -> None:
        self._queues[slot] = queue
        self._of_queue[queue] += 1
        self._push(slot, queue[0])

    def let_go(self, slot: int) -> None:
        """Pinned by nobody any more, and still to stay where it is."""
        if slot not in self._entries:
            self._push(slot, self._queues[slot][0])

    def remove(self, slot: int) -> Where:
        """The queue it was lifted out of."""
        self._entries.pop(slot, None)
        queue = self._queues.pop(slot)
        self._of_queue[queue] -= 1
        if not self._of_queue[queue]:
            del self._of_queue[queue]
        return queue

    def deepest(self, tenant: str | None) -> int | None:
        """Of those that nobody pins, of one tenant or of all."""
        tenants = list(self._heaps) if tenant is None else [tenant]
        found = [entry for entry in map(self._first, tenants) if entry is not None]
        return min(found)[2] if found else None

    # -- inside ------------------------------------------------------------------------------------

    def _push(self, slot: int, tenant: str) -> None:
        heap = self._heaps.setdefault(tenant, [])
        if len(heap) >= self._tidy_at.get(tenant, _HEAP_MIN):
            heap[:] = [entry for entry in heap if self._counts(entry)]
            heapq.heapify(heap)
            self._tidy_at[tenant] = max(_HEAP_MIN, 2 * len(heap))
        self._order += 1
        entry = self._entries[slot] = -self._versions.chain_indexes[slot], self._order, slot
        heapq.heappush(heap, entry)

    def _first(self, tenant: str) -> Entry | None:
        heap = self._heaps.get(tenant, [])
        while heap:
            entry = heap[0]
            if self._counts(entry):
                if not self._versions.pins[entry[2]]:
                    return entry
                del self._entries[entry[2]]
            heapq.heappop(heap)
        self._heaps.pop(tenant, None)
        self._tidy_at.pop(tenant, None)
        return None

    def _counts(self, entry: Entry) -> bool:
        return self._entries.get(entry[2]) == entry
