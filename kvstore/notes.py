"""What a shard was told that must outlive it: noted on the tier that survives, before anybody is answered.

Without such a tier there is nothing to outlive, and nothing is noted. What is kept already costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from kvstore.errors import Unavailable
from kvstore.nouns import ShardId
from kvstore.tiers.durable import AdvanceNote, DurableTier, Note, PurgeNote


class Notes:
    def __init__(self, shard: ShardId, durable: DurableTier | None) -> None:
        self._shard = shard
        self._durable = durable
        self._kept: dict[Note | str, Note] = {}
        self._owed: dict[str, list[AdvanceNote]] = {}  # by model, in their order: at most two
        self._paying = asyncio.Lock()

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

    async def advanced(self, model_id: str, note: AdvanceNote | None) -> None:
        """Keep it (None: the model went on since), and first what was not taken before: an advance that drops
        counts also below later ones. Raises Unavailable."""
        owed = self._owed.setdefault(model_id, [])
        if note is not None and (owed or self.lack(note)):
            # It takes the place of what it says as well: every older one, or those that drop nothing.
            owed[:] = [] if note.policy.drop_older else [o for o in owed if o.policy.drop_older]
            owed.append(note)
        async with self._paying:
            while owed:
                first = owed[0]
                await self.keep(first)
                if owed[:1] == [first]:
                    del owed[0]


def _name(note: Note) -> Note | str:
    """What a later note of the same name takes the place of."""
    return note.model_id if isinstance(note, AdvanceNote) else note
