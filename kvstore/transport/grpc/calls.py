"""What every served call has: a context, and an end."""

from __future__ import annotations

from typing import Any, Final

TIMEOUT_S_MAX: Final = 60.0  # for a caller that set no deadline
Context = Any  # grpc.aio.ServicerContext: its generics say nothing here


def left(context: Context) -> float:
    """Seconds until the caller stops waiting, and never more than TIMEOUT_S_MAX."""
    remaining = context.time_remaining()
    return TIMEOUT_S_MAX if remaining is None else min(remaining, TIMEOUT_S_MAX)
