"""What the decode role does with a handoff: take over the KV that prefill left, recompute what is missing.

What lies in the worker's own pool is used there. The pinned blocks behind it are read by reference, no
look-up needed; the tail comes with the handoff. A block that is gone, corrupt or late ends the usable prefix;
the engine computes everything behind it from the tokens. May be cancelled at any wait: what it took stands in
the `Decoding`, and the role gives it back.
"""

from __future__ import annotations

from collections import Counter

from decode.sequence import Decoding
from engine.boot import Worker
from engine.errors import WeightsChanged
from engine.onboard import Onboarded, misses_of
from engine.parallel.session import key_chain
from engine.types import Handoff, TailKV, WorkerInfo
from engine.updating import BEGINNINGS_MAX
from kvstore.errors import ConfigError, EpochConflict, Unavailable
from kvstore.frame import payload_checksum
from kvstore.nouns import MissReason

__all__ = ["check_handoff", "onboard_and_admit"]


def check_handoff(worker: Worker, handoff: Handoff) -> None:
    """Can this worker go on from it at all? Raises EpochConflict or ConfigError; cheap."""
    name, epoch = handoff.request.request_id, worker.store.epoch
    if handoff.epoch != epoch and handoff.epoch not in worker.weights.continued:
        raise EpochConflict(
            f"the handoff of request {name} is of epoch {handoff.epoch.number}, this worker has the weights "
            f"of epoch {epoch.number}: pair workers of one epoch, or prefill again"
        )
    known = len(handoff.request.prompt_ids) + len(handoff.request.output_ids)
    if not handoff.request.output_ids or handoff.next_position != known - 1:
        raise ConfigError(
            f"the handoff of request {name} goes on at position {handoff.next_position} but has {known} "
            "tokens: it must go on with the last of them"
        )


async def onboard_and_admit(worker: Worker, run: Decoding) -> None:
    """From the handoff to a sequence that runs. A handoff of weights that have changed here since is computed
    from its tokens. Raises what WorkerLoop.admit raises."""
    for _ in range(BEGINNINGS_MAX):
        if run.handoff.epoch != worker.store.epoch:
            worker.role_counters["decode:begun_again"] += 1
            run.begin_again(worker.store.epoch)
        try:
            return await _onboard(worker, run, worker.loop.changes)
        except WeightsChanged:
            continue
    raise Unavailable(f"the weights changed {BEGINNINGS_MAX} times under request {run.request_id}: ask again")


async def _onboard(worker: Worker, run: Decoding, as_of: int) -> None:
    run.lineage = run.lineage.absorb(run.lineage.epoch, worker.kv_quality)  # all it reads lies in our pool
    run.session = await worker.store.session(run.handoff.request.tenant)
    chain = key_chain(run.session, worker.info.layout.block_tokens)
    chain.extend(run.tokens)
    owner = f"{worker.info.worker_id}/{run.request_id}/{run.attempt}"
    async with worker.turn_to_load(run.handoff.request, worker.clock.now()):
        full = run.handoff.next_position // chain.block_tokens
        run.local = worker.lend(run.session, run.handoff.request.tenant, chain, full, owner)
        held = 0
        if run.local is not None:
            held, run.lineage = len(run.local.blocks), run.local.over(run.lineage)
        onboarded = await _read(worker, run, held)
        run.chain, run.lineage = chain, onboarded.lineage
        run.attends_to(onboarded.epochs)
        if run.local is not None:
            run.local.will_keep(run.lineage, onboarded.origins)
        run.publication = worker.publisher.open(
            run.session,
            chain,
            run.lineage,
            owner=owner,
            pin_for_s=None,
        )
        tail = _usable_tail(run.handoff, held + len(onboarded.payloads), worker.info, worker.role_counters)
        await worker.loop.admit(
            run.handoff.request,
            run,
            local=run.local,
            blocks=onboarded.payloads,
            tail=tail,
            timeout_s=worker.limits.admit_timeout_s,
            as_of=as_of,
        )


async def _read(worker: Worker, run: Decoding, held: int) -> Onboarded:
    """The blocks that prefill pinned behind those `held` here, as far as they arrive; what does not is
    counted by reason."""
    handoff, counters = run.handoff, worker.role_counters
    if run.session is None:
        onboarded = Onboarded(run.lineage, miss=MissReason.SHARD_UNAVAILABLE)
    elif run.session.namespace != handoff.namespace:
        onboarded = Onboarded(run.lineage, miss=MissReason.OTHER_NAMESPACE)
    else:
        onboarded = await worker.onboarding.read(
            run.session, handoff.blocks[held:], run.lineage, timeout_s=worker.limits.read_timeout_s
        )
    asked, used = handoff.next_position // worker.info.layout.block_tokens, held + len(onboarded.payloads)
    counters["decode:local_blocks"] += held
    counters["decode:onboarded_blocks"] += len(onboarded.payloads)
    there = max(held, len(handoff.blocks))
    for reason, blocks in misses_of(asked, there, used, None, onboarded.miss).items():
        counters[f"decode:recomputed_{reason}"] += blocks
    return onboarded


def _usable_tail(handoff: Handoff, blocks: int, info: WorkerInfo, counters: Counter[str]) -> TailKV | None:
    """The tail, if it stands right behind the onboarded blocks and its bytes are what prefill sent."""
    tail = handoff.tail
    full, rest = divmod(handoff.next_position, info.layout.block_tokens)
    if tail is None or blocks != full:
        return None
    fits = tail.tokens == rest and tail.payload.nbytes == rest * info.token_nbytes
    if not fits or payload_checksum(tail.payload.data) != tail.checksum:
        counters["decode:tails_rejected"] += 1
        return None
    return tail
