"""W3C trace context: the `traceparent` of the work under way, passed on with every call.

A client sets it for what it does (`tracing`), its transport sends it, the shard binds it into its log lines.
One that is not of the standard's form is dropped: it would end up in log files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

TRACE_METADATA: Final = "traceparent"
_FORM: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_current: ContextVar[str] = ContextVar("traceparent", default="")


def current() -> str:
    """Empty where nothing is traced."""
    return _current.get()


def checked(traceparent: str) -> str:
    """The same, or empty where it is none."""
    return traceparent if _FORM.fullmatch(traceparent) else ""


@contextmanager
def tracing(traceparent: str) -> Iterator[None]:
    """Calls made inside carry it."""
    token = _current.set(checked(traceparent))
    try:
        yield
    finally:
        _current.reset(token)
