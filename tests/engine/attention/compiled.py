"""Triton's kernels compiled for sm_90, to machine code; a GPU is not needed for that. What they use, as JSON.

python -m tests.engine.attention.compiled
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention import triton_copy
from engine.attention.triton_decode import decode_reduce, decode_split
from engine.attention.triton_prefill import prefill
from engine.attention.triton_tuning import Tuning, query_rows

POINTERS = {"queries": "*bf16", "out": "*bf16", "blocks": "*i32", "tables": "*i32", "sums": "*fp32",
            "extremes": "*fp32", "codes": "*i8", "scales_of": "*bf16", "frames": "*bf16", "taken": "*i32",
            "pool_rows": "*i64"}  # fmt: skip
FLOATS = ("scale", "share")


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int, stages: int) -> str:
    """Its PTX, once it is machine code. Raises what Triton's compiler raises."""
    names, types = kernel.arg_names, POINTERS | types
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "fp32" if name in FLOATS else "i32")
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    assert made.asm["cubin"]
    return str(made.asm["ptx"])


def attention(hot: str, head_dim: int, group: int, *, windowed: bool) -> dict[str, str]:
    tuning = Tuning.of(head_dim, torch.bfloat16, quantised=hot != "model")
    held = dict.fromkeys(("keys", "values"), "*bf16" if hot == "model" else "*i8")
    types = held | dict.fromkeys(("key_scales", "value_scales"), "*bf16")
    constants = {
        "GROUP": group, "HEAD_DIM": head_dim, "KV_HEADS": 8, "BLOCK_TOKENS": 32,
        "D": triton.next_power_of_2(head_dim), "SCALED": hot != "model", "FP8": hot == "fp8",
        "FIXED": windowed, "WINDOWED": windowed, "SINKS": windowed,
    }  # fmt: skip
    few = constants | {"M": query_rows(group, 16), "N": tuning.decode_tile}
    many = constants | {"M": query_rows(group, tuning.prefill_rows), "N": tuning.prefill_tile}
    of_decode = (tuning.decode_warps, tuning.decode_stages)
    return {
        "decode": compiled(decode_split, few, types, *of_decode),
        "reduce": compiled(decode_reduce, few, types, *of_decode),
        "prefill": compiled(prefill, many, types, tuning.prefill_warps, tuning.prefill_stages),
    }


def copies() -> None:
    coded = {"TOKENS": 32, "HEADS": 8, "HEAD_DIM": 80, "D": 128, "R": 16, "FP8": True, "IN": True}
    words = dict.fromkeys(("pool", "frames"), "*i64")
    compiled(triton_copy._copy_runs, {"IN": False, "PIECE": 1024}, words, 4, 1)
    compiled(triton_copy._code_blocks, coded, {}, 4, 1)
    compiled(triton_copy._code_blocks, coded | {"IN": False}, {}, 4, 1)
    compiled(triton_copy._code_rows, coded, {"keys": "*bf16", "values": "*bf16"}, 4, 1)


def main() -> None:
    found = {
        "model": attention("model", 128, 4, windowed=False),
        "fp8": attention("fp8", 96, 3, windowed=True),
    }
    copies()
    products = {
        f"{kernel} {hot}": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)))
        for hot, kernels in found.items()
        for kernel, ptx in kernels.items()
    }
    print(json.dumps(products))


if __name__ == "__main__":
    main()
