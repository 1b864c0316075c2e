"""The storage seam of a tier: where bytes lie, and nothing about versions, leases or keys.

Real tiers, the tests' crashing ones and the simulator's all obey it. Bytes are addressed by slot *and*
generation: a write that comes late, for a slot that was given to somebody else meanwhile, can neither be
read nor discarded under the new owner's name. A place holds one whole frame.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from kvstore.nouns import BlockRef, Tier


class Place(NamedTuple):
    slot: int
    generation: int


def place_of(ref: BlockRef) -> Place:
    """Where a shard's own reference points."""
    return Place(ref.slot, ref.generation)


class TierStorage(Protocol):
    """All methods may be called on one event loop only. I/O that fails raises OSError."""

    @property
    def tier(self) -> Tier: ...

    def allocate(self, nbytes: int) -> memoryview:
        """Room for one frame, writable, of unknown content: for `write`, or for `give_up`. Never fails."""
        ...

    def give_up(self, frame: memoryview) -> None:
        """What was allocated will not be written after all. Nobody may be writing into it any more."""
        ...

    async def write(self, place: Place, frame: memoryview) -> None:
        """Keep `frame` under `place`; the storage owns the buffer from here on, also when this raises.

        Copies nothing if `allocate` gave the buffer.
        """
        ...

    async def read(self, place: Place) -> memoryview | None:
        """A copy that the caller owns, or None when the place holds nothing (any more).

        The place may be discarded while the bytes are copied: the caller checks its reference again.
        """
        ...

    async def borrow(self, place: Place) -> memoryview | None:
        """The frame itself, to be read only, until `give_back`: it stays what it is even if its place is
        discarded meanwhile. None when the place holds nothing."""
        ...

    def give_back(self, frame: memoryview) -> None:
        """Once for each `borrow`, with what it answered."""
        ...

    def discard(self, place: Place) -> None:
        """Forget the place's bytes. Idempotent; never touches another generation's."""
        ...

    def leave(self, place: Place) -> None:
        """As `discard`, but the version lives on, on another tier: who reads past the shard must ask it."""
        ...

    async def sync(self) -> None:
        """What was written before survives from here on, where the tier can promise that."""
        ...

    def nbytes(self) -> int:
        """Bytes of frames held now."""
        ...


@runtime_checkable
class Breakable(Protocol):
    """What a tier may offer besides, to tests and the demo's negative control."""

    def flip_byte(self, place: Place, offset: int) -> bool:
        """Flip one bit of the byte at `offset` of the stored frame. False when the place holds nothing."""
        ...


@runtime_checkable
class Compactable(Protocol):
    """What a tier may offer besides: to be tidied up in the gaps."""

    async def compact(self, nbytes_max: int) -> int:
        """Move stored frames to where they are read fastest, at most so many bytes; how many it was."""
        ...
