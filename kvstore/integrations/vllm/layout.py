"""Where an attention backend of vLLM keeps K and V of a token within a block: found out, not believed.

No backend says how it lays out its pool, and some pack K for their instructions. So into scratch blocks that
are made like the real ones the backend's own `do_kv_cache_update` writes numbers that name (K or V, token,
head, channel), a byte of the name a pass, since every dtype here holds 0 to 255 exactly. Where each arrived
is read back, and must be a sum of one offset for each axis, which must count like an odometer:

    offset(k, token, head, channel) = base[k] + at[k, token](token) + at[k, head](head) + at[k, dim](channel)
    at(i) = sum of digit j of i times stride j          128 tokens packed by 32: ((4, 2048), (32, 1))

The whole map is then computed from what was found and held against what was seen. Costs some milliseconds at
start and scratch memory of three blocks. How it fails: `ConfigError` with the reason, before anything is
saved or loaded. Only a worker of vLLM loads this module: it has torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.nouns import DTYPE_NBYTES

__all__ = ["AttentionLayer", "BlockLayout", "Digit", "Half", "by_index", "probe", "probe_all"]

_BLOCKS: Final = 3  # of scratch: one is written, its neighbours must stay untouched
_SCRATCH_NBYTES_MAX: Final = 1 << 30
_BASE: Final = 256  # of a name's digits: bfloat16 holds no more integers exactly

Offsets = NDArray[np.int64]


class AttentionLayer(Protocol):
    """What is asked of a layer: vLLM's `Attention`, or a test's."""

    @property
    def impl(self) -> Any:
        """Has `do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)`."""
        ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_size(self) -> int: ...


class Digit(NamedTuple):
    size: int
    stride: int  # in elements


class Half(NamedTuple):
    """K or V of a block. The digits of each axis, the slowest first; their sizes multiply to its length."""

    base: int
    token: tuple[Digit, ...]
    head: tuple[Digit, ...]
    dim: tuple[Digit, ...]

    def offsets(self) -> Offsets:
        """[token, kv_head, head_dim] -> elements from the block's start."""
        token, head, dim = _counted(self.token), _counted(self.head), _counted(self.dim)
        return self.base + token[:, None, None] + head[:, None] + dim

    def pieces(self, tokens: int) -> tuple[Offsets, tuple[Digit, ...]]:
        """Cut into pieces of so many tokens: where each begins, and the digits of a token within one.

        Raises ConfigError where a piece is no run of whole digits.
        """
        inner: list[Digit] = []
        left = tokens
        for digit in reversed(self.token):
            taken = min(left, digit.size)
            if left % taken or digit.size % taken:
                raise ConfigError(f"tokens packed as {self.token} cannot be moved {tokens} at a time")
            inner.insert(0, Digit(taken, digit.stride))
            left //= taken
        begins = _counted(self.token)[::tokens]
        return begins + self.base, tuple(digit for digit in inner if digit.size > 1)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One block of the pool of one layer; blocks lie `block_stride` elements apart."""

    block_tokens: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_stride: int
    key: Half
    value: Half

    @property
    def fingerprint(self) -> str:
        """The same string for the same bytes in the same places."""
        halves = " ".join(
            f"{name}+{half.base}"
            + "".join(
                f" {axis}" + ",".join(f"{size}*{stride}" for size, stride in digits)
                for axis, digits in zip("thd", half[1:], strict=True)
            )
            for name, half in (("k", self.key), ("v", self.value))
        )
        return f"{self.dtype} b{self.block_tokens}+{self.block_stride} {halves}"


def by_index(names: Sequence[str]) -> list[str]:
    """Layer names in the model's order, which is the number in each name: `model.layers.7.self_attn.attn`.

    Raises ConfigError when the numbers are not 0, 1, 2 and so on: part of a model, or another one beside it.
    """
    numbered: dict[int, str] = {}
    for name in names:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if len(numbers) != 1 or numbers[0] in numbered:
            raise ConfigError(f"layer {name!r} does not say by one number of its own which layer it is")
        numbered[numbers[0]] = name
    if sorted(numbered) != list(range(len(names))):
        raise ConfigError(
            f"the pool has layers {sorted(numbered)}: pipeline parallelism and draft models are not served"
        )
    return [numbered[index] for index in range(len(names))]


def probe_all(
    caches: Mapping[str, torch.Tensor], layers: Mapping[str, AttentionLayer], block_tokens: int
) -> BlockLayout:
    """The layout that all layers of a pool have. Raises ConfigError when they do not agree.

    A layer may look back through a window only: whether its blocks stay is a matter of the cache group's
    spec, which is refused at start where they do not (facts.py).
    """
    found: dict[object, BlockLayout] = {}
    for name, cache in caches.items():
        layer = layers.get(name)
        if layer is None:
            raise ConfigError(f"layer {name!r} has a cache and no attention: such pools are not served")
        kind = (
            type(layer.impl), layer.num_kv_heads, layer.head_size, cache.shape, cache.stride(), cache.dtype,
            getattr(layer, "isa", None),
        )  # fmt: skip
        if kind not in found:
            found[kind] = probe(layer, cache, block_tokens)
    layouts = set(found.values())
    if len(layouts) != 1:
        described = "; ".join(sorted(layout.fingerprint for layout in layouts)) or "none"
        raise ConfigError(f"one layout for all layers is needed, found {described}")
    return layouts.pop()


def probe(layer: AttentionLayer, cache: torch.Tensor, block_tokens: int) -> BlockLayout:
    """Find out a layer's. `cache` is its pool: of it only shape, strides, dtype and device are used."""
    update = getattr(layer.impl, "do_kv_cache_update", None)
    dtype = str(cache.dtype).removeprefix("torch.")
    if update is None:
        raise ConfigError(f"{type(layer.impl).__name__} has no do_kv_cache_update: take another backend")
    if dtype not in DTYPE_NBYTES:
        raise ConfigError(f"a KV cache of {dtype} is not served: set kv_cache_dtype to auto")
    shape = (block_tokens, layer.num_kv_heads, layer.head_size)
    axis = _block_axis(cache, 2 * math.prod(shape))
    scratch = _scratch(cache, axis)
    seen = _seen(layer, scratch, axis, shape)
    key, value = (_half(offsets, name) for offsets, name in zip(seen, "KV", strict=True))
    return BlockLayout(*shape, dtype, cache.stride(axis), key, value)


def _block_axis(cache: torch.Tensor, block_numel: int) -> int:
    if cache.numel() == block_numel * cache.shape[0]:
        return 0
    if cache.shape[0] == 2 and cache.numel() == block_numel * cache.shape[1]:  # K and V first
        return 1
    raise ConfigError(
        f"a pool of shape {list(cache.shape)} has no axis of blocks of {block_numel} elements, K and V of "
        "one layer: MLA, quantised and padded blocks are not served"
    )


def _scratch(cache: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [_BLOCKS if i == axis else size for i, size in enumerate(cache.shape)]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, cache.stride(), strict=True))
    if extent * cache.itemsize > _SCRATCH_NBYTES_MAX:
        raise ConfigError(
            f"blocks of strides {cache.stride()} lie across the whole pool: set VLLM_KV_CACHE_LAYOUT to one "
            "that keeps a block together"
        )
    return torch.empty(extent, dtype=cache.dtype, device=cache.device).as_strided(shape, cache.stride())


def _seen(layer: AttentionLayer, scratch: torch.Tensor, axis: int, shape: tuple[int, int, int]) -> Offsets:
    """[k and v, token, kv_head, head_dim] -> where it was found, in elements from the block's start."""
    numel, blocks = math.prod(shape), scratch.movedim(axis, 0)
    names = torch.arange(2 * numel).view(2, *shape)
    slots = torch.arange(shape[0], 2 * shape[0], device=scratch.device)
    arrived = torch.zeros(2 * numel, dtype=torch.int64)
    for shift in range(math.ceil(math.log(2 * numel, _BASE))):
        scratch.fill_(math.nan)
        digits = (names // _BASE**shift % _BASE).to(scratch.dtype).to(scratch.device)
        try:
            layer.impl.do_kv_cache_update(layer, digits[0], digits[1], scratch, slots)
        except Exception as error:
            raise ConfigError(
                f"{type(layer.impl).__name__} does not write where it is told: {error}"
            ) from error
        before, written, behind = blocks.float().cpu().flatten(1)
        if not (before.isnan().all() and behind.isnan().all()):
            raise ConfigError("the backend writes a block's tokens to other blocks, too")
        if written.isnan().any() or not torch.equal(written, written.to(torch.uint8).to(written.dtype)):
            raise ConfigError("the backend does not keep KV as it is given: scaled, quantised or elsewhere")
        arrived += written.to(torch.int64) * _BASE**shift
    found = arrived.numpy()
    if not np.array_equal(np.sort(found), np.arange(2 * numel)):
        raise ConfigError("the backend does not keep every element of K and V exactly once")
    strides = blocks.stride()[1:]
    places = sum(
        np.arange(size).reshape([-1 if j == i else 1 for j in range(len(strides))]) * stride
        for i, (size, stride) in enumerate(zip(blocks.shape[1:], strides, strict=True))
    )
    seen = np.empty(2 * numel, dtype=np.int64)
    seen[found] = np.asarray(places, dtype=np.int64).reshape(-1)
    return seen.reshape(2, *shape)


def _half(seen: Offsets, name: str) -> Half:
    base = int(seen[0, 0, 0])
    axes = (seen[:, 0, 0] - base, seen[0, :, 0] - base, seen[0, 0, :] - base)
    half = Half(base, *(tuple(_odometer(axis)) for axis in axes))
    if not np.array_equal(half.offsets(), seen):
        raise ConfigError(f"{name} of a block lies in no strides of token, head and channel")
    return half


def _odometer(axis: Offsets) -> Iterator[Digit]:
    """The digits that count like this, the slowest first. What they are not is seen by who checks the map."""
    digits: list[Digit] = []
    while len(axis) > 1:
        stride = int(axis[1])
        straight = axis == np.arange(len(axis)) * stride
        size = len(axis) if straight.all() else int(straight.argmin())
        digits.append(Digit(size, stride))
        axis = axis[::size]
    return reversed(digits)


def _counted(digits: tuple[Digit, ...]) -> Offsets:
    offsets = np.zeros(1, dtype=np.int64)
    for size, stride in digits:
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return offsets
