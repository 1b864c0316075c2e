"""What becomes of the offers of a transaction: reserved at begin, landed at commit.

Reserve answers *exists* only for a visible version of the same epoch and at least the offered quality, never
for another transaction's staging, and pins it for the transaction's lease. The first commit of a (key, epoch,
quality) wins; a better quality retires the lesser ones at its own revision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from kvstore.core.epochs import EpochTable
from kvstore.core.holds import Holds
from kvstore.core.index import Index
from kvstore.core.retiring import Retiring
from kvstore.core.spaces import Space
from kvstore.core.state import Offer
from kvstore.core.transactions import Txn
from kvstore.core.versions import FORBIDDEN, NONE, WRITTEN, State
from kvstore.nouns import BlockKey, ChangeKind, Refusal

_LABEL = {reason: f"refusal:{reason.value}" for reason in Refusal}
_LIVE = int(State.LIVE)


class Offers:
    def __init__(
        self, index: Index, epochs: EpochTable, holds: Holds, retiring: Retiring, counters: Counter[str]
    ) -> None:
        self._index = index
        self._epochs = epochs
        self._holds = holds
        self._retiring = retiring
        self._counters = counters

    def reserve(self, txn: Txn, space: Space, epoch_id: int) -> None:
        """Fill the transaction's slots and refusals."""
        if self._epochs.is_dropped(epoch_id):
            txn.slots = [NONE] * len(txn.offers)
            txn.refused = dict.fromkeys(range(len(txn.offers)), Refusal.EPOCH)
        else:
            # Pins first: making room for one offer must evict none of the others.
            for i, offer in enumerate(txn.offers):
                live = self._live_rival(space, offer.key, epoch_id, txn.quality)
                if live != NONE:
                    self._holds.hold(txn.lease, space, live)
                    txn.refused[i] = Refusal.EXISTS
                txn.slots.append(live)
            for i, offer in enumerate(txn.offers):
                if txn.slots[i] == NONE:
                    self._reserve_one(txn, space, epoch_id, i, offer)
        for refusal in txn.refused.values():
            self._counters[_LABEL[refusal]] += 1

    def refuse(self, txn: Txn, i: int, refusal: Refusal) -> None:
        """Give up the staged slot of offer i."""
        self._counters[_LABEL[refusal]] += 1
        txn.refused[i] = refusal
        txn.staged.remove(i)
        slot, txn.slots[i] = txn.slots[i], NONE
        self._index.drop(slot)

    def drop_staged(self, txn: Txn) -> None:
        for i in sorted(txn.staged):
            self._index.drop(txn.slots[i])
        txn.staged.clear()

    def land(self, txn: Txn, i: int, space: Space, epoch_id: int, revision: int) -> int | Refusal:
        """Offer i at commit: the slot its block is readable in, or why it is not."""
        table, slot = self._index.versions, txn.slots[i]
        if slot == NONE:
            return txn.refused[i]
        if i not in txn.staged:  # it existed at begin, and may have been purged or found corrupt since
            if table.states[slot] == State.GONE:
                return Refusal.PURGED if table.written[slot] & FORBIDDEN else Refusal.CHECKSUM
            return Refusal.PURGED if self._index.is_dead(slot) else self._retained(txn, i, slot)
        refusal = None
        if table.written[slot] & FORBIDDEN:
            refusal = Refusal.PURGED
        elif self._epochs.is_dropped(epoch_id):
            refusal = Refusal.EPOCH
        elif not table.written[slot] & WRITTEN:
            refusal = Refusal.UNWRITTEN
        if refusal is not None:
            self.refuse(txn, i, refusal)
            return refusal
        txn.staged.remove(i)
        return self._publish(txn, i, space, epoch_id, revision)

    def written(self, txn: Txn, i: int, refusal: Refusal | None) -> None:
        table, slot = self._index.versions, txn.slots[i]
        if refusal is None:
            table.written[slot] |= WRITTEN
        elif not table.written[slot] & WRITTEN:  # a second copy, broken, takes nothing from the first
            self.refuse(txn, i, refusal)

    # -- inside ------------------------------------------------------------------------------------

    def _reserve_one(self, txn: Txn, space: Space, epoch_id: int, i: int, offer: Offer) -> None:
        index, account = self._index, space.account
        if offer.nbytes < 1:
            txn.refused[i] = Refusal.MISMATCH
        elif self._is_being_written(space, offer.key, epoch_id, txn.quality):
            txn.refused[i] = Refusal.STAGED
        elif account.used_nbytes - account.idle_nbytes + offer.nbytes > account.quota_nbytes:
            txn.refused[i] = Refusal.QUOTA
        elif not index.rooms.can_make_room(offer.nbytes):
            txn.refused[i] = Refusal.NO_SPACE
        else:
            while (victim := index.rooms.next_victim(account, offer.nbytes)) is not None:
                self._retiring.evict_from(index.host, victim)
            while (victim := index.rooms.next_slot_victim()) is not None:
                self._retiring.evict(victim)
            txn.slots[i] = index.stage(space, epoch_id, txn.quality, offer, index.host)
            txn.staged.add(i)

    def _publish(self, txn: Txn, i: int, space: Space, epoch_id: int, revision: int) -> int:
        slot, key = txn.slots[i], self._index.versions.key(txn.slots[i])
        winner = self._live_rival(space, key, epoch_id, txn.quality)
        if winner != NONE:
            self._holds.hold(txn.lease, space, winner)
            self._index.drop(slot)
            txn.slots[i] = winner
            return self._retained(txn, i, winner)
        for lesser in list(self._live(space, key, epoch_id)):
            self._retiring.retire(lesser, revision)
        self._holds.hold(txn.lease, space, slot)
        self._index.publish(slot, revision)
        self._retiring.tell(ChangeKind.COMMITTED, slot)
        self._counters["committed"] += 1
        return slot

    def _retained(self, txn: Txn, i: int, slot: int) -> int:
        """The slot of a block that was there already: it takes the offer's retention, if that says any."""
        if (retention := txn.offers[i].retention) is not None and self._index.is_live(slot):
            self._index.retain(slot, retention)
        return slot

    def _live(self, space: Space, key: BlockKey, epoch_id: int) -> Iterator[int]:
        table = self._index.versions
        for slot in self._index.chain(space, space.heads.get(key, NONE)):
            live = table.epochs[slot] == epoch_id and table.states[slot] == _LIVE
            if live and not self._index.is_dead(slot):
                yield slot

    def _live_rival(self, space: Space, key: BlockKey, epoch_id: int, quality: int) -> int:
        """What makes offering the key pointless: visible, of the same epoch, as good or better. Or NONE."""
        qualities = self._index.versions.qualities
        return next((s for s in self._live(space, key, epoch_id) if qualities[s] >= quality), NONE)

    def _is_being_written(self, space: Space, key: BlockKey, epoch_id: int, quality: int) -> bool:
        table = self._index.versions
        return any(
            table.epochs[s] == epoch_id and table.qualities[s] >= quality and not table.written[s] & FORBIDDEN
            for s in space.staged.get(key, ())
        )
