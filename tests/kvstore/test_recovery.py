"""Promise: what reached the tier below survives a crash, what was deleted stays deleted, and the number of an
epoch keeps its weights."""

from __future__ import annotations

import pytest

from kvstore.errors import EpochConflict
from kvstore.nouns import (
    DROP,
    ISOLATE,
    Epoch,
    MissReason,
    NamespaceSpec,
    Quality,
    Revision,
    Snapshot,
    Tier,
    allow_stale,
)
from kvstore.tiers.durable import EpochNote
from kvstore.transport.base import Purge
from tests.kvstore.durable import E1, E2, Tiered, encode, wanted
from tests.kvstore.oracle import LAYOUT, SPEC, TIMEOUT, get, payload

FOUR = [0, 1, 2, 3]


async def test_what_was_synced_is_there_in_the_next_life() -> None:
    shard = await Tiered().open()
    await shard.put(FOUR)
    await shard.restart()
    assert shard.on() == dict.fromkeys(FOUR, Tier.NVME)
    assert await shard.seen() == wanted(FOUR, shard.keys)
    await shard.move()
    assert shard.on() == dict.fromkeys(FOUR, Tier.HOST)
    shard.all_is_well()
    await shard.restart()
    assert await shard.seen() == wanted(FOUR, shard.keys)


async def test_what_was_only_on_the_host_is_not() -> None:
    shard = await Tiered().open()
    shard.disk.failures["sync"] = 1
    await shard.put(FOUR)
    for seed in range(5):
        shard.disk._rng.seed(seed)
        await shard.restart()
        seen = await shard.seen()
        assert seen == wanted(FOUR, shard.keys)[: len(seen)]
        shard.all_is_well()


async def test_encoded_versions_come_back_as_what_they_are() -> None:
    shard = await Tiered(encode=encode).open()
    await shard.put(FOUR)
    await shard.restart()
    assert await shard.seen() == []
    assert await shard.seen(least=Quality.INT8) == [
        payload(shard.keys.keys[i], E1, Quality.INT8)[:32] for i in FOUR
    ]


async def test_references_of_an_earlier_life_are_stale_and_its_revisions_forgotten() -> None:
    shard = await Tiered().open()
    await shard.put(FOUR)
    old, then = shard.row(0).ref, Revision(shard.driver.config.incarnation, shard.driver.core.revision)
    await shard.restart()
    assert shard.row(0).ref.incarnation != old.incarnation
    assert await get(shard.driver, shard.namespace, [old]) == [MissReason.STALE_REFERENCE]
    at = Snapshot(shard.namespace, E1, revision=then)
    assert (await shard.driver.match(at, shard.keys.keys, "r", 1.0, timeout_s=TIMEOUT)).miss is (
        MissReason.COMPACTED
    )


@pytest.mark.parametrize("scope", ["namespace", "epoch", "keys"])
async def test_what_was_purged_stays_purged_and_what_came_after_does_not(scope: str) -> None:
    shard = await Tiered().open()
    await shard.put(FOUR)
    keys = tuple(shard.keys.keys[2:4]) if scope == "keys" else None
    epoch = 1 if scope == "epoch" else None
    await shard.driver.purge(Purge(shard.namespace, keys, epoch), timeout_s=TIMEOUT)
    await shard.restart()
    left = [0, 1] if scope == "keys" else []
    assert await shard.seen() == wanted(left, shard.keys)
    await shard.put(FOUR)
    await shard.restart()
    assert await shard.seen() == wanted(FOUR, shard.keys)
    shard.all_is_well()


async def test_what_was_given_up_and_then_purged_does_not_come_back() -> None:
    """Its frame lies about on the disk, and nobody knew of it when it was purged."""
    shard = await Tiered().open()
    await shard.put(FOUR)
    core = shard.driver.core
    for row in list(core.index.rows()):
        core.retiring.evict(row.ref.slot)
    shard.driver._settle()
    await shard.driver.purge(Purge(shard.namespace, tuple(shard.keys.keys[:4]), None), timeout_s=TIMEOUT)
    await shard.restart()
    assert await shard.seen() == []


async def test_what_was_given_up_may_come_back_but_not_in_the_place_of_what_was_kept() -> None:
    shard = await Tiered(below_frames=4).open()
    await shard.put(FOUR)
    core = shard.driver.core
    for row in list(core.index.rows()):
        core.retiring.evict(row.ref.slot)
    shard.driver._settle()
    await shard.put(FOUR, E2)
    await shard.restart()
    assert await shard.seen(E2) == wanted(FOUR, shard.keys, E2)
    assert shard.driver.core.counters["recovery:crowded_out"] == 4
    shard.all_is_well()


async def test_the_last_of_two_copies_of_a_version_is_taken() -> None:
    shard = await Tiered().open()
    for _ in range(2):
        await shard.put([0])
        shard.driver.core.retiring.evict(shard.row(0).ref.slot)
        shard.driver._settle()
        shard._lives += 1
    await shard.restart()
    assert await shard.seen() == wanted([0], shard.keys)
    shard.all_is_well()


async def test_dropped_epochs_stay_dropped_and_policies_stay() -> None:
    shard = await Tiered().open()
    await shard.put(FOUR)
    await shard.driver.advance_epoch(SPEC.model_id, 2, DROP, timeout_s=TIMEOUT)
    await shard.put([0], E2)
    await shard.driver.advance_epoch(SPEC.model_id, 2, allow_stale(3), timeout_s=TIMEOUT)
    before = shard.driver.core.epochs.show(SPEC.model_id)
    await shard.restart(opened=False)
    assert shard.driver.core.epochs.show(SPEC.model_id) == before
    assert (before.oldest, before.stale_lag_max) == (2, 3)
    assert len(shard.driver.core.index) == 1


async def test_an_advance_is_kept_with_the_epoch_it_names() -> None:
    """Whoever registered it may still be waiting for its note."""
    shard = await Tiered().open()
    await shard.put(FOUR)
    three = Epoch(3, E2.weights_digest)
    shard.driver.core.register_epoch(SPEC.model_id, three)
    await shard.driver.advance_epoch(SPEC.model_id, 3, DROP, timeout_s=TIMEOUT)
    await shard.restart(opened=False)
    assert shard.driver.core.epochs.show(SPEC.model_id).oldest == 3
    assert shard.driver.core.counters["recovery:notes_refused"] == 0


async def test_an_epochs_number_is_bound_to_its_weights_over_restarts() -> None:
    shard = await Tiered().open()
    await shard.restart(opened=False)
    with pytest.raises(EpochConflict):
        await shard.driver.register_epoch(SPEC.model_id, Epoch(1, E2.weights_digest), timeout_s=TIMEOUT)
    await shard.driver.register_epoch(SPEC.model_id, E1, timeout_s=TIMEOUT)


async def test_a_namespace_opens_to_the_same_id_and_nothing_is_noted_twice() -> None:
    shard = await Tiered().open()
    opened, notes = shard.namespace, _notes(shard)
    await shard.restart(opened=False)
    assert [known.id for known in await shard.driver.namespaces(timeout_s=TIMEOUT)] == [opened]
    assert await shard.driver.open_namespace(SPEC, "tenant", timeout_s=TIMEOUT) == opened
    assert await shard.driver.open_namespace(SPEC, "another", timeout_s=TIMEOUT) != opened
    assert _notes(shard) == notes + 1


async def test_a_note_that_makes_no_sense_any_more_costs_itself() -> None:
    shard = await Tiered().open()
    await shard.put([0])
    shard.disk.add(EpochNote(SPEC.model_id, Epoch(1, E2.weights_digest))).synced = True
    await shard.restart()
    assert shard.driver.core.counters["recovery:notes_refused"] == 1
    assert await shard.seen() == wanted([0], shard.keys)


async def test_another_secret_sees_nothing_of_what_is_there() -> None:
    shard = await Tiered().open()
    await shard.put([0])
    shard._parts = shard._parts[0], b"another secret of some length"
    await shard.restart()
    assert await shard.seen() == []
    other = NamespaceSpec("other model", LAYOUT, tokenizer_digest=bytes(16))
    assert await shard.driver.open_namespace(other, "tenant", timeout_s=TIMEOUT) != shard.namespace


async def test_watchers_list_what_was_restored_and_watch_from_there() -> None:
    shard = await Tiered().open()
    await shard.put(FOUR)
    await shard.restart()
    page = await shard.driver.listing(shard.namespace, None, 0, 100, timeout_s=TIMEOUT)
    assert {row.key for row in page.versions} == set(shard.keys.keys[:4])
    assert {row.tier for row in page.versions} == {Tier.NVME}
    assert all(0 < row.created <= page.revision.counter for row in page.versions)
    core = shard.driver.core
    assert core.changes.horizon == page.revision.counter  # no watch begins before them


async def test_the_room_below_holds_over_a_restart() -> None:
    shard = await Tiered(below_frames=4).open()
    await shard.put(list(range(8)))
    for _ in range(3):
        await shard.restart()
        shard.driver.check_integrity()
        assert shard.driver.core.index.nvme.used_nbytes <= shard.driver.core.index.nvme.capacity_nbytes
        seen = await shard.seen()
        assert seen == wanted(range(len(seen)), shard.keys)


async def test_an_advance_without_effect_changes_nothing_in_the_next_life() -> None:
    shard = await Tiered().open()
    await shard.driver.advance_epoch(SPEC.model_id, 2, DROP, timeout_s=TIMEOUT)
    await shard.driver.advance_epoch(SPEC.model_id, 1, ISOLATE, timeout_s=TIMEOUT)
    await shard.restart(opened=False)
    assert shard.driver.core.epochs.show(SPEC.model_id).oldest == 2


def _notes(shard: Tiered) -> int:
    return sum(not isinstance(one.what, bytearray) for one in shard.disk.stored)
