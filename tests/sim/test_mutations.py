"""The proof of the proof: each safety broken on purpose is found within a stated number of seeds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import structlog

from kvstore.core.chain import view_of
from kvstore.core.holds import Holds
from kvstore.core.leases import LeaseTable
from kvstore.core.shard import ShardCore
from kvstore.core.versions import Versions
from kvstore.frame import HEADER_NBYTES, decode_header
from kvstore.nouns import BlockRef, NamespaceId
from kvstore.tiers.host import HostTier
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
    patch.setattr(Holds, "hold", lambda *_: None)


def epochs(patch: Patch) -> None:
    """KV of any weights will do."""
    patch.setattr(
        "kvstore.core.shard.view_of",
        lambda *asked: view_of(*asked)._replace(oldest=0, number=1 << 62),  # type: ignore[union-attr]
    )


def no_reaping(patch: Patch) -> None:
    """Leases never end by themselves."""
    patch.setattr(LeaseTable, "past_end", lambda *_: [])


MUTATIONS: dict[Callable[[Patch], None], int] = {
    generation: 150,
    incarnation: 100,
    digest: 60,
    header: 60,
    pin: 20,
    exists_pin: 20,
    epochs: 60,
    no_reaping: 20,
}
"""What is broken -> within how many seeds it is found."""


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_dies(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    for seed in range(MUTATIONS[mutation]):
        try:
            run_seed(seed)
        except AssertionError:
            return
    pytest.fail(f"not found within {MUTATIONS[mutation]} seeds: {mutation.__doc__}")
