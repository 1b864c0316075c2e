"""Promise: a watch tells every change once, in revision order, or says that it cannot."""

from __future__ import annotations

import pytest

from kvstore.errors import Compacted, ConfigError
from kvstore.nouns import DROP, ROOT_KEY, ChangeKind, Incarnation, NamespaceId, Revision
from tests.kvstore.core.conftest import E1, E2, INT8, LOSSLESS, MODEL, NAMESPACE, NBYTES, Shard, key

OTHER = NamespaceId(bytes([1] * 16))
START = Revision(Incarnation(7), 0)


def told(shard: Shard, after: Revision = START, *namespaces: NamespaceId) -> list[tuple[object, ...]]:
    """Changes in short: (revision, kind, key number or -, epoch, quality)."""
    _, changes = shard.core.past.changed_since(after, namespaces or (NAMESPACE,), 1000)
    whole = ChangeKind.EPOCH, ChangeKind.PURGED
    assert all(c.key == ROOT_KEY for c in changes if c.kind in whole)
    numbers = {key(n): n for n in range(300)}
    return [
        (c.revision, c.kind.name, "-" if c.kind in whole else numbers[c.key], c.epoch, c.quality)
        for c in changes
    ]


def test_every_kind_of_change_is_told_at_its_revision() -> None:
    shard = Shard(3)
    shard.put([0, 1], E1, INT8)
    shard.put([0], E1, LOSSLESS)
    shard.core.advance_epoch(MODEL, 2, DROP)
    shard.put([100], E2)
    shard.put([200], E2)
    shard.core.report(shard.match([100], E2).versions[0])
    shard.core.purge(NAMESPACE, (key(200),), None)
    shard.core.purge(NAMESPACE, None, None)
    shard.core.purge(NAMESPACE, None, 2)
    assert told(shard) == [
        (1, "COMMITTED", 0, 1, 800),
        (1, "COMMITTED", 1, 1, 800),
        (2, "RETIRED", 0, 1, 800),
        (2, "COMMITTED", 0, 1, 1000),
        (3, "EPOCH", "-", 2, 0),
        (4, "COMMITTED", 100, 2, 1000),
        (5, "RETIRED", 1, 1, 800),  # evicted: the leaf of what was dropped
        (6, "COMMITTED", 200, 2, 1000),
        (7, "RETIRED", 100, 2, 1000),  # reported corrupt
        (8, "RETIRED", 200, 2, 1000),
        (9, "PURGED", "-", 0, 0),
        (10, "PURGED", "-", 2, 0),
    ]


def test_a_watch_goes_on_from_where_it_was_and_tears_no_revision() -> None:
    shard = Shard(64)
    for first in range(0, 40, 4):
        shard.put(range(first, first + 4))
    seen, at = [], START
    while at.counter < shard.core.revision:
        upto, changes = shard.core.past.changed_since(at, (NAMESPACE,), 5)
        assert all(at.counter < change.revision <= upto.counter for change in changes)
        assert all([c.revision for c in changes].count(c.revision) == 4 for c in changes)
        seen += changes
        at = upto
    assert seen == shard.core.past.changed_since(START, (NAMESPACE,), 1000)[1]
    assert len(seen) == 40


def test_only_the_namespaces_asked_for_are_told() -> None:
    shard = Shard()
    shard.open(OTHER, "another model")
    shard.put([0])
    shard.put([1], namespace=OTHER)
    shard.core.advance_epoch(MODEL, 2)
    assert told(shard) == [(1, "COMMITTED", 0, 1, 1000), (3, "EPOCH", "-", 2, 0)]
    assert told(shard, START, OTHER) == [(2, "COMMITTED", 1, 1, 1000)]


def test_who_falls_behind_the_log_is_told_so_and_catches_up_by_listing() -> None:
    shard = Shard(64, changes_max=8)
    for n in range(20):
        shard.put([n])
    with pytest.raises(Compacted, match="list"):
        shard.core.past.changed_since(START, (NAMESPACE,), 100)
    at, found, cursor = shard.core.past.listing(NAMESPACE, None, 0, 100)
    assert (at.counter, len(found), cursor) == (20, 20, 0)
    shard.put([50])
    assert told(shard, at) == [(21, "COMMITTED", 50, 1, 1000)]


@pytest.mark.parametrize(
    "after", [Revision(Incarnation(6), 0), Revision(Incarnation(7), 2)], ids=["earlier life", "still to come"]
)
def test_revisions_that_are_not_ours_are_compacted(after: Revision) -> None:
    shard = Shard()
    shard.put([0])
    with pytest.raises(Compacted):
        shard.core.past.changed_since(after, (NAMESPACE,), 100)


def test_compaction_on_command() -> None:
    shard = Shard()
    for n in range(3):
        shard.put([n])
    at = Revision(shard.revision().incarnation, 2)
    assert shard.core.past.compact(at) == at
    assert shard.core.past.compact(Revision(at.incarnation, 1)) == at  # it never goes back
    with pytest.raises(Compacted):
        shard.core.past.changed_since(Revision(at.incarnation, 1), (NAMESPACE,), 100)
    assert told(shard, at) == [(3, "COMMITTED", 2, 1, 1000)]
    assert shard.match([0], at=Revision(at.incarnation, 1)).versions == ()
    assert len(shard.match([0], at=at).versions) == 1
    with pytest.raises(Compacted):
        shard.core.past.listing(NAMESPACE, Revision(at.incarnation, 1), 0, 10)
    with pytest.raises(ConfigError, match="still to come"):
        shard.core.past.compact(Revision(at.incarnation, 9))
    with pytest.raises(Compacted, match="another life"):
        shard.core.past.compact(Revision(Incarnation(6), 1))


def test_a_listing_in_pages_and_the_watch_from_its_revision_are_the_whole_truth() -> None:
    """Pages are asked for while blocks come and go; what the watch tells afterwards makes up for it."""
    shard = Shard(8)
    shard.put(range(8))
    at, index, cursor = None, set(), 0
    for n in range(100, 106):
        page_at, found, cursor = shard.core.past.listing(NAMESPACE, at, cursor, 2)
        at = at or page_at
        index |= {(v.key, v.epoch.number, int(v.quality)) for v in found}
        shard.put([n])  # evicts one
        if not cursor:
            break
    assert at is not None
    assert cursor == 0
    for change in shard.core.past.changed_since(at, (NAMESPACE,), 1000)[1]:
        entry = change.key, change.epoch, change.quality
        (index.add if change.kind is ChangeKind.COMMITTED else index.discard)(entry)
    here = {
        (v.key, v.epoch.number, int(v.quality)) for v in shard.core.past.listing(NAMESPACE, None, 0, 100)[1]
    }
    assert index == here
    assert len(here) == 8


def test_the_log_stays_within_its_bound() -> None:
    shard = Shard(64, changes_max=10)
    for n in range(60):
        shard.put([n])
        assert len(shard.core.changes) <= 10
    assert shard.core.usage().live_nbytes == 60 * NBYTES


def test_what_goes_after_its_purge_takes_nothing_from_what_was_written_since() -> None:
    """Found by tests/sim: evicting a purged version told watchers that the new one of its name had gone."""
    shard = Shard(2)
    shard.put([0])
    shard.core.purge(NAMESPACE, None, None)
    written_again = shard.revision()
    shard.put([0])
    shard.put([1])  # in the place of what was purged and not swept yet
    assert shard.present([0, 1]) == {0, 1}
    _, changes = shard.core.past.changed_since(written_again, {NAMESPACE}, 100)
    assert [(change.kind, change.key) for change in changes] == [
        (ChangeKind.COMMITTED, key(0)),
        (ChangeKind.COMMITTED, key(1)),
    ]


def test_a_version_retires_once() -> None:
    """Found by tests/sim, seed 26: purging keys told of what was purged before and is pinned, too."""
    shard = Shard()
    shard.put([0])
    held = shard.match([0])
    shard.core.purge(NAMESPACE, None, None)
    shard.put([0])
    before = shard.revision()
    shard.core.purge(NAMESPACE, (key(0),), None)
    _, changes = shard.core.past.changed_since(before, {NAMESPACE}, 100)
    assert [change.kind for change in changes] == [ChangeKind.RETIRED]
    shard.release(held.lease)
