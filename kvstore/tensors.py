"""KV as arrays of whole sequences, and as the blocks a store holds.

    an array    [layer][k,v][token][kv_head][head_dim]     of one sequence, numpy or torch
    a block     the same for `block_tokens` tokens, contiguous bytes

numpy has no bfloat16: there an array of it is uint16, the same bits (ml_dtypes' bfloat16 is taken too). torch
is imported when a tensor is given or asked for, not before. Costs one copy each way, bit for bit.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstore.nouns import KVLayout

if TYPE_CHECKING:
    import torch

Framework = Literal["numpy", "torch"]
KVArray: TypeAlias = "NDArray[Any] | torch.Tensor"

_NUMPY_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


class Shape(NamedTuple):
    layers: int
    k_and_v: int
    tokens: int
    kv_heads: int
    head_dim: int


def shape_of(layout: KVLayout, tokens: int) -> Shape:
    return Shape(layout.layers, 2, tokens, layout.kv_heads, layout.head_dim)


def bits_of(kv: KVArray, layout: KVLayout, tokens: int) -> NDArray[Any]:
    """A view (a copy, for a tensor on a device) as numpy of the layout's dtype, bfloat16 as uint16.

    Raises ValueError for an array of another shape or dtype: nothing is cast, padded or cut in silence.
    """
    if _is_tensor(kv):
        array, dtype = _bits_of_tensor(kv)
    else:
        array = np.asarray(kv)
        dtype = array.dtype.name
        if dtype in ("bfloat16", "uint16") and layout.dtype == "bfloat16":
            array, dtype = array.view(np.uint16), "bfloat16"
    if dtype != layout.dtype:
        raise ValueError(f"kv is {dtype}, the namespace's layout says {layout.dtype}: cast it first")
    wanted = shape_of(layout, tokens)
    if array.shape != wanted:
        raise ValueError(
            f"kv has shape {list(array.shape)}, {tokens} tokens need {list(wanted)}: "
            "[layer][k,v][token][kv_head][head_dim]"
        )
    return array


def blocks_of(bits: NDArray[Any], layout: KVLayout) -> list[memoryview]:
    """A contiguous copy of each whole block, as uint8."""
    size = layout.block_tokens
    starts = range(0, bits.shape[2] // size * size, size)
    return [
        np.ascontiguousarray(bits[:, :, start : start + size]).reshape(-1).view(np.uint8).data
        for start in starts
    ]


def empty_bits(layout: KVLayout, tokens: int) -> NDArray[Any]:
    return np.empty(shape_of(layout, tokens), dtype=_NUMPY_DTYPES[layout.dtype])


def put_block(bits: NDArray[Any], layout: KVLayout, index: int, payload: memoryview) -> None:
    """Copy a block's payload to where its tokens are, `index` counting the array's own blocks."""
    size = layout.block_tokens
    block = np.frombuffer(payload, dtype=bits.dtype).reshape(shape_of(layout, size))
    bits[:, :, index * size : (index + 1) * size] = block


def as_framework(bits: NDArray[Any], layout: KVLayout, framework: Framework) -> KVArray:
    """The array itself, or a torch tensor on the CPU that shares its memory. Raises ImportError."""
    if framework == "numpy":
        return bits
    try:
        import torch
    except ImportError:
        raise ImportError('framework="torch" needs torch: pip install torch, or take numpy') from None
    if layout.dtype == "bfloat16":
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(bits)


def _is_tensor(kv: object) -> bool:
    torch = sys.modules.get("torch")  # who holds a tensor has imported it
    return torch is not None and isinstance(kv, torch.Tensor)


def _bits_of_tensor(kv: Any) -> tuple[NDArray[Any], str]:
    import torch

    held = kv.detach().cpu()
    dtype = str(held.dtype).removeprefix("torch.")
    if held.dtype is torch.bfloat16:
        return held.contiguous().view(torch.int16).numpy().view(np.uint16), dtype
    return held.numpy(), dtype
