"""What users of the simulated store do more rarely, and what must hold of it.

Deletion, compaction, new weights under every policy, snapshots of the past, blocks computed over blocks,
and reaching for what belongs to another tenant.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field

from kvstore.errors import KVStrataError
from kvstore.hashing import STRIPE_BLOCKS, KeyChain
from kvstore.lineage import Lineage
from kvstore.nouns import (
    DROP,
    ISOLATE,
    BlockKey,
    BlockRef,
    Quality,
    Revision,
    Snapshot,
    allow_stale,
)
from kvstore.placement import owner
from kvstore.session import StoreSession
from kvstore.transport.base import MatchResult, Purge
from tests.kvstore.oracle import SPEC
from tests.sim.client import CHAIN_BLOCKS, LEASE_S, TIMEOUT_S, Client, Deed, Held
from tests.sim.history import NotingTransport
from tests.sim.writings import Broken, Writing

POLICIES = (ISOLATE, allow_stale(1), allow_stale(2), allow_stale(2), DROP)
AUDITS_KEPT = 4


@dataclass(slots=True)
class Audit:
    """What a shard held of some keys at a revision, as one client once saw it."""

    transport: NotingTransport
    session: StoreSession
    snapshot: Snapshot
    keys: list[BlockKey]
    refs: list[BlockRef]
    writings: dict[int, Writing] = field(default_factory=dict)


async def purge(client: Client) -> None:
    """Delete some keys, an epoch, or everything, on every shard."""
    rng, session = client.world.rng, await client.session()
    if session is None:
        return
    keys, epoch, how = None, None, rng.random()
    if how < 0.6:
        made = client.chain(session)
        keys = tuple(made.keys[rng.randrange(CHAIN_BLOCKS) :][: rng.randrange(1, 6)])
    if 0.4 < how < 0.85:
        epoch = session.epoch.number
    if client.audits and rng.random() < 0.5:  # of what it may look at again
        audit = max(client.audits, key=lambda a: (a.snapshot.stale_lag_max > 0, len(a.refs)))
        session, keys = audit.session, tuple(audit.keys[rng.randrange(len(audit.keys)) :])
        epoch = session.epoch.number
    scope = Purge(session.namespace, keys, epoch)
    await _all(client, [t.purge(scope, timeout_s=TIMEOUT_S) for t in client.transports])
    await look_back(client)


async def compact(client: Client) -> None:
    """Up to what was lately seen: watchers and snapshots of before must start anew."""
    rng = client.world.rng
    for transport in client.transports:
        seen = [a.snapshot.revision for a in client.audits if a.transport is transport]
        at = rng.choice(seen) if seen else None
        if at is None:
            continue
        ahead = rng.random() < 0.5
        at = (
            Revision(at.incarnation, client.world.hosts[transport.shard].driver.core.revision)
            if ahead
            else at
        )
        await _all(client, [transport.compact(at, timeout_s=TIMEOUT_S)])
    await look_back(client)


async def advance(client: Client) -> None:
    """New weights: this client serves them from now on, others serve the old ones. Or another policy."""
    world = client.world
    world.epoch += world.rng.random() < 0.7
    client.sessions.pop(world.epoch, None)
    session, policy = await client.session(), world.rng.choice(POLICIES)
    if session is not None:
        number = session.epoch.number
        calls = [
            t.advance_epoch(SPEC.model_id, number, policy, timeout_s=TIMEOUT_S) for t in client.transports
        ]
        await _all(client, calls)
        for old in [client.sessions[n] for n in client.sessions if n < number][-2:]:
            await client.match(old, client.chain(old).keys)


async def look_back(client: Client) -> None:
    """A snapshot at a revision never changes and never gains: what was missed once is missed for ever."""
    rng = client.world.rng
    if client.audits and rng.random() < 0.6:
        await _look_again(client, rng.choice(client.audits))
    elif client.held and rng.random() < 0.8:
        await _look_first(client, rng.choice(client.held))  # where something is, most likely
    else:
        await _look_first(client, None)


async def _look_again(client: Client, audit: Audit) -> None:
    since = client.world.witness.step()
    matched = await _match(client, audit.transport, audit.snapshot, audit.keys)
    if matched is None:
        return
    refs = [block.ref for block in matched.pinned(audit.transport.shard, audit.keys)]
    client.world.report.reasons[f"looked back:{_compared(refs, audit.refs)}"] += 1
    if refs != audit.refs[: len(refs)]:
        raise Broken(f"{audit.snapshot} has changed: {audit.refs} before, {refs} now")
    audit.refs = refs
    await _read(client, audit, matched, since)


async def compute(client: Client) -> None:
    """Blocks over blocks: what they are is what the worst of those they attended to is."""
    rng, session = client.world.rng, await client.session()
    if session is None:
        return
    made, known = client.chain(session), rng.randrange(1, CHAIN_BLOCKS)
    held = await client.match(session, made.keys[:known])
    if held is None:
        return
    await client.read(held, whole=True)
    if len(held.writings) < len(held.blocks):
        return  # a real engine would recompute the rest itself
    lineage, truth, foreign = Lineage(session.epoch), Quality.LOSSLESS, False
    for index, block in enumerate(held.blocks):
        lineage = lineage.absorb(block.epoch, held.qualities[index])
        truth = min(truth, held.qualities[index])  # of the bytes it read: they were looked at
        foreign = foreign or held.writings[index].epoch != session.epoch
    quality = lineage.publishable
    client.world.report.reasons[f"computed:{'kept' if quality is None else quality.name.lower()}"] += 1
    if quality is None:
        await _recompute(client, session, made, len(held.blocks))
    else:
        which = range(len(held.blocks), min(CHAIN_BLOCKS, len(held.blocks) + rng.randrange(1, 5)))
        mine = await client.publish_range(session, made, which, quality, truth, foreign)
        if mine is not None:
            await client.read(mine)


async def _recompute(client: Client, session: StoreSession, made: KeyChain, blocks: int) -> None:
    """With the new weights from the first block on; perhaps that is deleted, and the old is still there."""
    if await client.publish_range(session, made, range(blocks), Quality.LOSSLESS) is None:
        return
    await _look_first(client, client.held[-1])
    scope = Purge(session.namespace, tuple(made.keys[:blocks]), session.epoch.number)
    if client.world.rng.random() < 0.7:
        await _all(client, [t.purge(scope, timeout_s=TIMEOUT_S) for t in client.transports])
        if client.audits:
            await _look_again(client, client.audits[-1])


async def trespass(client: Client) -> None:
    """With another tenant's keys and references, in one's own namespace: nothing."""
    world, session = client.world, await client.session()
    theirs = [held for other in world.clients if other.tenant != client.tenant for held in other.held]
    if session is None or not theirs:
        return
    held = world.rng.choice(theirs)
    keys = [block.key for block in held.blocks]
    found = await session.match(keys, owner=client.name, lease_s=LEASE_S, timeout_s=TIMEOUT_S)
    if found.blocks:
        raise Broken(f"{client.tenant} matched keys of another tenant: {found.blocks}")
    for transport in client.transports:
        refs = [block.ref for block in held.blocks if block.ref.shard == transport.shard]
        try:
            async for item in transport.read(session.namespace, refs, timeout_s=TIMEOUT_S):
                if item.frame is not None:
                    raise Broken(f"{client.tenant} read what another tenant holds: {refs[item.index]}")
        except KVStrataError as error:
            client.count("trespass", [type(error).__name__])


DEEDS: Mapping[Deed, int] = {
    Client.publish: 6,
    Client.match_and_read: 6,
    Client.read_held: 3,
    Client.renew: 2,
    Client.let_go: 2,
    Client.idle: 1,
    look_back: 3,
    compute: 3,
    advance: 1,
    purge: 1,
    compact: 1,
    trespass: 1,
}
"""How often each, among all."""


async def _look_first(client: Client, held: Held | None) -> None:
    rng, session = client.world.rng, await client.session()
    if session is None:
        return
    if held is not None:
        session, shard = held.session, held.blocks[0].ref.shard
        keys = [block.key for block in held.blocks if block.ref.shard == shard]
    else:
        made, start = client.chain(session), rng.choice((0, STRIPE_BLOCKS))  # a stripe is on one shard
        shard = owner(made.placement(start), client.store.topology.weights())
        keys = made.keys[start : start + rng.randrange(1, STRIPE_BLOCKS + 1)]
    transport = next(transport for transport in client.transports if transport.shard == shard)
    since = client.world.witness.step()
    matched = await _match(client, transport, session._snapshot, keys)
    if matched is None:
        return
    snapshot = dataclasses.replace(session._snapshot, revision=matched.revision)
    refs = [block.ref for block in matched.pinned(transport.shard, keys)]
    audit = Audit(transport, session, snapshot, keys, refs)
    if refs or not client.audits:  # of nothing, little can be learnt but that it stays nothing
        client.audits = [*client.audits[1 - AUDITS_KEPT :], audit]
    await _read(client, audit, matched, since)


def _compared(now: list[BlockRef], before: list[BlockRef]) -> str:
    return "less" if len(now) < len(before) else "same" if now else "nothing"


async def _match(
    client: Client, transport: NotingTransport, snapshot: Snapshot, keys: list[BlockKey]
) -> MatchResult | None:
    try:
        return await transport.match(snapshot, keys, client.name, LEASE_S, timeout_s=TIMEOUT_S)
    except KVStrataError as error:
        client.count("snapshot", [type(error).__name__])
        return None


async def _read(client: Client, audit: Audit, matched: MatchResult, since: int) -> None:
    """What is read of a snapshot is read again, the same bytes, or not at all any more."""
    blocks = tuple(matched.pinned(audit.transport.shard, audit.keys))
    await client.read(Held(audit.session, blocks, (), since, 0.0, {}, audit.writings))
    if matched.lease is not None and client.world.rng.random() < 0.7:
        await _all(client, [audit.transport.release([matched.lease], timeout_s=TIMEOUT_S)])


async def _all(client: Client, calls: Sequence[Awaitable[object]]) -> None:
    for answer in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(answer, KVStrataError):
            client.count("deed", [type(answer).__name__])
        elif isinstance(answer, BaseException):
            raise answer
