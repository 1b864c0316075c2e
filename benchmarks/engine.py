"""How fast the engine is, and what batch invariance costs: both modes side by side in the same process.

    python -m benchmarks.engine [--model NAME] [--threads N] [--dtype float32|bfloat16] [--rounds N] [--json]

The modes take turns within a round. Prefill: seconds for a whole prompt. Decode: seconds a step. Prints the
median and the least over the rounds: on a machine that others use, the least is nearer to the truth.
"""

from __future__ import annotations

import os

from engine.process import SPIN_COUNT

os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # before torch is loaded

import argparse
import json
import statistics
import time

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.registry import DEFAULT_MODEL, resolve_model
from engine.types import GenerationRequest, SamplingParams
from kvstore.memory import keep_freed_buffers

PREFILLS = (512, 1500)
DECODES = ((1, 100), (1, 1400), (4, 300), (16, 300))  # (sequences, context)
DECODE_STEPS = 12


def prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(10, 40_000, (length,), generator=generator).tolist())


def admit(engine: Engine, name: str, length: int, max_tokens: int, seed: int = 0) -> None:
    """Each seed its own prompt: equal ones would be computed once."""
    sampling = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    engine.admit(GenerationRequest(name, 0, prompt(length, seed), sampling))


def prefill_s(engine: Engine, length: int) -> float:
    admit(engine, "prefill", length, 1)
    began = time.perf_counter()
    while engine.has_work():
        engine.step()
    return time.perf_counter() - began


def decode_s(engine: Engine, sequences: int, context: int) -> float:
    """Median seconds of the steps in which every sequence, and nothing else, decodes."""
    for index in range(sequences):
        admit(engine, f"decode-{index}", context, DECODE_STEPS + sequences, index)
    seconds = []
    while engine.has_work():
        began = time.perf_counter()
        if engine.step().tokens_computed == sequences:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, dict[str, list[float]]]:
    """What was measured -> mode -> seconds of each round."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for mode, engine in engines.items():
            for length in PREFILLS:
                row = seconds.setdefault(f"prefill {length}", {})
                row.setdefault(mode, []).append(prefill_s(engine, length))
            for sequences, context in DECODES:
                row = seconds.setdefault(f"decode {sequences} at {context}", {})
                row.setdefault(mode, []).append(decode_s(engine, sequences, context))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    keep_freed_buffers()
    folder = resolve_model(asked.model)
    common = {"dtype": asked.dtype, "threads": asked.threads, "pool_blocks": 400, "speculation": "off"}
    engines = {
        "invariant": Engine.load(folder, EngineConfig.model_validate(common)),
        "plain": Engine.load(folder, EngineConfig.model_validate(common | {"batch_invariant": False})),
    }
    seconds = measure(engines, asked.rounds)
    if asked.json:
        print(json.dumps({"asked": vars(asked), "torch": torch.__version__, "seconds": seconds}))
        return
    print(f"{asked.model} {asked.dtype}, {asked.threads} threads, load average {os.getloadavg()[0]:.1f}")
    print(f"{'':20}{'invariant ms':>22}{'plain ms':>22}   (median, least)")
    for what, modes in seconds.items():
        cells = [f"{statistics.median(s) * 1e3:10.0f}{min(s) * 1e3:12.0f}" for s in modes.values()]
        print(f"{what:20}" + "".join(cells))


if __name__ == "__main__":
    main()
