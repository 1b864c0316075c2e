"""What vLLM's KV events tell of the store: blocks that a load found there, and blocks that were saved.

By vLLM's own hashes, so that a router that follows its events finds them; so in pieces that are whole blocks
of ours and of those hashes. Told is what is known: that something was evicted from the store is not.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvstore.integrations.vllm.figures import Figures
from kvstore.nouns import PinnedBlock, Tier

__all__ = ["StoreEvents", "StoredEvent"]

EVENTS_MAX: Final = 4_096  # that wait to be taken
REQUESTS_MAX: Final = 1_024  # ended or not, whose saves may still be reported
MEDIUMS: Final = {Tier.DEVICE: "GPU", Tier.HOST: "CPU", Tier.NVME: "STORAGE"}


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """One `BlockStored` of vLLM's: consecutive blocks of one request."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    medium: str
    lora_id: int | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None


@dataclass(slots=True)
class _Saved:
    """Tokens of one request: `told .. end` are in the store, and not told yet."""

    request: Any
    told: int = 0
    end: int = -1


class StoreEvents:
    """Of vLLM's scheduler thread. `ranks`: how many workers must have saved a block for it to be there."""

    def __init__(self, block_tokens: int, hash_tokens: int, ranks: int, figures: Figures) -> None:
        self._piece = math.lcm(block_tokens, hash_tokens)
        self._block, self._hash_tokens = block_tokens, hash_tokens
        self._ranks = ranks
        self._figures = figures
        self._requests: OrderedDict[str, _Saved] = OrderedDict()
        self._said: dict[tuple[str, int, int], int] = {}
        self._events: deque[StoredEvent] = deque()

    def saving(self, request: Any) -> None:
        """Its saves will be reported."""
        if request.request_id not in self._requests:
            self._requests[request.request_id] = _Saved(request)
        self._requests.move_to_end(request.request_id)
        if len(self._requests) > REQUESTS_MAX:
            gone, _ = self._requests.popitem(last=False)
            self._said = {key: said for key, said in self._said.items() if key[0] != gone}

    def stored(self, by_worker: Sequence[Sequence[tuple[str, int, int]]]) -> None:
        """What each of the workers says is in the store now: tokens `begin .. end` of a request."""
        for report in by_worker:
            for key in report:
                said = self._said.pop(key, 0) + 1
                saved = self._requests.get(key[0])
                if saved is not None and said < self._ranks:
                    self._said[key] = said
                elif saved is not None:
                    self._saved(saved, key[1], key[2])

    def found(self, request: Any, run: Sequence[PinnedBlock], begin: int, end: int) -> None:
        """Tokens `begin .. end` lie in the store, each where its block says."""
        start = begin
        while start < end:
            medium = MEDIUMS[run[start // self._block].tier]
            stop = start
            while stop < end and MEDIUMS[run[stop // self._block].tier] == medium:
                stop = min(end, (stop // self._block + 1) * self._block)
            self._tell(request, start, stop, medium)
            start = stop

    def take(self) -> list[StoredEvent]:
        taken = list(self._events)
        self._events.clear()
        return taken

    def _saved(self, saved: _Saved, begin: int, end: int) -> None:
        """Parts of a piece come one after the other: it is told with the last of them."""
        if begin != saved.end:
            saved.told = begin
        saved.end = end
        saved.told = max(saved.told, self._tell(saved.request, saved.told, end, MEDIUMS[Tier.HOST]))

    def _tell(self, request: Any, begin: int, end: int, medium: str) -> int:
        """Where the last whole piece ends; 0 where there is none."""
        piece, every = self._piece, self._hash_tokens
        hashes = request.block_hashes
        first, last = -(-begin // piece), min(end // piece, len(hashes) * every // piece)
        if first >= last:
            return 0
        if len(self._events) >= EVENTS_MAX:
            self._figures.count("events_dropped")
            return last * piece
        lora = request.lora_request
        name = lora.lora_name if lora is not None else None
        extra = [
            _extra_keys(name, request.cache_salt if index == 0 else None) for index in range(first, last)
        ]
        self._events.append(
            StoredEvent(
                [hashes[(index + 1) * piece // every - 1] for index in range(first, last)],
                hashes[first * piece // every - 1] if first else None,
                list(request.all_token_ids[first * piece : last * piece]),
                piece,
                medium,
                lora.lora_int_id if lora is not None else None,
                name,
                extra if any(extra) else None,
            )
        )
        return last * piece


def _extra_keys(lora_name: str | None, salt: str | None) -> tuple[Any, ...] | None:
    return tuple(part for part in (lora_name, salt) if part) or None
