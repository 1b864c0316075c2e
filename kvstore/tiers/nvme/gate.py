"""A bound on bytes in flight: who comes first goes first, and one that is larger than all goes alone."""

from __future__ import annotations

import asyncio
from collections import deque


class ByteGate:
    def __init__(self, nbytes_max: int) -> None:
        self._nbytes_max = nbytes_max
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.nbytes = 0

    def _fits(self, nbytes: int) -> bool:
        return not self.nbytes or self.nbytes + nbytes <= self._nbytes_max

    async def enter(self, nbytes: int) -> None:
        if not self._waiting and self._fits(nbytes):
            self.nbytes += nbytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, turn))
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave(nbytes)  # it was let in just when its caller gave up
            raise
        finally:
            self._admit()

    def leave(self, nbytes: int) -> None:
        self.nbytes -= nbytes
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            nbytes, turn = self._waiting[0]
            if not turn.done():
                if not self._fits(nbytes):
                    return
                self.nbytes += nbytes
                turn.set_result(None)
            self._waiting.popleft()
