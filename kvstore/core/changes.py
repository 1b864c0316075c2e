"""The shard's last changes, for watchers: a bounded log in revision order.

A watcher asks for what came after a revision. The log forgets its oldest changes when it is full, whole
revisions at a time; who asks for what came after one that is forgotten is answered Compacted, and must list.
Entries are plain tuples of numbers and bytes, which the garbage collector stops looking at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container
from operator import itemgetter

from kvstore.nouns import ROOT_KEY, BlockKey, Change, ChangeKind, NamespaceId

_Entry = tuple[int, int, NamespaceId, BlockKey, int, int, int]
_REVISION = itemgetter(0)


class ChangeLog:
    def __init__(self, changes_max: int) -> None:
        self.revision = 0  # the shard's newest
        self.horizon = 0  # nothing is missing of what came after this revision
        self._entries: list[_Entry] = []
        self._start = 0  # entries before are forgotten
        self._max = changes_max

    def __len__(self) -> int:
        return len(self._entries) - self._start

    def advance(self) -> int:
        """The next revision: what is added from here on happens at it."""
        self.revision += 1
        return self.revision

    def add(
        self,
        kind: ChangeKind,
        namespace: NamespaceId,
        key: BlockKey = ROOT_KEY,
        epoch: int = 0,
        quality: int = 0,
        tier: int = 0,
    ) -> None:
        self._entries.append((self.revision, int(kind), namespace, key, epoch, quality, tier))
        if len(self) > self._max:
            self.forget(_REVISION(self._entries[self._start]))

    def forget(self, revision: int) -> None:
        """Everything at or before the revision."""
        self.horizon = max(self.horizon, revision)
        self._start = bisect_right(self._entries, revision, lo=self._start, key=_REVISION)
        if self._start > self._max:  # at most twice the bound is ever held
            del self._entries[: self._start]
            self._start = 0

    def since(
        self, revision: int, namespaces: Container[NamespaceId], changes_max: int
    ) -> tuple[list[Change], int]:
        """Changes of these namespaces after a revision, and up to which one they are complete.

        At most about `changes_max` entries are looked at; a revision is never torn.
        """
        entries = self._entries
        begin = bisect_right(entries, revision, lo=self._start, key=_REVISION)
        end = begin + changes_max
        if end >= len(entries):
            end, upto = len(entries), self.revision
        else:
            upto = entries[end - 1][0]
            end = bisect_right(entries, upto, lo=end, key=_REVISION)
        chosen = entries[begin:end]
        return [
            Change(r, ChangeKind(k), n, key, e, q, t) for r, k, n, key, e, q, t in chosen if n in namespaces
        ], upto
