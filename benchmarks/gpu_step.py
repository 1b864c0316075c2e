"""A step of the engine on a GPU: recorded decode steps, their host time, tokens a second, the CPU's words.

    python -m benchmarks.gpu_step [--tiny] [--json]

Decode: sequences of 1,024 tokens at batch 1, 16 and 64, greedy, bfloat16, for the default model (its shape,
with random weights, where it is not on this machine) and a random model of Llama 3 8B's shape. A step is
timed as its caller sees it; beside it the same recorded graph replayed alone, with nothing between. Host
share is what the first takes longer: laying out, launching, drawing, waking up. Equality: greedy tokens of 20
prompts in float32, on the device and on the CPU.

--tiny runs all of it in seconds on a small random model, on the CPU behind the device's seam where there is
no GPU: it shows that the script works, and nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, cast

import torch

from engine.config import EngineConfig
from engine.device import CudaDevice, Device, HostDevice
from engine.device_runner import DeviceRunner
from engine.engine import Engine
from engine.errors import ModelNotFound
from engine.models.config import ModelConfig
from engine.registry import DEFAULT_MODEL, resolve_model
from engine.tokenizer import Tokenizer
from engine.types import GenerationRequest, SamplingParams
from engine.weights import DTYPES, Weights, expected_shapes, load_weights
from kvstore.clock import MonotonicClock
from kvstore.nouns import WeightsDigest

__all__ = ["lines", "measure"]

SMOLLM2: Final = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip
LLAMA_8B: Final = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "eos_token_id": 128001,
}  # fmt: skip
TINY: Final = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "eos_token_id": 2,
}  # fmt: skip


class Sizes(NamedTuple):
    """How much is measured."""

    batches: tuple[int, ...] = (1, 16, 64)
    context: int = 1024
    steps: int = 64
    replays: int = 50
    prompts: int = 20
    answer: int = 100


class Model(NamedTuple):
    name: str
    config: ModelConfig
    weights: Weights


def random_model(name: str, raw: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Model:
    """Weights drawn on the device: the same from call to call, on one kind of device."""
    config = ModelConfig.from_dict(raw, name)
    generator = torch.Generator(device).manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for key, shape in expected_shapes(config).items():
        if len(shape) == 1:
            tensors[key] = torch.ones(shape, dtype=dtype, device=device)
        else:
            drawn = torch.randn(shape, dtype=dtype, device=device, generator=generator)
            tensors[key] = drawn.mul_(shape[1] ** -0.5)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return Model(name, config, Weights(tensors, WeightsDigest(bytes(16))))


def default_model(dtype: torch.dtype, device: torch.device) -> Model:
    try:
        folder = resolve_model(DEFAULT_MODEL, fetch=False)
    except ModelNotFound:
        return random_model(f"{DEFAULT_MODEL}'s shape, random", SMOLLM2, dtype, device)
    config = ModelConfig.from_folder(folder)
    return Model(DEFAULT_MODEL, config, load_weights(folder, config, dtype))


def engine_over(model: Model, device: Device | None, dtype: str, batch: int, tokens: int) -> Engine:
    """Room for `batch` sequences of `tokens` tokens. Device None: the CPU as it is."""
    settings = EngineConfig(
        dtype=dtype,
        device="cpu",
        batch_invariant=False,
        local_cache=False,
        running_max=batch,
        max_model_len=tokens,
        step_tokens_max=max(2048, batch),
        pool_blocks=batch * (-(-tokens // 32) + 1),
    )
    # Nothing here has stop strings, which is all an engine needs a tokenizer for.
    return Engine(
        settings, model.config, model.weights, cast(Tokenizer, None), MonotonicClock(), device=device
    )


def prompts_of(count: int, length: int, vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist()) for _ in range(count)
    ]


def admit(engine: Engine, prompts: Iterable[tuple[int, ...]], max_tokens: int) -> None:
    greedy = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.admit(GenerationRequest(f"request {index}", 0, prompt, greedy))


def decode(model: Model, device: Device, dtype: str, batch: int, sizes: Sizes) -> dict[str, float]:
    """Seconds of a step in which `batch` sequences, and nothing else, decode."""
    warm = 8
    engine = engine_over(model, device, dtype, batch, sizes.context + sizes.steps + warm + batch + 2)
    prompts = prompts_of(batch, sizes.context, model.config.vocab_size)
    admit(engine, prompts, sizes.steps + warm + batch)
    seconds: list[float] = []
    while engine.has_work():
        began = time.perf_counter()
        if engine.step().tokens_computed == batch:
            seconds.append(time.perf_counter() - began)
    seconds = seconds[warm : warm + sizes.steps]
    step_s, replay_s = statistics.median(seconds), replayed_s(engine, device, batch, sizes.replays)
    nbytes = sum(t.nbytes for t in {t.data_ptr(): t for t in model.weights.tensors.values()}.values())
    return {
        "step_ms": step_s * 1e3,
        "step_ms_min": min(seconds) * 1e3,
        "step_ms_max": max(seconds) * 1e3,
        "replay_ms": replay_s * 1e3,
        "host_share": 1 - replay_s / step_s,
        "tok_s": batch / step_s,
        "weights_gb_s": nbytes / step_s / 1e9,
    }


def replayed_s(engine: Engine, device: Device, batch: int, replays: int) -> float:
    """Of the step recorded for `batch`, over the inputs of the last step: median of five rounds."""
    graphs = cast(DeviceRunner, engine._runner).graphs
    rounds = []
    for _ in range(5):
        device.mark().synchronize()
        began = time.perf_counter()
        with torch.inference_mode(), device.current():
            for _ in range(replays):
                graphs.replay(batch)
            device.mark().synchronize()
        rounds.append((time.perf_counter() - began) / replays)
    return statistics.median(rounds)


def answers(engine: Engine, prompts: list[tuple[int, ...]], tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt, all served together."""
    said: dict[str, list[int]] = {f"request {index}": [] for index in range(len(prompts))}
    admit(engine, prompts, tokens)
    while engine.has_work():
        for event in engine.step().events:
            said[event.request_id].append(event.token_id)
    return list(said.values())


def equality(model: Model, device: Device, sizes: Sizes) -> dict[str, Any]:
    """Greedy in float32, here and there."""
    room = sizes.prompts, 40 + sizes.answer + 1
    prompts = prompts_of(sizes.prompts, 40, model.config.vocab_size)
    there = answers(engine_over(model, device, "float32", *room), prompts, sizes.answer)
    on_cpu = {name: tensor.cpu() for name, tensor in model.weights.tensors.items()}
    cpu_model = model._replace(weights=Weights(on_cpu, model.weights.digest))
    here = answers(engine_over(cpu_model, None, "float32", *room), prompts, sizes.answer)
    first = [
        next((i for i, (a, b) in enumerate(zip(*two, strict=True)) if a != b), -1)
        for two in zip(there, here, strict=True)
    ]
    return {
        "model": model.name,
        "prompts": sizes.prompts,
        "tokens": sizes.answer,
        "equal": first.count(-1),
        "first_difference": [at for at in first if at >= 0],
    }


def measure(*, tiny: bool) -> dict[str, Any]:
    """All of it. Without a GPU only `tiny` is of any use."""
    device: Device = CudaDevice(torch.device("cuda")) if torch.cuda.is_available() else HostDevice()
    where = device.torch_device
    sizes = Sizes((1, 4), 48, 6, 2, 4, 12) if tiny else Sizes()
    dtype = "float32" if tiny else "bfloat16"
    shapes = {"tiny": TINY} if tiny else {"default": None, "llama-8b shape": LLAMA_8B}
    decoding: dict[str, Any] = {}
    for name, raw in shapes.items():
        model = (
            default_model(DTYPES[dtype], where)
            if raw is None
            else random_model(name, raw, DTYPES[dtype], where)
        )
        decoding[model.name] = {batch: decode(model, device, dtype, batch, sizes) for batch in sizes.batches}
        del model
        gc.collect()
        torch.cuda.empty_cache()
    checked = (
        random_model("tiny", TINY, torch.float32, where) if tiny else default_model(torch.float32, where)
    )
    return {
        "device": torch.cuda.get_device_name() if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": dtype,
        "context": sizes.context,
        "decode": decoding,
        "equality": equality(checked, device, sizes),
    }


def lines(measured: dict[str, Any]) -> list[str]:
    """What was measured, as a table."""
    where = f"{measured['device']}, torch {measured['torch']}, {measured['dtype']}"
    table = [
        f"{where}, {measured['context']} tokens each",
        f"{'':30}{'batch':>6}{'step ms':>10}{'replay ms':>11}{'host %':>8}{'tok/s':>9}{'weights GB/s':>14}",
    ]
    for name, batches in measured["decode"].items():
        for batch, row in batches.items():
            cells = f"{row['step_ms']:10.3f}{row['replay_ms']:11.3f}{row['host_share'] * 100:8.1f}"
            table.append(f"{name:30}{batch:6}{cells}{row['tok_s']:9.0f}{row['weights_gb_s']:14.0f}")
    same = measured["equality"]
    of = f"{same['equal']} of {same['prompts']} prompts over {same['tokens']} tokens, {same['model']}"
    return [*table, f"greedy as on the CPU: {of}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if not (asked.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device here: --tiny runs on the CPU")
    measured = measure(tiny=asked.tiny)
    print(json.dumps(measured) if asked.json else "\n".join(lines(measured)))


if __name__ == "__main__":
    main()
