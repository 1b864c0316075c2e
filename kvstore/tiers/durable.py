"""The seam of a tier that survives: storage, and a journal of what makes its blocks mean something.

A frame says of itself which block it is, but not whose namespace it is of, which weights an epoch's number
stands for, nor that somebody purged it. Those facts are *notes*, kept in the order in which they were taken.
What was synced or noted before a crash is there after it; what was not may be there or not, whole or not at
all. A purge counts for blocks written before it and not for those written after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.frame import Frame
from kvstore.nouns import BlockKey, Epoch, EpochPolicy, KVLayout, NamespaceId
from kvstore.tiers.base import Place, TierStorage


@dataclass(frozen=True, slots=True)
class NamespaceNote:
    """A namespace was opened on this shard."""

    id: NamespaceId
    model_id: str
    tenant: str
    layout: KVLayout


@dataclass(frozen=True, slots=True)
class EpochNote:
    """A number of a model was bound to weights, for ever."""

    model_id: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class AdvanceNote:
    """An epoch was made the current one of its model."""

    model_id: str
    number: int
    policy: EpochPolicy


@dataclass(frozen=True, slots=True)
class PurgeNote:
    """What was written before it of this scope is dead for ever; None: all keys, all epochs."""

    namespace: NamespaceId
    keys: tuple[BlockKey, ...] | None
    epoch: int | None


Note = NamespaceNote | EpochNote | AdvanceNote | PurgeNote


@dataclass(frozen=True, slots=True)
class RecoveredBlock:
    """A whole frame that was found at start. `record` names it until it is adopted."""

    record: int
    frame: Frame
    nbytes: int  # of the whole frame


@dataclass(frozen=True, slots=True)
class Recovered:
    """What survived. Purges are applied already; `notes` are the other three kinds, in their order."""

    notes: Sequence[NamespaceNote | EpochNote | AdvanceNote]
    """Without those that later ones replaced, and without namespaces of which nothing is left where a tier
    forgets them: what is not here is not kept, and is to be noted again."""
    blocks: Sequence[RecoveredBlock]  # in the order in which they were first written
    counters: dict[str, int]  # what was torn, corrupt or dead, by kind


class DurableTier(TierStorage, Protocol):
    """All methods may be called on one event loop only. I/O that fails raises OSError.

    `write` only queues a frame: it can be read at once, and counts as kept when a `sync` that began after it
    has returned. A sync that raises has forgotten every frame that was not kept before: their places hold
    nothing. So has a failure between two syncs, and the next sync raises it. A write that raises (OSError:
    no room in time; CorruptBlock: no frame) holds nothing either.

    A write's place in the order of purges is taken when it is called: ask whether the block was purged in the
    same step, without an await between.
    """

    async def recover(self) -> Recovered:
        """Read what is there. To be called once, before anything else.

        What it answers is durable and was whole as far as a crash goes; bits that rot are left to readers. Of
        several records of one block the last one counts. Raises ConfigError for what is not ours to read.
        """
        ...

    def adopt(self, record: int, place: Place) -> None:
        """A recovered block's name from here on. What is not adopted before the first write is dead.

        Once for each record, and each place once; dead is not purged: it may be recovered again.
        """
        ...

    async def note(self, note: Note) -> None:
        """Durable when this returns. One that raises may be there after a crash or not."""
        ...

    def room_nbytes(self) -> int:
        """Bytes of frames that may be held: the disks' budget less what reclaiming needs to work with.

        It moves with what frames waste on disk, so ask again now and then. A tier that holds more refuses
        writes (ENOSPC) when it cannot reclaim enough.
        """
        ...

    async def close(self) -> None:
        """End what runs in the background. What was synced stays."""
        ...
