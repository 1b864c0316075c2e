"""What a shard was told that must outlive it: noted on the tier that survives, before anybody is answered.

Without such a tier there is nothing to outlive, and nothing is noted. What is kept already costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.errors import Unavailable
from kvstore.nouns import ShardId
from kvstore.tiers.durable import AdvanceNote, DurableTier, Note, PurgeNote


class Notes:
    def __init__(self, shard: ShardId, durable: DurableTier | None) -> None:
        self._shard = shard
        self._durable = durable
        self._kept: dict[Note | str, Note] = {}

    def replayed(self, notes: Iterable[Note]) -> None:
        """These are kept since an earlier life of the shard."""
        for note in notes:
            self._kept[_name(note)] = note

    def lack(self, note: Note) -> bool:
        """Is there a tier to keep it, and is it not kept yet?"""
        return self._durable is not None and self._kept.get(_name(note)) != note

    async def keep(self, note: Note) -> None:
        """Durable when this returns. Raises Unavailable: the disk did not take it."""
        if self._durable is None or not self.lack(note):
            return
        try:
            await self._durable.note(note)
        except OSError as error:
            raise Unavailable(f"shard {self._shard} could not make it durable: {error}; try again") from error
        if not isinstance(note, PurgeNote):
            self._kept[_name(note)] = note


def _name(note: Note) -> Note | str:
    """What a later note of the same name takes the place of."""
    return note.model_id if isinstance(note, AdvanceNote) else note
