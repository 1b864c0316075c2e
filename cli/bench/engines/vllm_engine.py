"""vLLM's CPU build as one process of the bench, in an environment of its own: its engine, step by step."""

from __future__ import annotations

import time
from typing import Any

from cli.bench.engines.plan import prompts
from cli.bench.jsonlines import answer
from cli.bench.peers.vllm_cpu import prepare_vllm

_engine: list[Any] = []


def start(folder: str, dtype: str, threads: int, context_max: int, sequences: int) -> dict[str, Any]:
    version = prepare_vllm(
        OMP_NUM_THREADS=str(threads), VLLM_CPU_KVCACHE_SPACE="3", VLLM_LOGGING_LEVEL="ERROR"
    )
    from vllm import LLM

    llm = LLM(
        model=folder, dtype=dtype, enforce_eager=True, max_model_len=context_max, max_num_seqs=sequences,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    _engine[:] = [llm.llm_engine]
    return {"what": f"vllm-cpu {version}, eager"}


def prefill(tokens: int, seed: int, vocabulary: int) -> dict[str, float]:
    (engine,) = _engine
    _admit(engine, prompts(1, tokens, seed, vocabulary), 1)
    began = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    return {"seconds": time.perf_counter() - began}


def decode(batch: int, prompt: int, tokens: int, seed: int, vocabulary: int) -> dict[str, float]:
    """Tokens a second while all sequences decode: from the moment when every prompt has its first token to
    the end of the first answer."""
    (engine,) = _engine
    _admit(engine, prompts(batch, prompt, seed, vocabulary), tokens)
    had: dict[str, int] = {}
    while len(had) < batch:
        _count(engine, had)
    began, before = time.perf_counter(), sum(had.values())
    while not _count(engine, had):
        pass
    seconds, drawn = time.perf_counter() - began, sum(had.values()) - before
    while engine.has_unfinished_requests():
        engine.step()
    return {"tokens_s": drawn / seconds}


def _count(engine: Any, had: dict[str, int]) -> bool:
    """Step; has an answer ended?"""
    outputs = engine.step()
    had.update((output.request_id, len(output.outputs[0].token_ids)) for output in outputs)
    return any(output.finished for output in outputs)


def _admit(engine: Any, ids_of_each: list[list[int]], tokens: int) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for index, ids in enumerate(ids_of_each):
        engine.add_request(f"{index}", {"prompt_token_ids": ids}, sampling)


if __name__ == "__main__":
    answer({"start": start, "prefill": prefill, "decode": decode})
