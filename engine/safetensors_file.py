"""Writing a safetensors file tensor by tensor, so that a model need not fit in memory to be converted.

The format: 8 bytes of header length (little-endian), a JSON header of names, dtypes, shapes and offsets,
then the bytes, without gaps. The header is padded with spaces so that data begins at a multiple of 64: a
mapped float32 tensor is then aligned for any kernel. Memory: one tensor. Synced before it returns.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engine.progress import Progress

__all__ = ["write_float32"]

_ALIGNMENT: Final = 64
_LENGTH: Final = struct.Struct("<Q")


def write_float32(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterable[npt.NDArray[np.float32]],
    progress: Progress,
) -> None:
    """Write `arrays`, given in the order of `shapes`, as float32 to a new file. Raises OSError, and
    ValueError for an array that is not of its shape."""
    total = 4 * sum(math.prod(shape) for shape in shapes.values())
    done = 0
    with path.open("xb") as file:
        file.write(_header(shapes))
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != shape:
                raise ValueError(f"tensor {name} has shape {array.shape}, not {shape}")
            file.write(np.ascontiguousarray(array, dtype="<f4").data)
            done += array.size * 4
            progress("converting weights", done, total)
        file.flush()
        os.fsync(file.fileno())


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(_LENGTH.size + len(text)) % _ALIGNMENT
    return _LENGTH.pack(len(text) + padding) + text + b" " * padding
