"""One block computed once: sequences whose next block has the same tokens behind the same blocks.

    a   [ s0 ][ s1 ][ computing 2 ...         b waits while a step computes the block for a,
    b   [ s0 ][ s1 ][ same tokens ...         then takes the slot over: one more user of it

"The same blocks" is meant physically: the slot before is the same one, or there is none. Then everything
before is the same too, and with it all that a lineage says of it. Only blocks that were computed here from
their first token on are taken over: what was onboarded is what its owner read it as (docs/design.md 9.4).
Never across tenants, nor from a sequence that may not share (`Sequence.shares`).
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.batch import Chunk
from engine.sequence import Sequence

__all__ = ["ready_block", "waits_for"]


def waits_for(sequence: Sequence, chunks: Iterable[Chunk], block_tokens: int) -> bool:
    """Does a chunk of this step compute the block that `sequence` would compute next?"""
    index = _next_block(sequence, block_tokens)
    return index is not None and any(
        _same_block(sequence, chunk.sequence, index, block_tokens) for chunk in chunks
    )


def ready_block(sequence: Sequence, others: Iterable[Sequence], block_tokens: int) -> int | None:
    """The slot in which one of `others` holds the block that `sequence` would compute next."""
    index = _next_block(sequence, block_tokens)
    if index is None:
        return None
    for other in others:
        done = other.computed >= (index + 1) * block_tokens
        if done and _same_block(sequence, other, index, block_tokens):
            return other.slots[index]
    return None


def _next_block(sequence: Sequence, block_tokens: int) -> int | None:
    """The block it stands right before and knows all tokens of, one more behind them to draw from."""
    index, inside = divmod(sequence.computed, block_tokens)
    if not sequence.shares or sequence.parked or inside or sequence.pending <= block_tokens:
        return None
    return index if len(sequence.slots) == index else None


def _same_block(sequence: Sequence, other: Sequence, index: int, block_tokens: int) -> bool:
    if other is sequence or not other.shares or index < other.computed_from:
        return False
    if other.request.tenant != sequence.request.tenant or len(other.slots) < index:
        return False
    if index and other.slots[index - 1] != sequence.slots[index - 1]:
        return False
    begin, end = index * block_tokens, (index + 1) * block_tokens
    return other.tokens[begin:end] == sequence.tokens[begin:end]
