"""A process that reads an arena through a descriptor for a while, and prints what it got.

    python -m tests.kvstore.transport.shm.hammer DESCRIPTOR NBYTES SLOTS

The frame of slot s is of generation s + 1 and consists of that number.
"""

from __future__ import annotations

import mmap
import sys
import time
from collections import Counter

import numpy as np

from kvstore.nouns import BlockRef, Incarnation, MissReason, ShardId
from kvstore.tiers.arena import Geometry
from kvstore.transport.landing import Landing
from kvstore.transport.shm.reader import ArenaReader

SLOTS = 4
NBYTES = 300 << 10
NOBODY = 999
HEADER_NBYTES = 256
FOR_S = 1.0


def filled(room: memoryview, number: int) -> memoryview:
    np.frombuffer(room, dtype="<u4")[:] = number
    return room


def main(descriptor: int, nbytes: int, slots: int) -> None:
    mapped = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    reader = ArenaReader(mapped, Geometry(nbytes, slots), Incarnation(1))
    refs = [BlockRef(ShardId("s"), Incarnation(1), slot, slot + 1) for slot in range(SLOTS)]
    buffers = [np.zeros(NBYTES - HEADER_NBYTES, dtype=np.uint8) for _ in refs]
    counts: Counter[str] = Counter(wrong=0, stale=0, right=0)
    end = time.monotonic() + FOR_S
    while time.monotonic() < end:
        landing = Landing([buffer.data for buffer in buffers])
        asked = reader.read_into(refs, landing, range(SLOTS))
        counts["asked"] += len(asked)
        for slot in set(range(SLOTS)) - set(asked):
            whole = np.concatenate([landing.headers[slot], buffers[slot]]).view("<u4")
            counts[_judged(landing.misses[slot], whole, slot + 1)] += 1
        for ref in refs:
            one = reader.read(ref)
            counts["asked" if one is None else _judged(one, one, ref.generation)] += 1
    print(*(f"{name}={count}" for name, count in counts.items()))


def _judged(got: object, whole: object, number: int) -> str:
    if isinstance(got, MissReason):
        return "stale"
    assert isinstance(whole, np.ndarray)
    return "right" if (whole.view("<u4") == number).all() else "wrong"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
