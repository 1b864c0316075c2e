"""Giving up idle versions though no offer needs their room.

A home shard makes room for what is written to it. An edge shard's room is an engine's pool: a sequence that
is admitted takes slots the core never hears of, so whoever admits it asks here first. O(1) a version.
"""

from __future__ import annotations

from kvstore.core.shard import ShardCore

__all__ = ["evict_idle"]


def evict_idle(core: ShardCore, versions_max: int) -> int:
    """Evict up to `versions_max` idle versions, in the policy's order, each at a revision of its own. How
    many went; what they freed stands in `core.index.freed`, for the driver to discard."""
    for evicted in range(versions_max):
        victim = core.index.host.evictables.victim(None, core.index.now)
        if victim is None:
            return evicted
        core.retiring.evict(victim)
    return versions_max
