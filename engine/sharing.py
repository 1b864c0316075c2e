"""One block computed once: sequences whose next tokens are the same, behind the same blocks.

    a   [ s0 ][ s1 ][ computing 2 ...         b waits while a step computes the block for a,
    b   [ s0 ][ s1 ][ same tokens ...         then takes the slot over: one more user of it

    a   [ s0 ][ s1 ][ s2: prompt's end, answer ...
    b   [ s0 ][ s1 ][ s2: prompt's end | ^    nothing is left to compute but its last token: b takes the part
                                         |    over that is the same, and copies it before it writes there

So a fork (several answers to one prompt) is nothing but an admission of the same tokens. "The same blocks" is
meant physically: the slot before is the same one, or there is none. Then everything before is the same too,
and with it all that a lineage says of it. Only blocks that were computed here from their first token on are
taken over: what was onboarded is what its owner read it as (docs/design.md 9.4). Never across tenants, nor
from or by a sequence that may not share (`Sequence.shares`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from engine.batch import Chunk
from engine.sequence import Sequence

__all__ = ["Ready", "ready_part", "waits_for"]


class Ready(NamedTuple):
    """The next `tokens` tokens lie in `slot`, computed by another."""

    slot: int
    tokens: int


def waits_for(sequence: Sequence, chunks: Iterable[Chunk], block_tokens: int) -> bool:
    """Does a chunk of this step compute what `sequence` would compute next?"""
    wanted = _next_part(sequence, block_tokens)
    return wanted > 0 and any(_computes(chunk.sequence, sequence, wanted, block_tokens) for chunk in chunks)


def ready_part(sequence: Sequence, others: Iterable[Sequence], block_tokens: int) -> Ready | None:
    """What one of `others` has computed of the block that `sequence` would compute next: all that it wants of
    it, or None."""
    wanted = _next_part(sequence, block_tokens)
    if not wanted:
        return None
    end = sequence.computed + wanted
    for other in others:
        if other.computed >= end and _computes(other, sequence, wanted, block_tokens):
            return Ready(other.slots[sequence.computed // block_tokens], wanted)
    return None


def _next_part(sequence: Sequence, block_tokens: int) -> int:
    """Tokens it wants of the block it stands right before: all it knows but the last, which it draws from."""
    index, inside = divmod(sequence.computed, block_tokens)
    if not sequence.shares or sequence.parked or inside or len(sequence.slots) != index:
        return 0
    return min(block_tokens, sequence.pending - 1)


def _computes(other: Sequence, sequence: Sequence, wanted: int, block_tokens: int) -> bool:
    """Is it the same part of the same block that `other` has computed or will?"""
    begin = sequence.computed
    index = begin // block_tokens
    if other is sequence or not other.shares or not other.computed_from <= index <= len(other.slots):
        return False
    if other.request.tenant != sequence.request.tenant:
        return False
    if index and other.slots[index - 1] != sequence.slots[index - 1]:
        return False
    return other.tokens[begin : begin + wanted] == sequence.tokens[begin : begin + wanted]
