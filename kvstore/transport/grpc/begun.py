"""A coroutine that takes its first step at once, where it is made: most need no other, or need it now.

A task of its own would take that step a turn of the event loop later, some 20 us (Python 3.12 has eager
tasks). Until its first wait the coroutine must not ask which task it runs in, as `asyncio.timeout` does.
"""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from functools import partial
from typing import Any, Generic, TypeVar

Answer = TypeVar("Answer")


class Begun(Generic[Answer]):
    """Making one takes the coroutine's first step. If that was all, it raises StopIteration with the answer,
    or the coroutine's error; else the rest is done by whatever awaits this, once."""

    def __init__(self, work: Coroutine[Any, Any, Answer]) -> None:
        self._work = work
        self._first = work.send(None)

    def __await__(self) -> Generator[Any, Any, Answer]:
        waits_for = self._first
        while True:
            try:
                value = yield waits_for
            except BaseException as error:  # a cancellation, most of all: it is the work's to handle
                step = partial(self._work.throw, error)
            else:
                step = partial(self._work.send, value)
            try:
                waits_for = step()
            except StopIteration as answered:
                answer: Answer = answered.value
                return answer
