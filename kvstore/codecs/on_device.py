"""Codecs on a GPU: the same bytes as on the CPU, from Triton (an extra: `pip install triton`).

A block that lies on a device is encoded and decoded there, so that a quarter of its bytes cross the bus.
Costs one or two launches a block. Bits are held equal to the CPU's in Triton's interpreter; on CUDA they,
and speed, have not been measured yet.

How it fails: ConfigError without triton, or for a head_dim or block_tokens that is no power of two;
`encode` answers None for KV that is to stay lossless; `decode` trusts its bytes: what came over a wire is
checked on the CPU first (`Codec.decode` raises, this does not).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvstore.codecs import Codec, channel_keys
from kvstore.codecs.base import elements
from kvstore.codecs.exact import is_encodable, the_torch
from kvstore.codecs.fp8 import Fp8
from kvstore.codecs.int4 import Int4
from kvstore.codecs.int4_hadamard import Int4Hadamard
from kvstore.codecs.int8 import Int8
from kvstore.codecs.k4v4 import K4V4
from kvstore.errors import ConfigError
from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    from torch import Tensor

_ROWS: Final = 16  # of a program


def encode(codec: Codec, layout: KVLayout, kv: Tensor) -> Tensor | None:
    """uint8 [encoded_nbytes] on the device of `kv`, a contiguous block of the layout's dtype there."""
    torch = the_torch()
    if not is_encodable(kv.abs().amax()):
        return None
    encoded: Tensor = torch.empty(codec.encoded_nbytes(layout), dtype=torch.uint8, device=kv.device)
    _run(codec, layout, kv, encoded, decoding=False)
    return encoded


def decode(codec: Codec, layout: KVLayout, encoded: Tensor, out: Tensor) -> None:
    """Fill `out`, a contiguous block of the layout's dtype on the device of `encoded`."""
    _run(codec, layout, out, encoded, decoding=True)


def _run(codec: Codec, layout: KVLayout, kv: Tensor, encoded: Tensor, *, decoding: bool) -> None:
    codec.check(layout)
    rows_of_tiles = layout.head_dim, layout.block_tokens
    if any(size & (size - 1) for size in rows_of_tiles):
        raise ConfigError(f"Triton's tiles need powers of two, not head_dim, block_tokens {rows_of_tiles}")
    if isinstance(codec, Int8 | Fp8 | Int4):
        _run_rows(codec, layout, kv, encoded, decoding)
    elif isinstance(codec, K4V4):
        _run_split(codec, layout, kv, encoded, decoding)
    else:
        raise ConfigError(f"codec {codec.name} has no kernels: encode it on the CPU")


def _run_rows(
    codec: Int8 | Fp8 | Int4, layout: KVLayout, kv: Tensor, encoded: Tensor, decoding: bool
) -> None:
    from kvstore.codecs import triton_rows as kernels

    torch = the_torch()
    rows = elements(layout) // layout.head_dim
    shorts = encoded[: 4 * rows if isinstance(codec, Int4) else 2 * rows].view(torch.int16)
    sizes: dict[str, Any] = {"D": layout.head_dim, "R": _ROWS, "enable_fp_fusion": False}
    if isinstance(codec, Int4):
        flag, kernel = {"ROTATE": isinstance(codec, Int4Hadamard)}, "nibbles"
        steps = 15
    else:
        flag, kernel = {"FP8": isinstance(codec, Fp8)}, "bytes"
        steps = 448 if isinstance(codec, Fp8) else 127
    grid = (-(-rows // _ROWS),)
    if decoding:
        getattr(kernels, f"decode_{kernel}")[grid](encoded, shorts, kv, rows, **sizes, **flag)
        return
    share = float(np.float32(1) / np.float32(steps))
    getattr(kernels, f"encode_{kernel}")[grid](kv, encoded, shorts, rows, share, **sizes, **flag)


def _run_split(codec: K4V4, layout: KVLayout, kv: Tensor, encoded: Tensor, decoding: bool) -> None:
    from kvstore.codecs import triton_split as kernels

    torch = the_torch()
    heads, rows = layout.layers * layout.kv_heads, elements(layout) // (2 * layout.head_dim)
    border = channel_keys.nbytes(layout)
    keys, values = encoded[:border], encoded[border:]
    key_shorts, value_shorts = keys[: 6 * heads].view(torch.int16), values[: 2 * rows].view(torch.int16)
    lent = layout.head_dim * channel_keys.LENT[0] // channel_keys.LENT[1]
    of_keys: dict[str, Any] = {
        "H": layout.kv_heads,
        "T": layout.block_tokens,
        "D": layout.head_dim,
        "LENT": lent,
        "enable_fp_fusion": False,
    }
    of_values: dict[str, Any] = {
        "LAYER_ROWS": layout.block_tokens * layout.kv_heads,
        "D": layout.head_dim,
        "R": _ROWS,
        "BITS": codec.levels.bits,
        "enable_fp_fusion": False,
    }
    grid = (-(-rows // _ROWS),)
    if decoding:
        kernels.decode_keys[(heads,)](keys, key_shorts, kv, heads, **of_keys)
        alpha = codec.levels.alpha
        kernels.decode_values[grid](values, value_shorts, kv, rows, alpha, **of_values)
        return
    reaches = codec.levels.reaches
    targets = torch.tensor([codec.levels.targets(k) for k in reaches], dtype=torch.int32, device=kv.device)
    per_amax = torch.tensor([codec.levels.per_amax(k) for k in reaches], device=kv.device)
    kernels.encode_keys[(heads,)](kv, keys, key_shorts, heads, **of_keys)
    kernels.encode_values[grid](
        kv, values, value_shorts, targets, per_amax, rows, **of_values, REACHES=len(reaches)
    )
