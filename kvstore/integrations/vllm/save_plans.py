"""Which blocks of a request a step saves: the arithmetic, and what the workers are told of it."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvstore.integrations.vllm.plans import Save
from kvstore.integrations.vllm.requests import Tracked
from kvstore.integrations.vllm.setup import Setup
from kvstore.nouns import Epoch

__all__ = ["NO_END", "next_save", "save_of"]

NO_END: Final = 1 << 62


def next_save(tracked: Tracked, block: int) -> int:
    """The number of tokens whose computing completes a block to save."""
    at = (tracked.kept // block + 1) * block
    return at if at <= tracked.save_until else NO_END


def save_of(tracked: Tracked, adapter: str, epoch: Epoch, end: int, setup: Setup) -> Save:
    """Of what is not kept up to `end`; from then on it is."""
    request, vllm_block = tracked.request, setup.vllm_block_tokens
    begin, wanted = tracked.chained, tracked.kept
    tracked.chained = tracked.kept = end
    tracked.save_at = next_save(tracked, setup.specs[0].layout.block_tokens)
    return Save(
        request.request_id,
        epoch,
        begin,
        wanted,
        end,
        np.array(request.all_token_ids[begin:end], dtype="<u4").tobytes(),
        tuple(tracked.block_ids[wanted // vllm_block : -(-end // vllm_block)]),
        request.cache_salt or "",
        adapter,
        setup.config.handoff_timeout_s if tracked.is_handoff else None,
    )
