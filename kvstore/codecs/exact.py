"""Arithmetic that comes out alike everywhere: what every scalar codec's formulas are made of.

Scales are *short floats*: the upper 16 bits of a float32 (8 significant bits), always rounded up, so that
nothing clips. A code has at most 16 significant bits, hence code times scale is exact in float32. A scale is
undone by multiplying with its correctly rounded reciprocal, never by dividing. Triton's kernels
(`triton_exact.py`) do the same in the same order; tests hold the two against each other bit for bit.

torch is imported when something is encoded or decoded, not before.
"""

from __future__ import annotations

import functools
import importlib.util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvstore.codecs.base import ENCODABLE_MAX, ENCODABLE_MIN
from kvstore.errors import ConfigError, CorruptBlock
from kvstore.nouns import KVLayout, MissReason

if TYPE_CHECKING:
    from torch import Tensor

_UP: Final = 0xFFFF
_STORED_MAX: Final = 0x7480  # 2**106: nothing that was encoded needs more, and times any code it is finite
_FLOAT16_MAX: Final = 65504.0


def the_torch() -> Any:
    """torch, imported now. Raises ConfigError where it is not installed."""
    try:
        import torch
    except ImportError:
        raise ConfigError("lossy codecs need torch: pip install torch, or keep every tier lossless") from None
    return torch


@functools.cache
def can_decode() -> bool:
    """Whether this installation has what lossy codecs need. Imports nothing."""
    return importlib.util.find_spec("torch") is not None


def bytes_of(buffer: memoryview) -> Tensor:
    """The buffer's bytes as uint8, without a copy. Of a read-only one: not to be written, and torch, which
    knows no such thing, is not told."""
    flat = np.frombuffer(buffer, dtype=np.uint8)
    if not flat.flags.writeable:
        interface = dict(flat.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        flat = np.asarray(SimpleNamespace(__array_interface__=interface, owner=flat))
    tensor: Tensor = the_torch().from_numpy(flat)
    return tensor


def kv_of(buffer: memoryview, layout: KVLayout) -> Tensor:
    """A block's bytes as [layer, k and v, token, kv_head, head_dim] of its dtype, without a copy."""
    torch = the_torch()
    shape = (layout.layers, 2, layout.block_tokens, layout.kv_heads, layout.head_dim)
    return bytes_of(buffer).view(getattr(torch, layout.dtype)).view(shape)


def new_bytes(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.empty(nbytes, dtype=np.uint8)


def is_encodable(amax: Tensor) -> bool:
    """Whether the greatest magnitudes (of everything) are numbers that formulas hold for; NaN is not."""
    return bool((amax <= ENCODABLE_MAX).all())


def scales(ranges: Tensor, steps: int) -> Tensor:
    """Short floats: `ranges` (float32, not negative) divided into `steps`, rounded up; 0 for what is below
    ENCODABLE_MIN."""
    one = np.float32(1) / np.float32(steps)
    return short_above(the_torch().where(ranges < ENCODABLE_MIN, 0.0, ranges) * float(one))


def short_above(values: Tensor) -> Tensor:
    """The least short floats that are not below `values` (float32, not negative)."""
    int32, float32 = the_torch().int32, the_torch().float32
    return ((values.contiguous().view(int32) + _UP) & ~_UP).view(float32)


def short_below(values: Tensor) -> Tensor:
    """The greatest short floats that are not above `values`; 0 for magnitudes below ENCODABLE_MIN."""
    torch = the_torch()
    bits = torch.where(values.abs() < ENCODABLE_MIN, 0.0, values).contiguous().view(torch.int32)
    below: Tensor = (torch.where(bits < 0, bits + _UP, bits) & ~_UP).view(torch.float32)
    return below


def reciprocals(of: Tensor) -> Tensor:
    """1 / scale, correctly rounded; 0 for 0."""
    inverse: Tensor = the_torch().where(of > 0, of.reciprocal(), 0.0)
    return inverse


def store_short(values: Tensor, into: Tensor) -> None:
    """Write short floats as int16, their upper halves: exact, for the lower ones are zero."""
    into.copy_((values.view(the_torch().int32) >> 16).to(into.dtype))


def load_short(stored: Tensor, name: str, *, signed: bool = False) -> Tensor:
    """float32 of what `store_short` wrote (int16). Raises CorruptBlock for what no encoder writes: NaN,
    infinities, magnitudes beyond `_STORED_MAX`, and negative ones where there can be none."""
    halves = stored.numpy().view(np.uint16)  # a negative one is a great number here
    if int((halves & 0x7FFF if signed else halves).max()) > _STORED_MAX:
        raise CorruptBlock(MissReason.BAD_HEADER, f"{name}: a scale that no encoder writes")
    loaded: Tensor = the_torch().from_numpy((halves.astype(np.uint32) << 16).view(np.float32))
    return loaded


def float32_room(target: Tensor) -> Tensor:
    """Where float32 is worked out before it is rounded to `target`'s dtype: in place, if that is float32
    (a copy less, of two)."""
    torch = the_torch()
    if target.dtype is torch.float32:
        return target
    room: Tensor = torch.empty(target.shape)
    return room


def multiplied(values: Tensor, scale: Tensor, target: Tensor) -> None:
    """Settle `values` (float32, which may be lost) times `scale` in the target, of the same shape."""
    if target.dtype is the_torch().float32:
        the_torch().mul(values, scale, out=target)  # a pass less
    else:
        settle(values.mul_(scale), target)


def settle(values: Tensor, target: Tensor) -> None:
    """Round what was worked out in `float32_room`. Beyond float16's greatest becomes its greatest."""
    if values is target:
        return
    if target.dtype is the_torch().float16:
        values.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
    target.copy_(values)
