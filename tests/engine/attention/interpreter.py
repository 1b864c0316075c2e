"""Triton's interpreter, for attention's kernels: import this where TRITON_INTERPRET is set.

The interpreter keeps bfloat16 as its bits, and forgets that in two places: products multiply the bits, and
integers become bits that stand for something else. Here both are done on numbers. And its products are
BLAS's, where a row's bits depend on which row it is: here they are sums in one order, as a tensor core's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _numbers(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _dot(_: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right = (_numbers(one).astype(d.data.dtype) for one in (a, b))
    products = left[:, None, :] * np.ascontiguousarray(right.T)[None, :, :]
    return interpreter.TensorHandle(products.sum(-1) + d.data, d.dtype.scalar)


_cast = interpreter.InterpreterBuilder.cast_impl


def _cast_integers(self: Any, src: Any, dst_type: Any) -> Any:
    if dst_type.scalar == tl.bfloat16 and src.dtype.scalar.is_int():
        src = _cast(self, src, tl.float32)
    return _cast(self, src, dst_type)


interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _cast_integers
