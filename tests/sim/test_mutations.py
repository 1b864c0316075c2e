"""The proof of the proof: each safety broken on purpose is found within a stated number of seeds.

python -m tests.sim.test_mutations               the table: what is broken, and by which seed it is found
python -m tests.sim.test_mutations purge quota   some of it
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from kvstore.core.chain import run_of, view_of
from kvstore.core.changes import ChangeLog
from kvstore.core.epochs import EpochTable
from kvstore.core.holds import Holds
from kvstore.core.index import Index
from kvstore.core.leases import LeaseTable
from kvstore.core.offers import Offers
from kvstore.core.past import Past
from kvstore.core.purging import Purging
from kvstore.core.retiring import Retiring
from kvstore.core.shard import ShardCore
from kvstore.core.spaces import Space
from kvstore.core.state import Offer
from kvstore.core.transactions import Txn
from kvstore.core.versions import State, Versions
from kvstore.driver_config import DriverConfig
from kvstore.frame import HEADER_NBYTES, decode_header
from kvstore.lineage import Lineage
from kvstore.nouns import BlockRef, EpochPolicy, LeaseId, MissReason, NamespaceId, Refusal, Snapshot
from kvstore.tiers.host import HostTier
from tests.sim.tier_mutations import TIER_MUTATIONS
from tests.sim.world import run_seed

Patch = pytest.MonkeyPatch


def generation(patch: Patch) -> None:
    """A reference is good whatever its slot holds now."""
    patch.setattr(Versions, "is_current", lambda table, slot, _generation: bool(table.states[slot]))
    patch.setattr(HostTier, "_find", lambda tier, place: tier._frames.get(place.slot, (0, None))[1])


def incarnation(patch: Patch) -> None:
    """A reference survives a crash of its shard."""
    resolve = ShardCore.resolve

    def any_life(core: ShardCore, namespace: NamespaceId, ref: BlockRef) -> object:
        return resolve(core, namespace, ref._replace(incarnation=core.config.incarnation))

    patch.setattr(ShardCore, "resolve", any_life)


def digest(patch: Patch) -> None:
    """The reader believes the payload."""
    patch.setattr(
        "kvstore.session.decode_frame",
        lambda data: (decode_header(memoryview(data)), memoryview(data)[HEADER_NBYTES:]),
    )


def header(patch: Patch) -> None:
    """The reader believes that the frame is the one it asked for."""
    patch.setattr("kvstore.session.verify_identity", lambda *_: None)


def pin(patch: Patch) -> None:
    """What is matched may be evicted before it is read."""
    patch.setattr(Holds, "grant", _granted)


def _granted(holds: Holds, owner: str, lease_s: float, _space: object, _slots: object, now: float) -> object:
    lease = holds.leases.grant(owner, lease_s, now)
    holds._held[lease] = []
    return lease


def exists_pin(patch: Patch) -> None:
    """A block that exists is answered, not held."""
    hold = Holds.hold

    def only_what_is_new(holds: Holds, lease: LeaseId, space: Space, slot: int) -> None:
        if holds._index.versions.states[slot] == State.STAGED:
            hold(holds, lease, space, slot)

    patch.setattr(Holds, "hold", only_what_is_new)


def epochs(patch: Patch) -> None:
    """KV of any weights will do."""

    def any_epoch(*asked: Any) -> Any:
        view = view_of(*asked)
        return view if isinstance(view, MissReason) else view._replace(oldest=0, number=1 << 62)

    patch.setattr("kvstore.core.past.view_of", any_epoch)


def no_reaping(patch: Patch) -> None:
    """Leases never end by themselves."""
    patch.setattr(LeaseTable, "past_end", lambda *_: [])


# -- deletion, watches, policies, tenants ------------------------------------------------------------------


def purge(patch: Patch) -> None:
    """What was purged as a whole is found again."""
    patch.setattr(Space, "floor", lambda *_: 0)


def purge_of_keys(patch: Patch) -> None:
    """A purge of keys names them, and leaves them."""
    patch.setattr(Purging, "_purge", lambda *_: None)


def purge_of_writing(patch: Patch) -> None:
    """What was being written when it was purged is committed after all."""
    patch.setattr("kvstore.core.offers.FORBIDDEN", 0)


def sweep(patch: Patch) -> None:
    """What was purged or dropped is never freed."""
    patch.setattr(Purging, "sweep", lambda *_: 0)


def watch_gap(patch: Patch) -> None:
    """A watcher that was away for too long is told what is still known, not that more is missing."""
    patch.setattr(ChangeLog, "horizon", property(lambda _: 0, lambda *_: None), raising=False)


def watch_torn(patch: Patch) -> None:
    """A batch ends wherever it is full."""
    since = ChangeLog.since

    def torn(log: ChangeLog, revision: int, namespaces: Any, changes_max: int) -> Any:
        changes, upto = since(log, revision, namespaces, changes_max)
        return changes[:changes_max], upto

    patch.setattr(ChangeLog, "since", torn)


def watch_of_evictions(patch: Patch) -> None:
    """Evictions go without saying."""

    def evict(retiring: Retiring, slot: int) -> None:
        retiring._index.retire(slot, retiring.advance())

    patch.setattr(Retiring, "evict", evict)


def drop(patch: Patch) -> None:
    """Dropped epochs are served on."""
    advance = EpochTable.advance

    def keeps(table: EpochTable, model: str, number: int, policy: EpochPolicy, revision: int) -> bool:
        return advance(table, model, number, EpochPolicy(policy.stale_lag_max), revision)

    patch.setattr(EpochTable, "advance", keeps)


def stale_lag(patch: Patch) -> None:
    """A snapshot sees KV as old as it asks for, whatever the model allows."""

    def as_asked(snapshot: Snapshot, *rest: Any) -> Any:
        view = view_of(snapshot, *rest)
        if isinstance(view, MissReason):
            return view
        return view._replace(oldest=view.number - snapshot.stale_lag_max)

    patch.setattr("kvstore.core.past.view_of", as_asked)


def floor(patch: Patch) -> None:
    """What is computed over lossy or stale blocks is published as if it were not."""
    patch.setattr(Lineage, "absorb", lambda lineage, *_: lineage)


def quota(patch: Patch) -> None:
    """A tenant may hold all there is."""
    patch.setattr(DriverConfig, "core", lambda config: dataclasses.replace(_core(config), quotas={}))


_core = DriverConfig.core


def quota_in_silence(patch: Patch) -> None:
    """What is over a quota is dropped, and answered as if it were there."""
    reserve = Offers._reserve_one

    def silently(offers: Offers, txn: Txn, space: Space, epoch_id: int, i: int, offer: Offer) -> None:
        reserve(offers, txn, space, epoch_id, i, offer)
        if txn.refused.get(i) is Refusal.QUOTA and len(offers._index):
            txn.refused[i] = Refusal.EXISTS
            txn.slots[i] = next(iter(offers._index.slots()))

    patch.setattr(Offers, "_reserve_one", silently)


def tenancy(patch: Patch) -> None:
    """A reference is good in any namespace."""
    resolve = ShardCore.resolve

    def anywhere(core: ShardCore, namespace: NamespaceId, ref: BlockRef) -> object:
        row = core.index.at(ref.slot, ref.generation)
        return resolve(core, namespace if row is None else row.namespace, ref)

    patch.setattr(ShardCore, "resolve", anywhere)


def key_of_another_tenant(patch: Patch) -> None:
    """Keys are looked up whatever namespace they are of."""
    space = Index.space

    def any_space(index: Index, namespace: NamespaceId) -> Space:
        return index.by_index[0] if namespace in index.spaces else space(index, namespace)

    patch.setattr(Index, "space", any_space)


def snapshot_gains(patch: Patch) -> None:
    """A snapshot sees what was committed after it."""
    patch.setattr(Versions, "stands_at", lambda *_: True)


def horizon(patch: Patch) -> None:
    """A snapshot is answered with what is left of its time."""
    patch.setattr(Space, "horizons", property(lambda _: {}, lambda *_: None))


def compaction(patch: Patch) -> None:
    """Snapshots below the horizon are answered all the same."""
    patch.setattr(Past, "cannot_read_at", lambda *_: None)


def tardy(patch: Patch) -> None:
    """Acknowledged and not yet seen: a match sees what there was before the last commit."""

    def before(*asked: Any) -> Any:
        keys, view, space, versions, known = asked
        slots, miss = run_of(keys, view, space, versions, known)
        newest = max(versions.created, default=0)
        fresh = next((i for i, slot in enumerate(slots) if versions.created[slot] == newest), len(slots))
        return slots[:fresh], MissReason.ABSENT if fresh < len(slots) else miss

    patch.setattr("kvstore.core.past.run_of", before)


MUTATIONS: dict[Callable[[Patch], None], int] = {
    generation: 30,
    incarnation: 30,
    digest: 20,
    header: 20,
    pin: 20,
    exists_pin: 100,
    epochs: 20,
    no_reaping: 20,
    purge: 20,
    purge_of_keys: 20,
    purge_of_writing: 60,
    sweep: 20,
    watch_gap: 20,
    watch_torn: 20,
    watch_of_evictions: 20,
    drop: 20,
    stale_lag: 20,
    floor: 20,
    quota: 20,
    quota_in_silence: 20,
    tenancy: 20,
    key_of_another_tenant: 20,
    snapshot_gains: 30,
    horizon: 20,
    compaction: 20,
    tardy: 20,
    **TIER_MUTATIONS,
}
"""What is broken -> within how many seeds it is found."""


def seeds_needed(mutation: Callable[[Patch], None], patch: Patch) -> tuple[int, str] | None:
    """How many seeds it took, and what was found; None when it outlived them all."""
    mutation(patch)
    for seed in range(MUTATIONS[mutation]):
        try:
            run_seed(seed)
        except AssertionError as error:
            return seed + 1, str(error)
    return None


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_dies(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    if seeds_needed(mutation, monkeypatch) is None:
        pytest.fail(f"not found within {MUTATIONS[mutation]} seeds: {mutation.__doc__}")


def main(chosen: list[str]) -> int:
    """Print the table. How many mutations live."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    alive = 0
    print(f"{'mutation':24}{'seeds':>6}{'bound':>7}  found as")
    for mutation, bound in MUTATIONS.items():
        if chosen and mutation.__name__ not in chosen:
            continue
        with pytest.MonkeyPatch.context() as patch:
            found = seeds_needed(mutation, patch)
        alive += found is None
        seeds, what = ("-", "NOT FOUND") if found is None else found
        print(f"{mutation.__name__:24}{seeds:>6}{bound:>7}  {what.splitlines()[0][:90]}", flush=True)
    return alive


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
