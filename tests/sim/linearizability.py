"""Is a history linearizable? A checker after Wing & Gong (1993), with Lowe's (2017) memory of what was tried.

One register is one (key, epoch) of one namespace on one incarnation of one shard. What it holds is the best
version that is visible, by its reference, or nothing. Operations, each at some one moment between its
invocation and its return (never, or any time after its invocation, if its outcome is unknown):

    WRITE v     a commit was answered v: the register held v, or holds it from then on
    WRITE ?     the same, but the answer was lost: any version that nobody else is known to have written
    READ v      a match (or a begin, answered EXISTS) saw v: the register holds it
    READ -      a match saw nothing of its least quality or better
    PURGE       holds nothing from then on
    DROP        the same, or nothing happens: the epoch may be newer than what was dropped

What is honest about it: a miss is legal. A version may vanish (evicted, expired, swept) at any moment, so
READ - is legal whatever is there, unless the version is *held*: somebody was told that it is pinned before
the operation began, and its lease surely stood when the operation ended. Nor may a held version give way to
another one that is not better. What vanished, gave way or was purged never comes back: a slot's next use is
another version. So the register forbids exactly this: a version seen that was never written, or not any
more, or before it was written; two versions seen alternately; and what is acknowledged and held, missing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from kvstore.nouns import BlockRef


class Kind(enum.Enum):
    WRITE = "write"
    READ = "read"
    PURGE = "purge"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Op:
    kind: Kind
    invoked: int
    returned: float  # inf: its outcome is unknown
    ended_s: float = inf  # when it returned: leases end on time
    version: BlockRef | None = None
    least: int = 0  # quality that a READ asked for


Held = Callable[[BlockRef, Op], bool]
State = tuple[BlockRef | None, frozenset[BlockRef]]
"""What the register holds, and what it will never hold again."""


@dataclass(frozen=True, slots=True)
class Register:
    """The specification. `qualities`: the best that was ever told of a version; `held`: see above."""

    held: Held
    qualities: Mapping[BlockRef, int]
    unclaimed: frozenset[BlockRef]  # seen, and no answered commit wrote it

    def after(self, state: State, op: Op) -> Iterator[State]:
        """The states the register may be in after the operation; none: it can't have happened here."""
        version, gone = state
        empty: State = (None, gone if version is None else gone | {version})
        if op.kind is Kind.PURGE or op.kind is Kind.DROP:
            yield empty
            if op.kind is Kind.DROP:
                yield state
        elif op.kind is Kind.READ:
            yield from self._after_read(state, empty, op)
        elif op.version is not None:
            yield from self._after_write(state, empty, op, op.version)
        else:
            for written in self.unclaimed:
                yield from self._after_write(state, empty, op, written)

    def _after_read(self, state: State, empty: State, op: Op) -> Iterator[State]:
        version = state[0]
        if op.version == version:
            yield state
        elif op.version is None and version is not None:
            if self.qualities.get(version, 0) < op.least:
                yield state
            if not (self.held(version, op) and self.qualities.get(version, 0) >= op.least):
                yield empty

    def _after_write(self, state: State, empty: State, op: Op, written: BlockRef) -> Iterator[State]:
        version, gone = state
        if written == version:
            yield state
        elif written not in gone:
            gives_way = version is None or not self.held(version, op)
            if gives_way or self.qualities.get(written, 0) > self.qualities.get(version, 0):  # type: ignore[arg-type]
                yield (written, empty[1])


def is_linearizable(history: Sequence[Op], held: Held, qualities: Mapping[BlockRef, int]) -> bool:
    """Is there an order of the operations, true to time, that the register could have answered in?"""
    ops = sorted(history, key=lambda op: op.invoked)
    seen = {op.version for op in ops if op.kind is Kind.READ and op.version is not None}
    written = {op.version for op in ops if op.kind is Kind.WRITE and op.version is not None}
    register = Register(held, qualities, frozenset(seen - written))
    must = sum(1 << i for i, op in enumerate(ops) if op.returned != inf)
    start: State = (None, frozenset())
    todo, tried = [(0, start)], {(0, start)}
    while todo:
        done, state = todo.pop()
        if done & must == must:
            return True
        # What returned first is tried first (it is pushed last): nearly always that is how it was.
        for i in sorted(_candidates(ops, done), key=lambda i: -ops[i].returned):
            for after in register.after(state, ops[i]):
                step = done | 1 << i, after
                if step not in tried:
                    tried.add(step)
                    todo.append(step)
    return False


def _candidates(ops: Sequence[Op], done: int) -> Iterator[int]:
    """Operations that may come next: begun before any other that is not done yet had returned."""
    first_return = inf
    found = []
    for i, op in enumerate(ops):
        if op.invoked > first_return:
            break
        if not done >> i & 1:
            found.append(i)
            first_return = min(first_return, op.returned)
    return iter(found)
