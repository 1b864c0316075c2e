"""Payloads as a keyed function of what the block is: a wrong byte anywhere is found and named.

numpy alone: peers import this from an environment of their own. Costs about 0.5 ms a MiB.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

POISON = 0xA5  # what a reader's buffer holds before a read


class WrongBytes(Exception):
    """A store delivered bytes that are not the block's, or nothing where it must have the block."""


def payload(identity: bytes, nbytes: int) -> Bytes:
    """The bytes of the block called `identity`; `nbytes` must be a multiple of 8."""
    key = int.from_bytes(hashlib.sha256(identity).digest()[:16], "little")
    words: Any = np.random.Philox(key=key).random_raw(nbytes // 8)
    made: Bytes = words.view(np.uint8)
    return made


def check(who: str, name: str, got: Bytes, expected: Bytes) -> None:
    """Raises WrongBytes unless every byte of the block `name` is right."""
    if not np.array_equal(got.view(np.uint64), expected.view(np.uint64)):
        at = int(np.flatnonzero(got != expected)[0])
        raise WrongBytes(f"{who} delivered a wrong byte: block {name}, offset {at}")


def buffers(whole: Bytes, nbytes: int, count: int) -> list[Bytes]:
    """`count` blocks of a reader's memory, poisoned: what was right in the last round is wrong now."""
    whole[: nbytes * count] = POISON
    return [whole[i * nbytes : (i + 1) * nbytes] for i in range(count)]
