"""Named points in the storage and transport seams where a test may make something go wrong.

    failpoints.arm("storage.read", failpoints.Fail(OSError("EIO")), times=2)

Unarmed, a point costs one look at an empty dictionary. Points: `storage.read`, `storage.write`,
`transport.match`, `transport.read`, `transport.write`, `transport.begin`, `transport.commit`,
`transport.release`. All can fail and delay; `storage.write` can lose the bytes (DROP), `storage.read` can
find none (DROP) or break them (CORRUPT). The table is the process's own: tests disarm what they arm.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fail:
    """Raise this error at the point."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Delay:
    """Stand still at the point, until `event` is set if there is one."""

    event: asyncio.Event


class Effect(enum.Enum):
    """What the point itself must do: `hit` returns it."""

    DROP = "drop"
    CORRUPT = "corrupt"


Action = Fail | Delay | Effect


@dataclass(slots=True)
class _Armed:
    action: Action
    after: int  # hits to let pass first
    times: int  # then hits to act on


_armed: dict[str, _Armed] = {}
met: Counter[str] = Counter()
"""How often an armed point acted."""


def arm(name: str, action: Action, *, times: int = 1, after: int = 0) -> None:
    _armed[name] = _Armed(action, after, times)


def disarm(name: str) -> None:
    _armed.pop(name, None)


@contextmanager
def armed(name: str, action: Action, *, times: int = 1, after: int = 0) -> Iterator[None]:
    arm(name, action, times=times, after=after)
    try:
        yield
    finally:
        disarm(name)


async def hit(name: str) -> Effect | None:
    """Called at the point. Raises or waits as armed; an effect is the caller's to carry out."""
    if not _armed:
        return None
    action = _take(name)
    if isinstance(action, Fail):
        raise action.error
    if isinstance(action, Delay):
        await action.event.wait()
    return action if isinstance(action, Effect) else None


def _take(name: str) -> Action | None:
    point = _armed.get(name)
    if point is None:
        return None
    if point.after:
        point.after -= 1
        return None
    point.times -= 1
    if point.times == 0:
        disarm(name)
    met[name] += 1
    return point.action
