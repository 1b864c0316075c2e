"""How much of an arena is taken, counted from what is free: pages that were lost show."""

from __future__ import annotations

from kvstore.tiers.extents import Extents


def pages_taken(free: Extents) -> int:
    return free.n_pages - sum(pages for _, pages in free.free_runs())
