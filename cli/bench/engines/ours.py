"""Our engine as one process of the bench."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.bench.engines.plan import prompts
from cli.bench.jsonlines import answer

if TYPE_CHECKING:
    from engine.engine import Engine

_engine: list[Engine] = []


def start(
    folder: str, dtype: str, threads: int, context_max: int, sequences: int, **mode: Any
) -> dict[str, Any]:
    from engine.process import prepare_process

    prepare_process("active")  # before torch is loaded; the others spin as well
    from engine.config import EngineConfig
    from engine.engine import Engine
    from kvstore.memory import keep_freed_buffers

    keep_freed_buffers()
    size = EngineConfig().block_tokens
    config = EngineConfig(
        dtype=dtype,
        threads=threads,
        pool_blocks=sequences * -(-context_max // size),
        local_cache=False,
        wait_policy="active",
        speculation="off",  # nobody here guesses: greedy answers to random prompts loop, and are soon known
        max_model_len=context_max,
        **mode,
    )
    _engine[:] = [Engine.load(Path(folder), config)]
    return {"what": f"kvstrata, batch_invariant = {str(config.batch_invariant).lower()}"}


def prefill(tokens: int, seed: int, vocabulary: int) -> dict[str, float]:
    (engine,) = _engine
    _admit(engine, prompts(1, tokens, seed, vocabulary), 1)
    began = time.perf_counter()
    while engine.has_work():
        engine.step()
    return {"seconds": time.perf_counter() - began}


def decode(batch: int, prompt: int, tokens: int, seed: int, vocabulary: int) -> dict[str, float]:
    """Tokens a second while all sequences decode: from the moment when every prompt has its first token to
    the end of the first answer."""
    (engine,) = _engine
    _admit(engine, prompts(batch, prompt, seed, vocabulary), tokens)
    waiting = batch
    while waiting:
        waiting -= sum(event.index == 0 for event in engine.step().events)
    began, drawn, has_ended = time.perf_counter(), 0, False
    while not has_ended:
        events = engine.step().events
        drawn += len(events)
        has_ended = any(event.index == tokens - 1 for event in events)
    seconds = time.perf_counter() - began
    while engine.has_work():
        engine.step()
    return {"tokens_s": drawn / seconds}


def _admit(engine: Engine, ids_of_each: list[list[int]], tokens: int) -> None:
    from engine.types import GenerationRequest, SamplingParams

    sampling = SamplingParams(tokens, temperature=0.0, ignore_eos=True)
    for index, ids in enumerate(ids_of_each):
        engine.admit(GenerationRequest(f"{index}", 0, tuple(ids), sampling))


if __name__ == "__main__":
    answer({"start": start, "prefill": prefill, "decode": decode})
