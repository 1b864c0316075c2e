"""What a GPU makes of our kernels, in one call: shares of the copy bandwidth and of torch's flash attention.

    python -m benchmarks.gpu [--tiny] [--sweep] [--json]

Llama 3 8B's shape in bfloat16: decode attention at 64 sequences of 8,192 tokens over a pool in the model's
dtype, in fp8 and in int8; gather and scatter of blocks between pool and frames; prefill of a whole prompt, of
a chunk over a prefix and of several prompts beside torch's SDPA (flash backend) on the same shapes. First,
small steps are compared with float64. Medians over rounds; a share below its goal says so.

Last, whole steps of the engine (benchmarks/gpu_step.py).

--tiny runs all of it on small shapes, in Triton's interpreter where there is no GPU: that it runs, not how
fast. --sweep measures other tile sizes beside those of the table instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.gpu_attention import Row


def line(row: Row) -> str:
    speed = f"{row.gb_s:9.1f} GB/s" if row.gb_s is not None else f"{row.tflop_s or 0:9.3f} TFLOP/s"
    share = "" if row.share is None else f"{row.share:7.2f} of {row.of}"
    short = row.goal is not None and row.share is not None and row.share < row.goal
    spread = f"{row.median_s * 1e3:10.3f} ms ({row.min_s * 1e3:.3f} to {row.max_s * 1e3:.3f})"
    return f"{row.name:44}{spread:38}{speed:20}{share}{f'   below {row.goal}' if short else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not asked.tiny:
        parser.error("there is no CUDA device here: --tiny runs in Triton's interpreter")
    if not on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton

    from benchmarks import gpu_step
    from benchmarks.gpu_attention import TINY, Sizes, checked, measured, swept

    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()}, interpreted"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if not asked.json:
        print(f"{name}, torch {versions['torch']}, triton {versions['triton']}", flush=True)
    rows = []
    sizes = TINY if asked.tiny else Sizes()
    with torch.inference_mode():
        checks = checked(sizes, device)
    if not asked.json:
        print("\n".join(f"{what:44}{value}" for what, value in checks.items()), flush=True)
    with torch.inference_mode():
        for row in (swept if asked.sweep else measured)(sizes, device):
            rows.append(row)
            if not asked.json:
                print(line(row), flush=True)
    steps = None if asked.sweep else gpu_step.measure(tiny=asked.tiny)
    if steps is not None and not asked.json:
        print("\n".join(gpu_step.lines(steps)))
    if asked.json:
        found = {"checks": checks, "rows": [row._asdict() for row in rows], "steps": steps}
        print(json.dumps({"device": name, "versions": versions, **found}))


if __name__ == "__main__":
    main()
