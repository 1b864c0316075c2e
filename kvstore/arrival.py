"""What arrives at a shard, or is suspected there: copied, then verified in the copy.

Runs in threads and touches nothing shared. Costs a copy and one xxh3 pass: about 0.3 ms for 1.5 MB.
Whatever the bytes are, the answer is a value: a refusal that says what is wrong, never an exception.
"""

from __future__ import annotations

from kvstore.codecs.frames import is_true_to_codec
from kvstore.errors import CorruptBlock
from kvstore.frame import decode_frame
from kvstore.nouns import BlockMeta, KVLayout, MissReason, Refusal
from kvstore.tiers.base import TierStorage
from kvstore.tiers.copying import fill, to_its_end


async def arrive(
    storage: TierStorage, header: bytes, payload: memoryview, expected: BlockMeta, layout: KVLayout
) -> tuple[Refusal | None, memoryview]:
    """A frame in room of the storage's own, to be written there; or why it is not the one expected, and the
    room was given up."""
    room = storage.allocate(len(header) + payload.nbytes)
    refusal = await to_its_end(
        room.nbytes,
        lambda: copy_and_verify(room, header, payload, expected, layout),
        lambda: storage.give_up(room),
    )
    if refusal is not None:
        storage.give_up(room)
    return refusal, room


def copy_and_verify(
    room: memoryview, header: bytes, payload: memoryview, expected: BlockMeta, layout: KVLayout
) -> Refusal | None:
    """Copy a frame into `room`, then say why what stands there is not the one expected (None: it is).

    Encoded by a codec it must be what that codec makes of the layout: its size, digest and quality.
    """
    fill(room, header, payload)
    try:
        frame, _ = decode_frame(room)
    except CorruptBlock as error:
        return Refusal.CHECKSUM if error.reason is MissReason.CHECKSUM else Refusal.BAD_HEADER
    as_expected = frame.meta == expected and is_true_to_codec(frame, layout)
    return None if as_expected else Refusal.MISMATCH


def is_frame_of(frame: memoryview, expected: BlockMeta) -> bool:
    """Does the frame say of its payload what is true, and is it the block that should lie there?"""
    try:
        found, _ = decode_frame(frame)
    except CorruptBlock:
        return False
    return found.meta == expected
