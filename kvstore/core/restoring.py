"""A block that survived the shard's last life becomes a version of this one.

It is live at once, idle, and lies on the tier that kept it. Its epoch must be registered and not dropped, its
namespace open; the first of a (key, epoch, quality) wins, as ever. Cost: that of a commit.
"""

from __future__ import annotations

from kvstore.core.epochs import UNBOUND, EpochTable
from kvstore.core.index import Index
from kvstore.core.state import Offer
from kvstore.core.versions import NONE, WRITTEN
from kvstore.nouns import BlockMeta, BlockRef


def restore(index: Index, epochs: EpochTable, meta: BlockMeta, nbytes: int, revision: int) -> BlockRef | None:
    """Its reference from here on; None when nobody could ever see it, or there is no room for it."""
    space = index.spaces.get(meta.namespace)
    if space is None or space.namespace.layout.fingerprint != meta.fingerprint:
        return None
    epoch_id = epochs.id_of(space.namespace.model_id, meta.epoch)
    if epoch_id == UNBOUND or epochs.is_dropped(epoch_id):
        return None
    if index.nvme.lacks(nbytes) or not index.versions.has_room():
        return None
    table = index.versions
    known = index.chain(space, space.heads.get(meta.key, NONE))
    if any(table.epochs[slot] == epoch_id and table.qualities[slot] == meta.quality for slot in known):
        return None
    offer = Offer(meta.key, meta.parent, meta.chain_index, meta.placement, nbytes)
    slot = index.stage(space, epoch_id, meta.quality, offer, index.nvme)
    table.written[slot] |= WRITTEN
    index.pin(space, (slot,))
    index.publish(slot, revision)
    index.unpin((slot,))
    return index.ref(slot)
