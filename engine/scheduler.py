"""Which sequences compute how many tokens in the next step, and who gives its blocks back.

A row of every decoding sequence, then chunks of prompts within what is left of the budget (Agrawal et al.
2024, "Sarathi-Serve": prompts ride along with running sequences), each in the order of (priority, arrival).
A chunk takes the slots it writes to, no more. Who finds none is left out; if slots were the reason, those who
are last in that order leave, until what they held is enough. So the first in order always goes on, and with
it, one after another, all.

A prompt whose next block another one computes in the same step waits for it (engine/sharing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from engine.batch import Chunk
from engine.sequence import Sequence
from engine.sharing import waits_for
from engine.types import Shortage

__all__ = ["Plan", "choose_victims", "plan_step"]


@dataclass(slots=True)
class Plan:
    """`left_out` found no slot, though they had their turn; `slots` is what they and the chunks want."""

    chunks: list[Chunk] = field(default_factory=list)
    left_out: list[Sequence] = field(default_factory=list)
    slots: int = 0
    taken: int = 0  # by the chunks, of the free ones

    def shortage(self, free_slots: int) -> Shortage | None:
        if self.slots <= free_slots:
            return None
        return Shortage(self.slots - free_slots, min((s.order for s in self.left_out), default=None))


def plan_step(
    sequences: Iterable[Sequence],
    budget: Callable[[int], int],
    block_tokens: int,
    free_slots: int,
    is_shared: Callable[[int], bool],
) -> Plan:
    """`budget` says how many rows prompts may have beside so many decoding ones."""
    plan = Plan()
    running = sorted((s for s in sequences if not s.parked), key=lambda sequence: sequence.order)
    decoding = [sequence for sequence in running if sequence.pending == 1]
    for sequence in decoding:
        _place(plan, sequence, 1, block_tokens, free_slots, is_shared)
    rows_left = budget(len(decoding))
    for sequence in running:
        if sequence.pending == 1 or rows_left <= 0:
            continue
        if waits_for(sequence, plan.chunks, block_tokens):
            continue
        rows = min(sequence.pending, rows_left)
        _place(plan, sequence, rows, block_tokens, free_slots, is_shared)
        if plan.chunks and plan.chunks[-1].sequence is sequence:
            rows_left -= plan.chunks[-1].rows
    return plan


def _place(
    plan: Plan,
    sequence: Sequence,
    rows: int,
    block_tokens: int,
    free_slots: int,
    is_shared: Callable[[int], bool],
) -> None:
    """Chunk as many of `rows` as find slots, or leave the sequence out."""
    copied = sequence.writes_to_shared(block_tokens, is_shared)
    wanted = max(0, sequence.slots_for(rows, block_tokens)) + copied
    plan.slots += wanted
    free_slots -= plan.taken
    if wanted > free_slots:
        held = (len(sequence.slots) + free_slots - copied) * block_tokens - sequence.computed
        rows = min(rows, held) if free_slots >= copied else 0
    if rows > 0:
        plan.chunks.append(Chunk(sequence, rows))
        plan.taken += min(wanted, free_slots)
    else:
        plan.left_out.append(sequence)


def choose_victims(
    sequences: Iterable[Sequence],
    left_out: Seq[Sequence],
    needs: Callable[[Sequence], int],
    free_slots: int,
    leave: Callable[[Sequence], int],
) -> list[Sequence]:
    """Who leaves, from the last in order on, so that all of `left_out` that stay find their slots. `leave` is
    told each and says how many slots that frees; `needs` counts with who has left. The last one left has none
    to wait for: what it lacks is held by nobody who runs, and it leaves too."""
    running = sorted((s for s in sequences if not s.parked), key=lambda sequence: sequence.order)
    staying = list(left_out)
    victims: list[Sequence] = []
    while staying and free_slots < sum(map(needs, staying)):
        victim = running.pop()
        victims.append(victim)
        free_slots += leave(victim)
        if victim in staying:
            staying.remove(victim)
    return victims
