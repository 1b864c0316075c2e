"""The scheduler's half: which requests' KV lies in the store, what to load and what to save in each step.

Called by vLLM's scheduler, whose thread it never makes wait for the store: what takes time runs beside it
(lookups.py), and a step that has nothing else to do leaves it the interpreter for IDLE_S at most.
A step costs a comparison for each running request, and more only for those that complete a block of ours in
it. What cannot be found, loaded or saved is computed or left out, and counted by its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import structlog

from kvstore.integrations.vllm.events import StoreEvents
from kvstore.integrations.vllm.figures import Figures
from kvstore.integrations.vllm.handoff import announced, answered
from kvstore.integrations.vllm.identity import Identity
from kvstore.integrations.vllm.lookups import Lookups, Question
from kvstore.integrations.vllm.plans import Load, StepPlan
from kvstore.integrations.vllm.requests import (
    Phase,
    StepOutput,
    Tracked,
    VllmRequest,
    loadable,
    why_not,
)
from kvstore.integrations.vllm.save_plans import NO_END, next_save, save_of
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.siblings import Siblings
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.nouns import Epoch, Tier, WeightsDigest

__all__ = ["Scheduling"]

ASKED_MAX: Final = 256
"""Requests whose look-ups run or hold pins at one time; the others ask when vLLM wants to schedule them. Half
of them may ask at their arrival, so that who comes last does not take the turns of those that wait."""
WAITING_PART: Final = 4
"""One in so many of them may wait for a prefill instance: any client can say that one is at work."""
IDLE_S: Final = 0.002
"""What a step in which nothing is computed waits at most for a look-up that is under way."""

log = structlog.get_logger(__name__)


class Scheduling:
    """`has_free_cache` says whether none of vLLM's blocks is in use or cached any more; `hash_tokens`, how
    many tokens one of its hashes is of, where its KV events are wanted (None: they are not)."""

    def __init__(
        self,
        setup: Setup,
        side: StoreSide,
        weights: Callable[[], WeightsDigest],
        has_free_cache: Callable[[], bool],
        hash_tokens: int | None = None,
    ) -> None:
        self.figures = Figures()
        side.count = self.figures.count
        self.identity = Identity(side, setup, weights)
        self.lookups = Lookups(side, setup, self.identity, self.figures)
        self._side = side
        self._setup = setup
        self._clock = side.clock
        self._has_free_cache = has_free_cache
        self._block = setup.specs[0].layout.block_tokens
        self._vllm_block = setup.vllm_block_tokens
        self._requests: dict[str, Tracked] = {}
        self._gone_loading: dict[str, Tracked] = {}  # ended, but the workers still write into their blocks
        self._asked = 0
        self._waiting: set[str] = set()  # of those asked, for a prefill instance
        self._siblings = Siblings()
        self.events: StoreEvents | None = None
        if hash_tokens is not None:
            self.events = StoreEvents(self._block, hash_tokens, len(setup.specs), self.figures)
        self._loads: list[Load] = []
        self._ended: list[str] = []
        self._saves = setup.saves and setup.config.save != "none"
        self._may_save = self._saves
        self.identity.begin()

    # -- a request's way ---------------------------------------------------------------------------

    def on_new_request(self, request: VllmRequest) -> None:
        if self._is_left_out(request):
            return
        config = self._setup.config
        tracked = Tracked(
            request,
            self.identity.generation,
            save_until=request.num_prompt_tokens if config.save == "prompt" else NO_END,
            is_handoff=bool((request.kv_transfer_params or {}).get("do_remote_decode")),
        )
        tracked.adapter = None if request.lora_request else ""
        tracked.save_at = next_save(tracked, self._block)
        self._requests[request.request_id] = tracked
        if self._asked < ASKED_MAX // 2:
            self._ask(tracked)

    def matched(self, request: VllmRequest, computed: int) -> tuple[int | None, bool]:
        """How many tokens behind vLLM's own hit can be loaded; None while that is not known."""
        self._siblings.asked(request.request_id, computed)
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.phase is Phase.OVER:
            return 0, False
        if self._is_left_out(request):
            self._let_go(tracked)
            return 0, False
        if tracked.phase is Phase.NEW:
            if self._asked < ASKED_MAX:
                self._ask(tracked)
            elif self._loads_of(tracked):
                return self._wait_for_a_turn(tracked)
        lookup = tracked.lookup
        if lookup is None or not self._loads_of(tracked):
            if tracked.phase is Phase.ASKED:
                self._let_go(tracked)
            return 0, False
        if not lookup.done:
            if self._clock.now() < tracked.give_up_at:
                return None, False
            self.figures.count("miss:lookup_timeout")
            self._let_go(tracked)
            return 0, False
        self._learn(tracked)
        hit, tokens = lookup.hit, 0  # read once: the loop takes it away when a lease is lost
        if hit is not None:
            tokens = loadable(hit.tokens, request.num_tokens, computed, self._vllm_block)
        if tokens < max(1, self._setup.config.min_load_tokens):
            return 0, False
        tracked.told, tracked.hit = computed, hit
        return tokens, True

    def allocated(self, request_id: str, block_ids: Sequence[int], tokens: int) -> None:
        """vLLM has the blocks to load `tokens` into; 0: it wants nothing (more) loaded for this request."""
        tracked = self._requests.get(request_id)
        if tracked is None or tracked.phase is not Phase.ASKED:
            return
        hit = tracked.hit
        if tokens == 0 or hit is None:
            self._learn(tracked)
            self._let_go(tracked)
            return
        self._siblings.loading(request_id, tokens)
        begin, end = tracked.told, tracked.told + tokens
        first, last = begin // self._block, -(-end // self._block)
        tracked.block_ids = list(block_ids)
        tracked.phase, tracked.load_end = Phase.LOADING, end
        self._loads.append(
            Load(
                request_id,
                hit.epoch,
                begin,
                end,
                tuple(run[first:last] for run in hit.runs),
                tuple(block_ids[: -(-end // self._vllm_block)]),
                tracked.adapter or "",
            )
        )
        if self.events is not None:
            self.events.found(tracked.request, hit.runs[0], begin, end)
        self.figures.count("hits")
        self.figures.count("hit_tokens", tokens)

    def sources(self, request_id: str, tokens: int) -> dict[Tier, int]:
        """Where `tokens` that are about to be loaded lie, by the tier of their blocks on rank 0."""
        tracked = self._requests.get(request_id)
        if tracked is None or tracked.hit is None:
            return {}
        return tracked.hit.by_tier(tracked.told, tracked.told + tokens)

    def finished(self, request: VllmRequest) -> dict[str, Any] | None:
        """The request ended, however it did. What a decode instance should be told, if one will ask."""
        if self._siblings.have_loaded(request.request_id, request.num_computed_tokens):
            self._stop_saving()  # ended before its first step, yet vLLM may keep what was loaded
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return None
        epoch, answer = self.identity.epoch, None
        if tracked.is_handoff and epoch is not None and tracked.generation == self.identity.generation:
            answer = answered(tracked.kept, epoch)
        if tracked.phase is Phase.LOADING:
            self._gone_loading[request.request_id] = tracked
        else:
            self._let_go(tracked, self._setup.config.handoff_timeout_s if answer else 0.0)
        if tracked.chained or tracked.phase is Phase.LOADING:
            self._ended.append(request.request_id)
        return answer

    # -- a step ------------------------------------------------------------------------------------

    def plan(self, output: StepOutput) -> StepPlan:
        plan = StepPlan(self._loads, [], self._ended, is_idle=not output.num_scheduled_tokens)
        if plan.is_idle and not self._loads:
            self.lookups.wait_for_an_answer(IDLE_S)
        self._loads, self._ended = [], []
        for request_id in output.preempted_req_ids or ():
            if (preempted := self._requests.get(request_id)) is not None:
                self._preempted(preempted, plan)
        if self._siblings.have_loaded_in(output):
            self._stop_saving()  # also what this step saves: its requests may stand on each other's blocks
        epoch = self.identity.epoch if self._may_save else None
        scheduled, requests = output.num_scheduled_tokens, self._requests
        for new in output.scheduled_new_reqs:
            tracked = requests.get(new.req_id)
            if tracked is not None:
                tracked.block_ids = list(new.block_ids[0])
                after = new.num_computed_tokens + scheduled[new.req_id]
                if epoch is not None and after >= tracked.save_at:
                    self._advance(tracked, after, epoch, plan)
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            tracked = requests.get(request_id)
            if tracked is None:
                continue
            if blocks is not None:
                if request_id in cached.resumed_req_ids:
                    tracked.block_ids = list(blocks[0])
                else:
                    tracked.block_ids += blocks[0]
            after = computed + scheduled[request_id]
            if epoch is not None and after >= tracked.save_at:
                self._advance(tracked, after, epoch, plan)
        return plan

    def loaded(self, request_ids: Iterable[str], failed_blocks: set[int]) -> None:
        """What the workers reported: loads that ended on all of them, and vLLM's blocks that have nothing."""
        if failed_blocks:
            for tracked in self._requests.values():
                if tracked.phase is Phase.LOADING:
                    self._failed(tracked, failed_blocks)
        for request_id in request_ids:
            gone = self._gone_loading.pop(request_id, None)
            ended = gone if gone is not None else self._requests.get(request_id)
            if ended is not None and ended.phase is Phase.LOADING:
                self._let_go(ended)

    # -- the whole ---------------------------------------------------------------------------------

    def reset(self) -> bool:
        """The weights may be others. False: blocks of before are still in vLLM's own cache, so that nothing
        may be saved until a reset finds it empty."""
        self.identity.reset()
        for tracked in self._requests.values():
            if tracked.phase is not Phase.LOADING:
                self._let_go(tracked)
        is_clean = self._has_free_cache()
        self._may_save = is_clean and self._saves
        if not is_clean:
            self.figures.count("resets_incomplete")
            log.warning("KV of before the reset is still in use: nothing is saved until the next reset")
        return is_clean

    def close(self) -> None:
        for tracked in [*self._requests.values(), *self._gone_loading.values()]:
            self._let_go(tracked)
        self._requests.clear()
        self._gone_loading.clear()

    # -- inside ------------------------------------------------------------------------------------

    def _wait_for_a_turn(self, tracked: Tracked) -> tuple[int | None, bool]:
        now = self._clock.now()
        tracked.give_up_at = tracked.give_up_at or now + self._setup.config.lookup_timeout_s
        if now < tracked.give_up_at:
            return None, False
        self.figures.count("miss:no_turn")
        tracked.phase = Phase.OVER
        return 0, False

    def _ask(self, tracked: Tracked) -> None:
        request, config = tracked.request, self._setup.config
        is_loading = self._loads_of(tracked)
        if not (is_loading or self._saves or tracked.is_handoff):
            tracked.phase = Phase.OVER
            return
        at_least = announced(request.kv_transfer_params, self.identity.epoch) if is_loading else 0
        at_least = min(at_least, request.num_tokens) // self._block * self._block
        if tracked.has_waited:
            at_least = 0
        elif at_least and len(self._waiting) >= ASKED_MAX // WAITING_PART:
            self.figures.count("handoffs_not_waited_for")
            at_least = 0
        elif at_least:
            self._waiting.add(request.request_id)
            tracked.has_waited = True
        wait_s = config.handoff_timeout_s if at_least else 0.0
        tracked.lookup = self.lookups.begin(
            Question(
                np.array(request.all_token_ids[:], dtype="<u4"),
                request.cache_salt or "",
                request.lora_request,
                at_least,
                wait_s,
                hold=is_loading or tracked.is_handoff,
            )
        )
        tracked.phase = Phase.ASKED if is_loading else Phase.OVER
        tracked.give_up_at = self._clock.now() + wait_s + config.lookup_timeout_s
        self._asked += 1

    def _loads_of(self, tracked: Tracked) -> bool:
        """Whether it may load anything, ever."""
        return (
            self._setup.loads
            and tracked.may_load
            and tracked.generation == self.identity.generation
            and not tracked.request.skip_reading_prefix_cache
        )

    def _learn(self, tracked: Tracked) -> None:
        """What its look-up found need not be saved; and what its adapter is called."""
        lookup = tracked.lookup
        if lookup is None or not lookup.done:
            return
        self._waiting.discard(tracked.request.request_id)
        tracked.adapter = lookup.adapter
        if lookup.found > tracked.kept and tracked.generation == self.identity.generation:
            tracked.kept = lookup.found
            tracked.save_at = next_save(tracked, self._block)
        if tracked.phase is Phase.OVER and not tracked.is_handoff:
            self._let_go(tracked)  # it wanted to know, no more: others wait for the turn

    def _let_go(self, tracked: Tracked, leave_for_s: float = 0.0) -> None:
        if tracked.lookup is not None:
            self.lookups.drop(tracked.lookup, leave_for_s)
            tracked.lookup = tracked.hit = None
            self._asked -= 1
            self._waiting.discard(tracked.request.request_id)
        tracked.phase = Phase.OVER

    def _preempted(self, tracked: Tracked, plan: StepPlan) -> None:
        """vLLM took its blocks, and will schedule it again from nothing: what it saved may be found then."""
        if tracked.chained:
            plan.ended.append(tracked.request.request_id)
            tracked.chained = 0
        tracked.block_ids = []
        if tracked.phase is Phase.OVER and self._loads_of(tracked):
            self._let_go(tracked)
            tracked.phase, tracked.give_up_at = Phase.NEW, 0.0

    def _failed(self, tracked: Tracked, failed_blocks: set[int]) -> None:
        blocks = tracked.block_ids[: -(-tracked.load_end // self._vllm_block)]
        at = next((i for i, block in enumerate(blocks) if block in failed_blocks), None)
        if at is None:
            return
        self.figures.count("loads_failed")
        tracked.may_load = False  # what is broken may be found again: compute it
        tracked.kept = min(tracked.kept, at * self._vllm_block // self._block * self._block)
        tracked.save_at = next_save(tracked, self._block)

    def _stop_saving(self) -> None:
        """Another connector loads, and vLLM's own cache mixes requests: nobody can say what KV is made of."""
        self.figures.count("other_connector_loads")
        if self._may_save:
            self._may_save = False
            log.warning(
                "another connector of this vLLM loads KV: nothing is saved until a reset finds vLLM's cache "
                "empty. Let one connector load, or give this one kv_role kv_consumer"
            )

    def _is_left_out(self, request: VllmRequest) -> bool:
        reason = why_not(request)
        if reason is not None:
            self.figures.count(f"left_out:{reason}")
        return reason is not None

    def _advance(self, tracked: Tracked, after: int, epoch: Epoch, plan: StepPlan) -> None:
        """This step computes its KV up to `after` tokens. What was drawn in steps that run ahead of the
        scheduler, and drafts, are in no `all_token_ids` yet: those blocks are saved once they are known."""
        if tracked.generation != self.identity.generation or self._is_left_out(tracked.request):
            tracked.save_at = NO_END
            return
        self._learn(tracked)
        if tracked.adapter and not self.lookups.adapters.still_named(tracked.request.lora_request):
            tracked.adapter = None
        if tracked.adapter is None:
            if tracked.lookup is None or tracked.lookup.done:
                self.figures.count("left_out:adapter")
                tracked.save_at = NO_END
            return
        request = tracked.request
        end = min(after, request.num_tokens, tracked.save_until) // self._block * self._block
        if end <= tracked.kept:
            return
        if self.events is not None:
            self.events.saving(request)
        self.figures.count("saved_tokens", end - tracked.kept)
        plan.saves.append(save_of(tracked, tracked.adapter, epoch, end, self._setup))
