"""What the prefill role does with one prompt: to its first token, and from there to the handoff.

Both are coroutines that may be cancelled at any wait: whatever they took by then stands in the `Prefilling`,
and the role gives it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from engine.boot import Worker
from engine.errors import WeightsChanged
from engine.onboard import Onboarded, misses_of
from engine.parallel.session import NO_NAMESPACE, key_chain
from engine.types import FirstToken, Handoff, PrefillStats, TokenEvent
from engine.updating import BEGINNINGS_MAX
from kvstore.answers import Match
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.hashing import KeyChain
from kvstore.nouns import MissReason, PinnedBlock, Tier
from prefill.sequence import Prefilling

__all__ = ["assemble_handoff", "compute_first_token"]

_GONE_THERE: Final = frozenset({MissReason.ABSENT, MissReason.OTHER_EPOCH, MissReason.LOW_QUALITY})
"""The store has looked, and has no such block. (A shard that is away has not.)"""


async def compute_first_token(worker: Worker, run: Prefilling) -> FirstToken:
    """Look at home and in the store, onboard, admit, wait for the token. The time in the engine's queue
    counts as compute. When the weights change before the token is drawn it begins again, unless it may keep
    what it has."""
    arrived = worker.clock.now()
    for _ in range(BEGINNINGS_MAX):
        try:
            return await _compute(worker, run, arrived)
        except WeightsChanged:
            worker.role_counters["prefill:begun_again"] += 1
            run.let_go(worker)
            run.begin_again(worker.store.epoch)
    raise Unavailable(f"the weights changed {BEGINNINGS_MAX} times under {run.name}: ask again")


async def _compute(worker: Worker, run: Prefilling, arrived: float) -> FirstToken:
    as_of = worker.loop.changes
    if run.lineage.epoch != worker.store.epoch:  # they changed between its enlisting and this turn
        run.begin_again(worker.store.epoch)
    run.lineage = run.lineage.absorb(run.lineage.epoch, worker.kv_quality)  # all it reads lies in our pool
    run.session = await worker.store.session(run.request.tenant)
    chain = key_chain(run.session, worker.info.layout.block_tokens)
    chain.extend(run.tokens)
    if worker.loading.locked():
        worker.announcer.announce(run.session, chain.keys[: _usable_blocks(run, chain)])
    async with worker.turn_to_load(run.request, arrived):
        stats = await _onboard_and_admit(worker, run, chain, arrived, as_of)
    admitted = worker.clock.now()
    event = await _drawn(worker, run)
    worker.gate.computed(stats.cached_tokens, len(run.tokens), worker.clock.now() - admitted)
    stats = replace(stats, epochs=run.epochs)
    return FirstToken(replace(event, epochs=run.epochs), stats, run.lineage.epoch)


async def _onboard_and_admit(
    worker: Worker, run: Prefilling, chain: KeyChain, arrived: float, as_of: int
) -> PrefillStats:
    """What lies here -> match -> read the rest -> admit. The stats are whole but for the computing that
    begins now. All is matched, also what lies here: decode may be elsewhere, and goes on from what is
    pinned."""
    clock, limits = worker.clock, worker.limits
    usable = _usable_blocks(run, chain)
    run.local = worker.lend(run.session, run.request.tenant, chain, usable, _owner(worker, run))
    match = await _match(worker, run, chain)
    await _obey(worker, run, match)
    held = 0 if run.local is None else len(run.local.blocks)
    if run.local is not None:
        run.lineage = run.local.over(run.lineage)
    matched = clock.now()
    onboarded = Onboarded(run.lineage)
    tiers = [block.tier for block in match.blocks[held:]]
    worth = worker.gate.admit(tiers, len(run.tokens), start=held * chain.block_tokens)
    if run.session is not None:
        onboarded = await worker.onboarding.read(
            run.session, match.blocks[held : held + worth], run.lineage, timeout_s=limits.read_timeout_s
        )
    loaded = clock.now()
    worker.gate.loaded(tiers[:worth], len(onboarded.payloads), loaded - matched)
    run.lineage = onboarded.lineage
    run.attends_to(onboarded.epochs)
    run.publication = worker.publisher.open(
        run.session, chain, run.lineage, owner=_owner(worker, run), pin_for_s=limits.lease_s
    )
    if run.local is not None:
        run.local.will_keep(run.lineage, onboarded.origins)
    await worker.loop.admit(
        run.request,
        run,
        local=run.local,
        blocks=onboarded.payloads,
        hold=True,
        timeout_s=limits.admit_timeout_s,
        arrived_at=arrived,
        as_of=as_of,
    )
    read = len(onboarded.payloads)
    ended_by = onboarded.miss
    if run.local is not None and run.local.recalled:
        held, read, ended_by = 0, 0, MissReason.ABSENT
    run.onboarded = tuple(match.blocks[: held + read])
    by_tier = _by_tier(match.blocks[held : held + read], held, chain.block_tokens)
    return PrefillStats(
        prompt_tokens=len(run.tokens),
        cached_tokens=sum(by_tier.values()),
        cached_by_tier=by_tier,
        misses=dict(
            misses_of(
                usable,
                max(held, len(match.blocks)),
                held + read,
                match.miss,
                ended_by,
                len(tiers) - worth,
            )
        ),
    )


async def _obey(worker: Worker, run: Prefilling, match: Match) -> None:
    """What the store says it has no more is not used from here either: it may have been purged, which cannot
    be told from eviction, and what was purged must not come back through a pool. It is computed, and written
    anew.

    A dropped epoch is dropped here too: nothing more of it is served.
    """
    local = run.local
    if local is None or worker.edge is None:
        return
    if match.miss is MissReason.DROPPED_EPOCH:
        local.give_up()
        await worker.edge.forget(local.namespace, local.epoch.number)
    elif match.miss in _GONE_THERE and len(match.blocks) < len(local.blocks):
        local.give_up()


async def _drawn(worker: Worker, run: Prefilling) -> TokenEvent:
    limit_s = worker.limits.compute_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await run.drawn
    except TimeoutError:
        raise DeadlineExceeded(f"{run.name} had no first token within {limit_s:.0f} s") from None


async def assemble_handoff(worker: Worker, run: Prefilling, first: FirstToken) -> Handoff | None:
    """Everything decode needs. The leases stand in `run.leases` until the role passes them on."""
    if first.event.finish is not None or run.publication is None:
        return None
    if not await run.publication.settle(worker.limits.handoff_timeout_s):
        worker.role_counters["prefill:handoffs_not_settled"] += 1
    run.leases = (*run.leases, *run.publication.take_leases())
    await _renew_if_old(worker, run)
    full = len(run.tokens) // worker.info.layout.block_tokens
    blocks = _gapless(run.onboarded, run.publication.pins)
    if len(blocks) < full and run.publication.left_to_others:
        blocks = await _match_again(worker, run, full, blocks)
    covers = len(blocks) == full
    tail = await worker.loop.take_tail(run.request.request_id) if covers else None
    output_ids = (*run.request.output_ids, first.event.token_id)
    return Handoff(
        request=replace(run.request, output_ids=output_ids),
        namespace=run.session.namespace if run.session else NO_NAMESPACE,
        epoch=run.lineage.epoch,
        floor=run.lineage.floor,
        foreign=run.lineage.foreign,
        blocks=blocks,
        leases=tuple(run.leases),
        tail=tail,
        next_position=len(run.tokens),
    )


async def _match(worker: Worker, run: Prefilling, chain: KeyChain) -> Match:
    """At most all but the last token: the one that is computed gives the logits to draw from."""
    if run.session is None:
        return Match((), (), MissReason.SHARD_UNAVAILABLE)
    match = await worker.onboarding.match(
        run.session,
        chain.keys[: _usable_blocks(run, chain)],
        owner=_owner(worker, run),
        lease_s=worker.limits.lease_s,
        timeout_s=worker.limits.match_timeout_s,
    )
    run.leases, run.leased_at = match.leases, worker.clock.now()
    return match


async def _match_again(
    worker: Worker, run: Prefilling, full: int, blocks: tuple[PinnedBlock, ...]
) -> tuple[PinnedBlock, ...]:
    """What another request was writing when this one offered it is not pinned for this one: the same prompt
    asked for several answers at once, mostly. It may be there by now."""
    if run.session is None:
        return blocks
    chain = key_chain(run.session, worker.info.layout.block_tokens)
    chain.extend(run.tokens)
    match = await worker.onboarding.match(
        run.session,
        chain.keys[:full],
        owner=_owner(worker, run),
        lease_s=worker.limits.lease_s,
        timeout_s=worker.limits.match_timeout_s,
    )
    run.leases = (*run.leases, *match.leases)
    return tuple(match.blocks) if len(match.blocks) > len(blocks) else blocks


async def _renew_if_old(worker: Worker, run: Prefilling) -> None:
    """Pins that have run for half their time are extended, so that decode gets at least that much.

    One that is gone already costs decode a miss.
    """
    limits = worker.limits
    if run.session is None or not run.leases or worker.clock.now() - run.leased_at < limits.lease_s / 2:
        return
    try:
        async with asyncio.timeout(limits.handoff_timeout_s):
            renewed = await run.session.renew(run.leases, limits.lease_s)
    except TimeoutError:
        renewed = False
    worker.role_counters["prefill:leases_not_renewed"] += not renewed


def _usable_blocks(run: Prefilling, chain: KeyChain) -> int:
    return (len(run.tokens) - 1) // chain.block_tokens


def _by_tier(read: Sequence[PinnedBlock], held: int, block_tokens: int) -> dict[str, int]:
    tokens = {Tier.DEVICE.name.lower(): held * block_tokens} if held else {}
    for block in read:
        tier = block.tier.name.lower()
        tokens[tier] = tokens.get(tier, 0) + block_tokens
    return tokens


def _gapless(
    onboarded: tuple[PinnedBlock, ...], published: dict[int, PinnedBlock]
) -> tuple[PinnedBlock, ...]:
    """The chain from its first block on, up to the first one that is not pinned in the store."""
    blocks = list(onboarded)
    while len(blocks) in published:
        blocks.append(published[len(blocks)])
    return tuple(blocks)


def _owner(worker: Worker, run: Prefilling) -> str:
    return f"{worker.info.worker_id}/{run.request.request_id}/{run.request.attempt}"
