"""Who goes first when room is needed.

Idle versions (live, pinned by nobody) stand in one queue per epoch of a model, each kept by a replacement
policy. Advancing an epoch therefore moves nothing: the queues of past epochs are simply emptied first, the
oldest epoch first. Among current epochs, of several models, the version that was let go longest ago
goes. Cost: O(1) a use, O(queues that are not empty) a victim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvstore.core.chain import Version
from kvstore.core.seams import ReplacementPolicy

EpochOfModel = tuple[str, int]


class Evictables:
    """Failure is an answer: no victim. `nbytes` is what evicting everything would give."""

    def __init__(
        self,
        make_policy: Callable[[], ReplacementPolicy],
        lag: Callable[[str, int], int],
        by_slot: Mapping[int, Version],
    ) -> None:
        self.nbytes = 0
        self._make_policy = make_policy
        self._lag = lag
        self._by_slot = by_slot
        self._queues: dict[EpochOfModel, ReplacementPolicy] = {}
        self._uses = 0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def insert(self, version: Version) -> None:
        """The version became idle, just used."""
        epoch_of_model = version.model_id, version.epoch.number
        queue = self._queues.get(epoch_of_model)
        if queue is None:
            queue = self._queues[epoch_of_model] = self._make_policy()
        self._uses += 1
        version.idle_since = self._uses
        self.nbytes += version.nbytes
        queue.insert(version.ref.slot)

    def remove(self, version: Version) -> None:
        """The version was pinned, retired or evicted."""
        epoch_of_model = version.model_id, version.epoch.number
        queue = self._queues[epoch_of_model]
        queue.remove(version.ref.slot)
        self.nbytes -= version.nbytes
        if not len(queue) and self._lag(*epoch_of_model):
            del self._queues[epoch_of_model]  # of a past epoch: most likely it never fills again

    def victim(self) -> Version | None:
        """The next to go, or None when nothing is idle. Changes nothing."""
        first: Version | None = None
        order: tuple[int, int] | None = None
        for (model_id, number), queue in self._queues.items():
            slot = queue.victim()
            if slot is None:
                continue
            version = self._by_slot[slot]
            claim = -self._lag(model_id, number), version.idle_since
            if order is None or claim < order:
                first, order = version, claim
        return first
