"""What no cache can beat: everything kept for ever, and Belady's choice with the future known.

Belady (1966), with bypass: the block whose next use is furthest away goes, be it the one just missed. It sees
single blocks, not prefixes, so a real cache of prefixes stays a little below. O(accesses log accesses).
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from cli.replay.trace import Trace


class Ideal(NamedTuple):
    """Shares an infinite cache hits: of block accesses, of tokens, of a request's tokens in the mean."""

    block: float
    token: float
    request: float


def ideal(trace: Trace) -> Ideal:
    seen: set[int] = set()
    blocks = tokens = 0
    shares = 0.0
    for request in trace.requests:
        run = 0
        while run < len(request.hash_ids) and request.hash_ids[run] in seen:
            run += 1
        seen.update(request.hash_ids)
        blocks += run
        tokens += request.tokens(run)
        shares += request.tokens(run) / request.input_tokens
    return Ideal(blocks / trace.blocks, tokens / trace.tokens, shares / len(trace.requests))


def belady(trace: Trace, capacity_blocks: int) -> float:
    """Share of block accesses that hit."""
    accesses = [block for request in trace.requests for block in request.hash_ids]
    never = len(accesses)
    following = [never] * len(accesses)
    next_use: dict[int, int] = {}
    for i in range(len(accesses) - 1, -1, -1):
        following[i] = next_use.get(accesses[i], never)
        next_use[accesses[i]] = i
    resident: dict[int, int] = {}  # block -> its next use
    furthest: list[tuple[int, int]] = []  # (-next use, block); stale where `resident` says otherwise
    hits = 0
    for i, block in enumerate(accesses):
        hits += block in resident
        if following[i] == never:
            resident.pop(block, None)
            continue
        resident[block] = following[i]
        heapq.heappush(furthest, (-following[i], block))
        while len(resident) > capacity_blocks:
            next_at, other = heapq.heappop(furthest)
            if resident.get(other) == -next_at:
                del resident[other]
    return hits / len(accesses)
