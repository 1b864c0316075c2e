"""A request as vLLM has it, and what its tokens' KV is."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@functools.lru_cache(maxsize=100_000)
def kv_of(weights: bytes, salt: str, tokens: tuple[int, ...]) -> int:
    digest = hashlib.sha256(weights + salt.encode() + b"\0" + np.array(tokens, "<u4").tobytes()).digest()
    return int.from_bytes(digest[:4], "little")


def next_token(tokens: tuple[int, ...]) -> int:
    return kv_of(b"sampler", "", tokens) % 50


@dataclass(eq=False)
class FakeRequest:
    request_id: str
    all_token_ids: list[int]
    max_tokens: int = 8
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: Any = ()
    prompt_embeds: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool = False
    # what follows is vLLM's own, and the connector does not read it
    state: str = "waiting"  # waiting, loading, running, over
    computed: int = 0  # as the scheduler counts it
    block_ids: list[int] = field(default_factory=list)
    device_tokens: list[int] = field(default_factory=list)
    device_computed: int = 0
    weights: set[bytes] = field(default_factory=set)  # it may have met
    loaded: int = 0  # tokens

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.all_token_ids)
        self.device_tokens = list(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_computed_tokens(self) -> int:
        return self.computed

    def salted(self) -> str:
        return self.cache_salt or ""
