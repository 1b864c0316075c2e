"""Streams that end when their reader does.

An asynchronous generator that is left early (an error, a deadline, a break) runs its `finally` when it is
collected, in a task of its own: until then frames stay lent and calls stay open, in spite of bounds that are
free again already. Whoever reads a stream that holds something closes it here, before it lets go of anything
else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

Item = TypeVar("Item")


@asynccontextmanager
async def closing(items: AsyncIterator[Item]) -> AsyncIterator[AsyncIterator[Item]]:
    """The same stream; at the end of the block it is closed, if it is one that can be."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
