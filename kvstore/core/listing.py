"""What stands in a namespace at one revision, a page at a time: where a watch begins.

Pages go over the slots, so that nothing is kept between two of them: what is committed meanwhile is of a
later revision and left out, what goes meanwhile is missing, and the watch from the listing's revision tells
of both. A page looks at a bounded number of slots: 3 to 5 ms.
"""

from __future__ import annotations

from typing import Final

from kvstore.core.epochs import EpochTable
from kvstore.core.index import Index
from kvstore.core.spaces import Space
from kvstore.core.versions import State
from kvstore.nouns import Listed, Quality, Tier

_LOOKED_AT: Final = 8
"""Slots a page looks at, at most, for each version it may hold."""


def list_page(
    index: Index, epochs: EpochTable, space: Space, counter: int, cursor: int, versions_max: int
) -> tuple[list[Listed], int]:
    """Versions in the slots from `cursor` on, and the slot to go on at: 0 when there is none."""
    table, found, slot = index.versions, list[Listed](), cursor
    stop = min(table.n_slots, cursor + _LOOKED_AT * versions_max)
    while slot < stop and len(found) < versions_max:
        mine = table.spaces[slot] == space.index and State.LIVE <= table.states[slot] <= State.RETIRED
        if mine and table.stands_at(slot, counter) and not index.is_dead(slot):
            epoch = epochs.bound[table.epochs[slot]].epoch
            quality, tier = Quality(table.qualities[slot]), Tier(table.tiers[slot])
            found.append(
                Listed(table.key(slot), epoch, quality, tier, table.created[slot], table.nbytes[slot])
            )
        slot += 1
    return found, slot if slot < table.n_slots else 0
