"""One bound for a whole call: every step inside gets what the steps before it left over."""

from __future__ import annotations

import asyncio


class Deadline:
    """`timeout_s` from now on the running loop's clock."""

    __slots__ = ("at",)

    def __init__(self, timeout_s: float) -> None:
        self.at = asyncio.get_running_loop().time() + timeout_s

    def left(self) -> float:
        """Seconds; 0 once it has passed, never less: a call given 0 fails at once, by the same name."""
        return max(0.0, self.at - asyncio.get_running_loop().time())
