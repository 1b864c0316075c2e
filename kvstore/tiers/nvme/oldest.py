"""How old the oldest record of each scope is that stands on a disk or may yet come to one.

A purge that has nothing older than itself in its scope can kill nothing and may be forgotten. Every purge is
compared with numbers that one pass over segments, queues and running writes has found: O(scopes of all
segments), whatever is purged. The pass gives way to others now and then, and what it finds stays true
meanwhile: what is written later is younger than every purge noted before the pass, a frame that was on its
way is counted where it was, and a copy is as old as its original, whose segment the pass holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from kvstore.nouns import NamespaceId
from kvstore.tiers.nvme.appender import Pending
from kvstore.tiers.nvme.notes import Scope
from kvstore.tiers.nvme.segment import Segment

SCOPES_A_TURN: Final = 20_000
"""About 10 ms of the event loop."""
_NEVER: Final = 1 << 64  # above every sequence number


class Oldest:
    def __init__(self) -> None:
        self._of_scope: dict[Scope, int] = {}
        self._of_unknown = _NEVER

    def add(self, scope: Scope, sequence: int) -> None:
        """A record of this namespace's epoch."""
        for one in (scope, (scope[0], None)):
            if sequence < self._of_scope.get(one, _NEVER):
                self._of_scope[one] = sequence

    def add_unknown(self, sequence: int) -> None:
        """A record that may be of any scope."""
        self._of_unknown = min(self._of_unknown, sequence)

    def is_needless(self, scope: Scope, before: int) -> bool:
        """Whether a purge of that scope can kill nothing."""
        return min(self._of_unknown, self._of_scope.get(scope, _NEVER)) >= before

    def has_none_of(self, namespace: NamespaceId) -> bool:
        return self._of_unknown == _NEVER and (namespace, None) not in self._of_scope


async def find_oldest(
    segments: Iterable[Segment], pendings: Iterable[Pending], beginning: Iterable[int]
) -> Oldest:
    """One pass. `beginning`: sequence numbers of writes that are in no queue yet."""
    found = Oldest()
    at_once = list(segments)  # with everything else that is counted before the first await
    for sequence in beginning:
        found.add_unknown(sequence)
    for pending in pendings:
        found.add(pending.scope, pending.sequence)
    looked = 0
    for segment in at_once:
        if segment.opaque:
            found.add_unknown(0)
        for scope, sequence in segment.oldest.items():
            found.add(scope, sequence)
        looked += 1 + len(segment.oldest)
        if looked >= SCOPES_A_TURN:
            looked = 0
            await asyncio.sleep(0)
    return found
