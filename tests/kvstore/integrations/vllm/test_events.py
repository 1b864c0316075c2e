"""What vLLM's KV events tell of the store: blocks by its hashes, where they lie, once all ranks have them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.integrations.vllm import events as module
from kvstore.integrations.vllm.events import StoreEvents
from kvstore.integrations.vllm.figures import Figures
from kvstore.nouns import (
    ROOT_KEY,
    BlockRef,
    Epoch,
    Incarnation,
    PinnedBlock,
    Quality,
    ShardId,
    Tier,
    WeightsDigest,
)

PINNED = PinnedBlock(
    ROOT_KEY,
    BlockRef(ShardId("s"), Incarnation(1), 0, 0),
    Epoch(0, WeightsDigest(bytes(16))),
    Quality.LOSSLESS,
    Tier.HOST,
)


def request(hash_tokens: int, tokens: int = 64, **fields: Any) -> Any:
    return SimpleNamespace(
        request_id="r",
        all_token_ids=list(range(tokens)),
        block_hashes=[b"h%d" % index for index in range(tokens // hash_tokens)],
        cache_salt=fields.get("salt"),
        lora_request=fields.get("lora"),
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "hashes", "parent"),
    [(8, 8, [b"h2", b"h3"], b"h1"), (8, 4, [b"h5", b"h7"], b"h3"), (8, 16, [b"h1"], b"h0")],
)
def test_saved_blocks_are_told_by_vllms_hashes(
    ours: int, theirs: int, hashes: list[bytes], parent: bytes
) -> None:
    events = StoreEvents(ours, theirs, 1, Figures())
    events.saving(request(theirs))
    events.stored([[("r", 16, 32)]])
    (told,) = events.take()
    assert (told.block_hashes, told.parent_block_hash, told.medium) == (hashes, parent, "CPU")
    assert told.token_ids == list(range(16, 32))
    assert told.block_size == max(ours, theirs)
    assert events.take() == []


def test_a_piece_that_is_saved_in_parts_is_told_with_the_last() -> None:
    events = StoreEvents(8, 32, 1, Figures())
    events.saving(request(32, tokens=128))
    told = []
    for begin, end in ((16, 40), (40, 64), (64, 72), (72, 80), (80, 104), (120, 128)):
        events.saving(request(32, tokens=128))
        events.stored([[("r", begin, end)]])
        told.append([(event.token_ids[0], event.token_ids[-1]) for event in events.take()])
    assert told == [[], [(32, 63)], [], [], [(64, 95)], []]


def test_a_block_is_there_when_all_ranks_have_it() -> None:
    events = StoreEvents(8, 8, 2, Figures())
    events.saving(request(8))
    events.stored([[("r", 0, 8)]])
    assert events.take() == []
    events.stored([[("r", 0, 8)], [("unknown", 0, 8)]])
    assert len(events.take()) == 1
    assert events._said == {}


def test_what_a_load_found_is_told_where_it_lies() -> None:
    events = StoreEvents(8, 8, 1, Figures())
    run = [PINNED, PINNED, PINNED._replace(tier=Tier.NVME), PINNED]
    events.found(request(8), run, 8, 32)
    told = [(event.medium, event.token_ids[0], len(event.block_hashes)) for event in events.take()]
    assert told == [("CPU", 8, 1), ("STORAGE", 16, 1), ("CPU", 24, 1)]


def test_salt_and_adapter_are_told_as_vllm_tells_them() -> None:
    events = StoreEvents(8, 8, 1, Figures())
    lora = SimpleNamespace(lora_name="poet", lora_int_id=3)
    events.saving(request(8, salt="s", lora=lora))
    events.stored([[("r", 0, 16)]])
    (told,) = events.take()
    assert (told.lora_name, told.lora_id) == ("poet", 3)
    assert told.extra_keys == [("poet", "s"), ("poet",)]


def test_both_queues_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVENTS_MAX", 2)
    monkeypatch.setattr(module, "REQUESTS_MAX", 2)
    figures = Figures()
    events = StoreEvents(8, 8, 2, figures)
    for name in ("a", "b", "c"):
        asked = request(8)
        asked.request_id = name
        events.saving(asked)
        events.stored([[(name, 0, 8)]])
    assert len(events._requests) == len(events._said) == 2
    for _ in range(3):
        events.found(request(8), [PINNED], 0, 8)
    assert len(events.take()) == 2
    taken = figures.take()
    assert taken is not None
    assert taken["counters"] == {"events_dropped": 1}
