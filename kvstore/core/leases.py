"""Leases: everything held for somebody has an owner and an end, on monotonic time.

The table never looks at a clock: callers pass `now`. Expiry is a heap with one entry a lease, put right
only when it comes up: O(log n) a grant, O(1) a renewal. Ending a lease is the caller's business
(`past_end` names them, the shard frees what they held). A gap between two sightings of the clock longer
than `pause_s` means the shard itself stood still (SIGSTOP, a long collector pause): nobody could renew, so
every lease is extended by the gap, in O(1).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

from kvstore.core.ids import Ids
from kvstore.errors import OverLimit
from kvstore.nouns import LeaseId

_HEAP_SLACK: Final = 64
"""Entries of leases that ended early are cleared away once they are more than the others and this."""


@dataclass(slots=True)
class Lease:
    id: LeaseId
    owner: str
    duration_s: float
    expires: float  # on the table's own time, which leaves out pauses
    granted: float


class LeaseTable:
    def __init__(self, ids: Ids, leases_max: int, lease_s_max: float, pause_s: float) -> None:
        self._leases: dict[LeaseId, Lease] = {}
        self._heap: list[tuple[float, LeaseId]] = []
        self._ids = ids
        self._max = leases_max
        self._lease_s_max = lease_s_max
        self._pause_s = pause_s
        self._paused_s = 0.0  # sum of all pauses: subtracting it from `now` gives the table's time
        self._last_seen: float | None = None

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, lease: LeaseId) -> bool:
        return lease in self._leases

    def ids(self) -> frozenset[LeaseId]:
        return frozenset(self._leases)

    @property
    def now(self) -> float:
        """When the clock was last looked at, pauses left out."""
        return 0.0 if self._last_seen is None else self._time(self._last_seen)

    def grant(self, owner: str, duration_s: float, now: float) -> LeaseId:
        """A new lease. Raises OverLimit beyond the bound on leases."""
        if len(self._leases) >= self._max:
            raise OverLimit(f"{self._max} leases are held on this shard: release some, or raise leases_max")
        duration_s = self._bounded(duration_s)
        time = self._time(now)
        lease = Lease(LeaseId(self._ids.next()), owner, duration_s, time + duration_s, time)
        self._leases[lease.id] = lease
        heapq.heappush(self._heap, (lease.expires, lease.id))
        return lease.id

    def renew(self, lease_id: LeaseId, duration_s: float, now: float) -> bool:
        """Extend to `duration_s` from now, never shorten. False when the lease is gone or past its end."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.expires <= self._time(now):
            return False
        lease.expires = max(lease.expires, self._time(now) + self._bounded(duration_s))
        return True

    def touch(self, lease_id: LeaseId, now: float) -> None:
        """Its owner is at work: renew by the lease's own duration."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            self.renew(lease_id, lease.duration_s, now)

    def is_live(self, lease_id: LeaseId, now: float) -> bool:
        lease = self._leases.get(lease_id)
        return lease is not None and lease.expires > self._time(now)

    def end(self, lease_id: LeaseId) -> bool:
        """Forget a lease. False when it is not there: ending twice is no error."""
        ended = self._leases.pop(lease_id, None) is not None
        if len(self._heap) > 2 * len(self._leases) + _HEAP_SLACK:  # mostly released before their end
            self._heap = [(lease.expires, lease.id) for lease in self._leases.values()]
            heapq.heapify(self._heap)
        return ended

    def observe(self, now: float) -> None:
        """Account for a pause. Called before anything else that looks at the time, traffic or tick."""
        if self._last_seen is not None and now - self._last_seen > self._pause_s:
            self._paused_s += now - self._last_seen
        self._last_seen = now

    def past_end(self, now: float) -> list[LeaseId]:
        """The leases past their end. The caller must `end` each, and free what it held."""
        time = self._time(now)
        past = []
        while self._heap and self._heap[0][0] <= time:
            _, lease_id = heapq.heappop(self._heap)
            lease = self._leases.get(lease_id)
            if lease is None:  # released before its end
                continue
            if lease.expires > time:  # renewed since
                heapq.heappush(self._heap, (lease.expires, lease_id))
            else:
                past.append(lease_id)
        return past

    def oldest_s(self, now: float) -> float:
        """Age of the oldest lease, pauses left out; 0.0 when there is none."""
        oldest = next(iter(self._leases.values()), None)
        return 0.0 if oldest is None else self._time(now) - oldest.granted

    def _time(self, now: float) -> float:
        return now - self._paused_s

    def _bounded(self, duration_s: float) -> float:
        """What is asked for, within the bound; nothing for what is not a positive number."""
        return min(duration_s, self._lease_s_max) if duration_s > 0 else 0.0
