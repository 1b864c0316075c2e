"""Settings of one engine: what it computes in, how much it holds, how large its steps are.

Checked once when read; everything after trusts them. The defaults fit SmolLM2-135M on a laptop.
"""

from __future__ import annotations

import os
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvstore.nouns import BLOCK_TOKENS, Quality

__all__ = ["HOT_QUALITIES", "EngineConfig"]

HOT_QUALITIES: Final = {"model": Quality.LOSSLESS, "int8": Quality.INT8, "fp8": Quality.FP8}
"""What KV may claim that lay in a pool of each kind."""
INVARIANT_THREADS_MAX: Final = 2
"""Beyond it torch splits elementwise work where vectors end, and the ends round otherwise (linear.py)."""


class EngineConfig(BaseModel):
    """`EngineConfig()` is a good start; every field says what it trades."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Dtype of activations and KV. Products are accumulated in float32 either way"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda|cuda:\d+)$",
        description="Where to compute: cpu, cuda, cuda:N. auto: a GPU if there is one and batch_invariant, "
        "which is proved for CPUs, is false",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Threads torch computes with, for the whole process. None: every core, or with "
        "tensor_parallel its share of them, but at most two in batch-invariant mode, which is proved for no "
        "more",
    )
    wait_policy: Literal["passive", "active"] = Field(
        "passive",
        description="How threads wait for each other within a step. active: spinning for some 20 us, where "
        "they have cores to themselves: a decode step takes 0.75 of the time. Beside other work it takes 3 "
        "times as long so",
    )
    batch_invariant: bool = Field(
        True,
        description="Logits that do not depend, to the bit, on batch or chunk shapes. False is faster "
        "(docs/benchmarks.md) but output may then differ between one process and many",
    )
    block_tokens: int = Field(
        BLOCK_TOKENS, ge=1, le=1024, description="Tokens of one KV block, in the pool and in the store"
    )
    pool_nbytes: int = Field(
        1 << 30,
        ge=1,
        description="Memory for KV, in bytes. Touched only as blocks come into use; with local_cache that "
        "is all of it, in time",
    )
    pool_blocks: int | None = Field(
        None, ge=1, description="Memory for KV, in blocks. When given, pool_nbytes is not used"
    )
    hot_pool: Literal["model", "int8", "fp8"] = Field(
        "model",
        description="What running KV is held as: the model's dtype, or codes of a byte a number, which hold "
        "twice or four times the tokens and are lossy. All that is computed over codes is stored as of "
        "that quality, so a worker's min_quality must allow it. Without Triton's kernels attention decodes "
        "a layer's whole pool every step: slow",
    )
    local_cache: bool = Field(
        True,
        description="Full blocks stay in the pool when their sequence ends, and later ones with the same "
        "prefix use them in place, until their slots are needed. Costs no memory: the pool is the pool",
    )
    step_tokens_max: int = Field(
        512,
        ge=1,
        description="Tokens one step computes: decode rows first, then prompts in chunks. Larger is better "
        "for prompts, worse for the gap between the tokens of running sequences",
    )
    step_s_target: float | None = Field(
        None,
        gt=0,
        description="Seconds that a step should take at most while something decodes: prompts get so many "
        "tokens a step as measured times allow, but at least a block. None: always step_tokens_max",
    )
    running_max: int = Field(
        64, ge=1, description="Sequences that may run at once (parked ones do not count)"
    )
    max_model_len: int | None = Field(
        None, ge=2, description="Longest prompt and output together. None: what the model was made for"
    )

    speculation: Literal["auto", "off", "ngram"] = Field(
        "auto",
        description="Guess tokens and verify them in one step: output stays the same. ngram: what followed "
        "the last few tokens where they occurred before; fast where text is copied, held back where it does "
        "not pay. auto: ngram on a CPU, off on a GPU, whose recorded steps have no room for guesses",
    )
    draft_tokens_max: int = Field(
        16, ge=1, le=256, description="Guesses that one step may verify for one sequence"
    )
    tensor_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that share the model, each with a range of its heads and a pool of that "
        "size. Must divide the model's KV heads and attention heads. For CPUs. Blocks are stored "
        "once a rank, local_cache is off, and weights cannot be changed while it runs",
    )
    rank_timeout_s: float = Field(
        60.0,
        gt=0,
        description="How long one of these processes may keep the others waiting within a step, before the "
        "engine ends with an error",
    )

    @model_validator(mode="after")
    def _ranks_are_of_cpus(self) -> EngineConfig:
        if self.tensor_parallel > 1 and self.device not in ("auto", "cpu"):
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, which is for CPUs, and device is {self.device}: "
                "set device to cpu, or tensor_parallel to 1"
            )
        return self

    @model_validator(mode="after")
    def _decode_rows_fit_a_step(self) -> EngineConfig:
        if self.running_max > self.step_tokens_max:
            raise ValueError(
                f"running_max ({self.running_max}) is more than step_tokens_max ({self.step_tokens_max}): "
                "a step must have room for one token of every running sequence; raise step_tokens_max"
            )
        return self

    @property
    def kv_quality(self) -> Quality:
        """The most that KV may claim which lay in this engine's pool, or was computed over it."""
        return HOT_QUALITIES[self.hot_pool]

    @property
    def compute_threads(self) -> int:
        """Threads to compute with on this machine."""
        cores = max(1, len(os.sched_getaffinity(0)) // self.tensor_parallel)
        return self.threads or (min(cores, INVARIANT_THREADS_MAX) if self.batch_invariant else cores)
