"""How long work tells of itself: a plain function, so that a command draws it and a worker logs it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): `stage` in words for people, both numbers in bytes unless the stage says
otherwise; total 0 where it is not known. Called at least every second or so, from the thread that works."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress for whoever does not care."""
