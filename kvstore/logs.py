"""How our own processes log: one line an event, with plain tracebacks.

A log must not hold the values of variables: prompts and tokens are among them.
"""

from __future__ import annotations

from typing import TextIO

import structlog


def log_plainly(level: int, stream: TextIO | None = None) -> None:
    """Events of `level` (of `logging`) and above, as JSON, to `stream` (None: standard output)."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
