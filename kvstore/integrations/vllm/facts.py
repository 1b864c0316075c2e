"""What the connector asks of the vLLM it is in, refuses by its reason, and makes a `Setup` of.

Reads attributes of vLLM's own configuration objects and imports nothing of vLLM. What is refused here would
be wrong or useless later: every message says why, and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstore.errors import ConfigError
from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.integrations.vllm.file_digests import tokenizer_digest
from kvstore.integrations.vllm.model_folder import folder_of
from kvstore.integrations.vllm.setup import Setup, head_range
from kvstore.nouns import DTYPE_NBYTES, KVLayout, NamespaceSpec

__all__ = ["EngineFacts", "read_facts", "refuse", "setup_of"]

FULL_ATTENTION: Final = "FullAttentionSpec"
DRAFTS_WITHOUT_KV: Final = frozenset({"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"})


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Of one engine's KV cache."""

    groups: int
    attention: str  # name of the cache group's spec
    layers: int
    kv_heads: int  # of the whole model
    rank_heads: int  # of one rank
    head_dim: int
    head_dim_v: int
    dtype: str
    is_quantised: bool
    is_causal: bool
    block_tokens: int  # vLLM's
    ranks: int  # tensor-parallel
    pipeline: int
    context: int  # context-parallel ranks, of prefill and decode
    drafter: str | None  # a speculative method whose drafts have KV of their own


def read_facts(vllm_config: Any, kv_cache_config: Any) -> EngineFacts:
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        raise ConfigError("this model has no KV cache: run it without the connector")
    spec, parallel, model = groups[0].kv_cache_spec, vllm_config.parallel_config, vllm_config.model_config
    speculative = getattr(vllm_config, "speculative_config", None)
    method = getattr(speculative, "method", None) if speculative is not None else None
    return EngineFacts(
        groups=len(groups),
        attention=type(spec).__name__,
        layers=len(groups[0].layer_names),
        kv_heads=model.get_total_num_kv_heads(),
        rank_heads=getattr(spec, "num_kv_heads", 0),
        head_dim=getattr(spec, "head_size", 0),
        head_dim_v=getattr(spec, "head_size_v", 0) or getattr(spec, "head_size", 0),
        dtype=str(getattr(spec, "dtype", "none")).removeprefix("torch."),
        is_quantised=_is_quantised(vllm_config.cache_config.cache_dtype, spec),
        is_causal=not getattr(spec, "non_causal", False),
        block_tokens=spec.block_size,
        ranks=parallel.tensor_parallel_size,
        pipeline=parallel.pipeline_parallel_size,
        context=parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size,
        drafter=method if method not in DRAFTS_WITHOUT_KV else None,
    )


def refuse(facts: EngineFacts, config: ConnectorConfig) -> None:
    """Raises ConfigError with every reason why KV of this engine cannot be shared."""
    ours, theirs = config.block_tokens, facts.block_tokens
    reasons = {
        "its layers are of several cache groups (hybrid models): only models with one kind of attention; "
        "where the others are sliding windows, --disable-hybrid-kv-cache-manager makes it one": (
            facts.groups != 1
        ),
        f"its cache is a {facts.attention} (MLA, sliding windows that drop blocks, state spaces): only full "
        "attention; layers with windows among others of full attention keep all their blocks under "
        "--disable-hybrid-kv-cache-manager": (facts.groups == 1 and facts.attention != FULL_ATTENTION),
        "its KV cache is quantised: leave --kv-cache-dtype at auto": facts.is_quantised,
        f"its KV is {facts.dtype}: run it in {', '.join(sorted(DTYPE_NBYTES))}": (
            not facts.is_quantised and facts.dtype not in DTYPE_NBYTES
        ),
        "its keys and values have heads of different sizes: such models are not supported": (
            facts.head_dim != facts.head_dim_v
        ),
        "its attention is not causal: a prefix's KV depends on what follows": not facts.is_causal,
        f"it runs over {facts.pipeline} pipeline stages: use tensor parallelism (-pp 1)": facts.pipeline > 1,
        "it splits contexts over ranks: leave context parallelism off (-dcp 1, -pcp 1)": facts.context > 1,
        f"the drafts of {facts.drafter} have KV of their own: use ngram or suffix, or no speculation": (
            facts.drafter is not None
        ),
        f"blocks of vLLM ({theirs} tokens) and of the store ({ours}) do not divide each other: set "
        f"block_tokens in kv_connector_extra_config to {theirs}, or --block-size to fit {ours}": (
            max(ours, theirs) % min(ours, theirs) != 0
        ),
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    if found:
        raise ConfigError("KV of this engine cannot be shared: " + "; ".join(found))


def setup_of(vllm_config: Any, facts: EngineFacts, config: ConnectorConfig, rank: int) -> Setup:
    """Raises ConfigError where a namespace cannot be named."""
    model, transfer = vllm_config.model_config, vllm_config.kv_transfer_config
    if config.tokenizer_digest is not None:
        tokenizer = bytes.fromhex(config.tokenizer_digest)
    else:
        tokenizer = tokenizer_digest(folder_of(str(model.tokenizer or model.model), model.tokenizer_revision))
    model_id = config.model_id or Path(str(model.model)).name
    specs = tuple(
        NamespaceSpec(
            model_id,
            KVLayout(
                facts.layers,
                *head_range(each, facts.ranks, facts.kv_heads),
                facts.head_dim,
                facts.dtype,
                config.block_tokens,
            ),
            tokenizer,
        )
        for each in range(facts.ranks)
    )
    if specs[rank].layout.kv_heads != facts.rank_heads:
        raise ConfigError(
            f"a rank holds {facts.rank_heads} KV heads where {specs[rank].layout.kv_heads} were expected of "
            f"{facts.kv_heads} over {facts.ranks} ranks: this division is not supported"
        )
    return Setup(
        config, specs, rank, facts.block_tokens, loads=transfer.is_kv_consumer, saves=transfer.is_kv_producer
    )


def _is_quantised(cache_dtype: str, spec: Any) -> bool:
    mode = getattr(spec, "kv_quant_mode", None)
    return str(cache_dtype) not in {"auto", *DTYPE_NBYTES} or (mode is not None and int(mode) != 0)
