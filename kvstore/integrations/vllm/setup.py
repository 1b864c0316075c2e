"""What both halves of the connector know of the engine they are in, apart from vLLM's own objects."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.nouns import KVLayout, NamespaceSpec

__all__ = ["Setup", "head_range"]


@dataclass(frozen=True, slots=True)
class Setup:
    """`specs[r]` is the namespace of rank r, for requests without an adapter (`spec_of` has the others)."""

    config: ConnectorConfig
    specs: tuple[NamespaceSpec, ...]
    rank: int  # this worker's among the tensor-parallel ones; 0 in the scheduler's half
    vllm_block_tokens: int
    loads: bool  # kv_role: a producer alone does not
    saves: bool  # nor does a consumer alone

    @property
    def model_id(self) -> str:
        return self.specs[0].model_id

    @property
    def layout(self) -> KVLayout:
        """Of this rank's blocks in the store."""
        return self.specs[self.rank].layout

    def spec_of(self, rank: int, adapter: str = "") -> NamespaceSpec:
        """`adapter`: hex digest of the adapter's files, as plans carry it."""
        spec = self.specs[rank]
        return replace(spec, adapter_digest=bytes.fromhex(adapter)) if adapter else spec


def head_range(rank: int, ranks: int, kv_heads: int) -> tuple[int, int]:
    """Which of the model's KV heads a tensor-parallel rank holds; with fewer heads than ranks some hold the
    same one.

    >>> [head_range(rank, 2, 8) for rank in range(2)], [head_range(rank, 4, 2) for rank in range(4)]
    ([(0, 4), (4, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)])
    """
    each = max(1, kv_heads // ranks)
    begin = rank * kv_heads // ranks
    return begin, begin + each
