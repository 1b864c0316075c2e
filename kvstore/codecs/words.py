"""Bits of many bytes at once: masks and shifts on words of up to 64 bits that are really bytes.

numpy works through words at the pace of bytes or faster (a mask over 92,160 bytes: 14 us as bytes, 4 as
words of 64 bits), so fields of codes are cut out of eight bytes with one operation. Byte order does not
matter: no bit that a mask lets through has left its byte.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.unsignedinteger[Any]]


def words(data: Bytes, run: int) -> Words:
    """A view of aligned bytes whose last axis is contiguous, by the widest word that divides `run`."""
    nbytes = next(nbytes for nbytes in (8, 4, 2, 1) if run % nbytes == 0)
    return data.view(f"u{nbytes}")


def in_each_byte(value: int, of: Words) -> Any:
    """A scalar of the words' type."""
    return _repeated(value, of.dtype)


@functools.cache
def _repeated(value: int, dtype: np.dtype[Any]) -> Any:
    return dtype.type(int.from_bytes(bytes([value]) * dtype.itemsize, "little"))


def field(of: Words, up: int, mask: int) -> Words:
    """Every byte moved up by so many bits (down, if negative), under the mask. Bits that come from the byte
    beside it must not be in the mask."""
    moved = of << up if up > 0 else of >> -up if up < 0 else of
    cut: Words = moved & in_each_byte(mask, of)
    return cut


def fields(of: Words, bits: int) -> Words:
    """Every byte's fields of so many bits, lowest first: [field, *shape], each in a byte's lowest bits."""
    downs = np.arange(0, 8, bits, dtype=of.dtype).reshape(-1, *[1] * of.ndim)
    cut = of >> downs
    cut &= in_each_byte((1 << bits) - 1, of)
    return cut
