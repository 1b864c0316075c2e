"""Traces of requests: JSON lines of timestamp, input_length, output_length and hash_ids.

One hash id stands for a block of 512 tokens *and* all that came before it (Mooncake's published traces,
FAST'25), so equal ids are equal prefixes. A request's last block is partial when its input does not fill it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstore.errors import ConfigError

BLOCK_TOKENS: Final = 512
_MS_MAX: Final = 1 << 53


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float  # since the trace began
    input_tokens: int
    hash_ids: array[int]

    def tokens(self, blocks: int) -> int:
        """In its first so many blocks."""
        return min(blocks * BLOCK_TOKENS, self.input_tokens)


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    requests: tuple[Request, ...]

    @property
    def blocks(self) -> int:
        return sum(len(request.hash_ids) for request in self.requests)

    @property
    def tokens(self) -> int:
        return sum(request.input_tokens for request in self.requests)

    def part(self, first: float, last: float) -> Trace:
        """The requests from one share of the trace to another, as a trace of its own."""
        begin, end = (round(len(self.requests) * share) for share in (first, last))
        return Trace(f"{self.name}[{begin}:{end}]", self.requests[begin:end])


def read_trace(path: Path) -> Trace:
    """Raises ConfigError that names the line, OSError when there is no such file."""
    with path.open(encoding="utf-8") as lines:
        requests = tuple(_requests(lines, path))
    if not requests:
        raise ConfigError(f"{path} holds no request: a trace is one JSON object a line")
    return Trace(path.stem, requests)


def _requests(lines: Iterator[str], path: Path) -> Iterator[Request]:
    before = 0.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = _request(json.loads(line))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ConfigError(f"{path}, line {number} is no request of a trace: {error!r}") from None
        if request.at_s < before:
            raise ConfigError(f"{path}, line {number}: time goes back; sort the trace by timestamp")
        before = request.at_s
        yield request


def _request(fields: dict[str, Any]) -> Request:
    ids = array("q", fields["hash_ids"])
    at_ms, tokens = fields["timestamp"], fields["input_length"]
    if not 0 <= at_ms <= _MS_MAX or not isinstance(tokens, int):
        raise ValueError("timestamp and input_length must be numbers that are not negative")
    if not (len(ids) - 1) * BLOCK_TOKENS < tokens <= len(ids) * BLOCK_TOKENS or not ids:
        raise ValueError(f"{len(ids)} blocks of {BLOCK_TOKENS} tokens do not hold {tokens} tokens")
    if min(ids) < 0:
        raise ValueError("a hash id is negative")
    return Request(at_ms / 1000, tokens, ids)
