"""Attempts that were aborted before they were heard of: an abort may overtake the call that it is about.

Calls to one actor run in the order in which their arguments arrive, not in that of their sending: a start
with a megabyte of KV may come after the abort that was sent behind it (measured: 6 times in 40). Who is asked
to begin looks here first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from kvstore.clock import Clock

__all__ = ["KEPT_MAX", "KEPT_S", "AbortedAttempts"]

KEPT_MAX: Final = 4096
KEPT_S: Final = 120.0
"""Longer than any call of the router may take."""


class AbortedAttempts:
    """The newest aborted attempt of each request, for a while."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._aborted: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._aborted)

    def remember(self, request_id: str, attempt: int) -> None:
        known, _ = self._aborted.pop(request_id, (attempt, 0.0))
        self._aborted[request_id] = max(attempt, known), self._clock.now() + KEPT_S
        if len(self._aborted) > KEPT_MAX:
            self._aborted.popitem(last=False)

    def covers(self, request_id: str, attempt: int) -> bool:
        """Was this attempt, or a later one, aborted before?"""
        aborted, until = self._aborted.get(request_id, (-1, 0.0))
        return attempt <= aborted and self._clock.now() < until
