"""The engine: sequences in, tokens and full blocks out, one step at a time. It knows nothing of stores.

    admit(request, lent, ...)      copy in what others computed; the rest is computed by the next steps
    step()                         one forward pass: a row of every decoding sequence, then chunks of
                                   prompts within the token budget; draw tokens; copy out what became full
    take_tail(id), release(id)     what a handoff takes along; give the slots back

A sequence takes a slot when a step needs it; admission looks at what those who run are expected to need yet
(engine/admission.py). Where that was too little, who came last leaves with all its tokens
(`StepResult.preempted`), to be admitted again by the caller. A request that does not fit now is the caller's
to keep; `can_admit` asks first.

Synchronous and owned by one thread. What a step costs: docs/benchmarks.md.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
import torch

from engine.admission import BlockDemand, check_onboarded, check_request, fitting_model_len
from engine.allotment import Allotment
from engine.batch import Chunk, make_batch
from engine.block_copies import BlockCopies, FullBlock
from engine.config import EngineConfig
from engine.detokenizer import IncrementalDetokenizer
from engine.device import Device
from engine.models.config import ModelConfig
from engine.models.llama import LlamaModel
from engine.pacing import StepPacing
from engine.parallel.runner import ParallelRunner
from engine.parallel.shares import HeadShare, check_ranks
from engine.pool import KVPool
from engine.quantised_pool import held_nbytes
from engine.runner import make_runner
from engine.sampling.rows import Drawn
from engine.scheduler import Plan, plan_step
from engine.sequence import Sequence
from engine.speculation.base import DrafterFactory
from engine.speculation.speculator import make_speculator
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, GenerationRequest, Shortage, StepResult, TailKV, TokenEvent
from engine.weights import DTYPES, Weights, load_weights
from kvstore.clock import Clock, MonotonicClock
from kvstore.errors import CorruptBlock, OverLimit
from kvstore.frame import payload_checksum
from kvstore.nouns import MissReason
from kvstore.tiers.pool_slots import PoolSlots

__all__ = ["Engine"]

if TYPE_CHECKING:
    from engine.updating import LoadedWeights

Payload = memoryview | npt.NDArray[np.uint8]


class Engine:
    """See the module. `layout` (over ranks: the first one's, `pool.layouts` are all), `weights_digest` and
    `tokenizer` name what its KV is interchangeable with. `make_drafter` guesses tokens instead of what
    `config.speculation` names."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        weights: Weights,
        tokenizer: Tokenizer,
        clock: Clock,
        *,
        make_drafter: DrafterFactory | None = None,
        device: Device | None = None,
    ) -> None:
        """`device` is where it computes, None: where `config` says."""
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.weights_digest = weights.digest
        own = HeadShare(0, config.tensor_parallel).config(model_config)
        self.layout = own.kv_layout(config.dtype, config.block_tokens)
        n_slots = config.pool_blocks or config.pool_nbytes // held_nbytes(self.layout, config.hot_pool)
        made_for = model_config.max_position_embeddings
        self.max_model_len = fitting_model_len(config.max_model_len, made_for, n_slots, config.block_tokens)
        shape = (config, model_config, weights, self.layout, n_slots, self.max_model_len)
        self._runner = ParallelRunner(*shape) if config.tensor_parallel > 1 else make_runner(*shape, device)
        self.ranks = self._runner.processes if isinstance(self._runner, ParallelRunner) else None
        self.slots = PoolSlots(n_slots)
        self._sequences: dict[str, Sequence] = {}
        self._allotment = Allotment(self.pool, self.slots, config.block_tokens)
        self._demand = BlockDemand(config.block_tokens, self.max_model_len)
        self._promised = 0  # of the free slots, those that who runs is expected to need
        self._arrivals = itertools.count()
        self._clock = clock
        target_s = config.step_s_target
        self._pacing = StepPacing(target_s, config.block_tokens) if target_s is not None else None
        self._planned: Plan | None = None  # while nothing has changed since
        self._copies = BlockCopies(self.pool)
        self._speculator = make_speculator(config, model_config, make_drafter, self.pool.device)

    @classmethod
    def load(cls, folder: Path, config: EngineConfig, clock: Clock | None = None) -> Self:
        """Read a Hugging Face style folder. Raises ModelError's kinds, ConfigError for settings that do not
        fit the model or this machine. Sets torch's threads, for the whole process. `clock` times steps."""
        torch.set_num_threads(config.compute_threads)
        model_config = ModelConfig.from_folder(folder)
        check_ranks(model_config, config.tensor_parallel)
        share = HeadShare(0, config.tensor_parallel)
        weights = load_weights(folder, model_config, DTYPES[config.dtype], share.tensor)
        tokenizer = Tokenizer.from_folder(folder)
        return cls(config, model_config, weights, tokenizer, clock or MonotonicClock())

    def model_beside(self, model_config: ModelConfig, weights: Weights) -> LlamaModel:
        """See `ModelRunner`. From any thread."""
        return self._runner.model_beside(model_config, weights)

    def swap_weights(self, loaded: LoadedWeights) -> None:
        """Step with other weights from now on. KV that is there stays: whose it is, is the caller's to know
        (engine/updating.py)."""
        self._copies.forget_all()
        self._runner.swap(loaded.model)
        for sequence in self._sequences.values():
            sequence.shares = False  # what it has is of other weights than what it will compute
        self._planned = None  # it may have counted on sharing
        self.model_config, self.weights_digest = loaded.model_config, loaded.digest

    @property
    def pool(self) -> KVPool:
        return self._runner.pool

    @property
    def free_blocks(self) -> int:
        """Slots that are nobody's. Those of idle blocks of the edge shard are not among them."""
        return self.slots.n_free

    @property
    def running(self) -> int:
        """Sequences that steps work on: admitted, and neither ended nor parked."""
        return sum(not sequence.parked for sequence in self._sequences.values())

    def has_work(self) -> bool:
        """Would a step compute anything?"""
        return self.running > 0

    def can_ever_admit(self, request: GenerationRequest) -> bool:
        """Would it fit an empty engine? If not, waiting does not help."""
        return len(request.prompt_ids) + len(request.output_ids) < self.max_model_len

    def can_admit(self, request: GenerationRequest, *, hold: bool = False, lent: int = 0) -> bool:
        """Does it fit now, if so many slots are lent to it? `admit` with the same then does not raise
        OverLimit."""
        return (
            self.can_ever_admit(request)
            and self.running < self.config.running_max
            and self.slots.can_allocate(self.blocks_needed(request, hold=hold) - lent)
        )

    def blocks_needed(self, request: GenerationRequest, *, hold: bool = False) -> int:
        """Slots, lent ones included, that must be free for it to be admitted: its own, now and as predicted,
        and what those who run are expected to take. From any thread."""
        return self._demand.of(request, hold) + self._promised

    def admit(
        self,
        request: GenerationRequest,
        *,
        lent: Seq[int] = (),
        blocks: Seq[Payload] = (),
        tail: TailKV | None = None,
        hold: bool = False,
        keep: bool = False,
        arrival: int | None = None,
    ) -> tuple[int, ...]:
        """Take a request in; the slots of what is there of its chain. Its prompt, and the output it may
        already have, are computed by the next steps but for that: `lent` are slots of full blocks of chain
        index 0 and on, read in place and the caller's to take back after `release`; `blocks` are verified
        payloads of those behind them, `tail` the KV right behind these. With `hold` the sequence parks after
        its next token until `release`; with `keep` it holds its slots until then when it has ended, too.
        `arrival` orders those of one priority; None: it comes last.

        Raises OverLimit if it does not fit (nothing is taken), CorruptBlock for a tail that does not match
        its checksum, ValueError for what no correct caller passes.
        """
        self._check_new(request)
        check_onboarded(request, len(lent), len(blocks), tail, self.config.block_tokens)
        if not self.can_admit(request, hold=hold, lent=len(lent)):
            raise self._over_limit(request, hold)
        needed = len(blocks) + (tail is not None)
        room = self._demand.of(request, hold) - len(lent)
        after = self._allotment.settle(request.request_id, room, lent[-1] if lent else None)
        own = self.slots.allocate(needed, request.request_id, after=after)
        try:
            sequence = self._new_sequence(request, (*lent, *own), len(lent), hold, keep, arrival)
            self._onboard(sequence, blocks, tail)
        except BaseException:
            self.slots.give_back(own)
            self._allotment.forget(request.request_id)
            raise
        self._enter(sequence)
        return sequence.slots

    def shortage(self) -> Shortage | None:
        """What the next step wants beyond the free slots. Who can free some does so before it asks for the
        step, which preempts otherwise."""
        plan = self._plan()
        short = plan.shortage(self.slots.n_free)
        self._planned = plan if short is None else None
        return short

    def step(self) -> StepResult:
        """Compute one batch. Empty if there is no work. A sequence that ended has left the engine when its
        last event is returned, unless it was admitted with `hold` or `keep`. On a GPU a block may come with a
        later step than it became full in, but before its sequence leaves or with its last event."""
        plan = self._planned or self._plan()
        preempted: tuple[GenerationRequest, ...] = ()
        if plan.left_out and self._copies.late:
            # Who must leave has its blocks told while it has their slots.
            return StepResult(blocks=tuple(self._copies.take(lambda _: False)))
        if plan.left_out:
            victims = self._allotment.victims(self._sequences.values(), plan)
            preempted = tuple(victim.so_far() for victim in victims)
            for request in preempted:
                self.release(request.request_id)
            plan = self._plan()
        self._planned = None
        chunks = [chunk for chunk in plan.chunks if self._allotment.take(chunk)]
        if not chunks:
            return StepResult(blocks=tuple(self._copies.take(self._goes_on)), preempted=preempted)
        if self._speculator is not None:
            decoding = sum(chunk.draws for chunk in chunks)
            chunks = self._speculator.draft(chunks, decoding + self._prompt_rows(decoding))
        began = self._clock.now()
        logits = self._runner.run(make_batch(chunks, self.config.block_tokens))
        rows = [row for chunk in chunks if chunk.draws for row in chunk.sequence.sampling_rows(chunk.drafts)]
        drawn = iter(self._runner.begin_draw(logits, rows)())
        self._learn(chunks, self._clock.now() - began)
        drawing = sum(chunk.draws for chunk in chunks)  # before they have taken what was drawn
        events = [event for chunk in chunks for event in self._take(chunk, drawn)]
        self._changed()
        return StepResult(
            tuple(events),
            tuple(self._copies.take(self._goes_on)),
            tokens_computed=sum(chunk.rows for chunk in chunks) + len(events) - drawing,
            preempted=preempted,
            drafts_proposed=sum(len(chunk.drafts) for chunk in chunks),
            drafts_accepted=len(events) - drawing,
        )

    def take_tail(self, request_id: str) -> TailKV | None:
        """A copy of the KV behind the last full computed block. None if there is none, or no sequence."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.computed % self.config.block_tokens == 0:
            return None
        block, tokens = divmod(sequence.computed, self.config.block_tokens)
        payload = self.pool.read_tail(sequence.slots[block], tokens)
        return TailKV(tokens, payload, payload_checksum(payload.data))

    def release(self, request_id: str) -> None:
        """Forget a sequence and give back its own slots, wherever it stands: free, unless they are kept by
        the edge shard. What of its blocks was not told yet never is. Does nothing if it is not there."""
        self._copies.forget(request_id)
        self._leave(request_id)

    def _leave(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._allotment.leave(sequence)
            self._changed()

    def check_integrity(self, lent: Seq[int] = (), kept: Collection[int] = ()) -> None:
        """Independent walk: every slot is free, or used by exactly the sequences that name it, those that
        were `lent` counted where they were, or kept by the edge shard."""
        own = (slot for sequence in self._sequences.values() for slot in sequence.own_slots)
        self.slots.check_integrity(Counter(own) + Counter(lent), kept)

    # Admission

    def _check_new(self, request: GenerationRequest) -> None:
        if request.request_id in self._sequences:
            raise ValueError(f"request {request.request_id} is in this engine already: release it first")
        check_request(request, self.model_config.vocab_size)

    def _over_limit(self, request: GenerationRequest, hold: bool) -> OverLimit:
        unclaimed = max(0, self.slots.n_free - self._promised)
        return self._demand.over_limit(request, hold, unclaimed, self.running, self.config.running_max)

    def _new_sequence(
        self,
        request: GenerationRequest,
        slots: tuple[int, ...],
        lent: int,
        hold: bool,
        keep: bool,
        arrival: int | None,
    ) -> Sequence:
        sampling = request.sampling
        return Sequence(
            request,
            slots=slots,
            lent=lent,
            arrival=next(self._arrivals) if arrival is None else arrival,
            hold=hold,
            keep=keep,
            tokens_max=self._demand.tokens_max(request),
            eos_token_ids=self.model_config.eos_token_ids,
            detokenizer=(
                IncrementalDetokenizer(self.tokenizer, sampling.stop, sampling.min_tokens)
                if sampling.stop
                else None
            ),
        )

    def _onboard(self, sequence: Sequence, blocks: Seq[Payload], tail: TailKV | None) -> None:
        for slot, payload in zip(sequence.own_slots, blocks, strict=False):
            self.pool.write_block(slot, payload)
        if tail is not None:
            if payload_checksum(tail.payload.data) != tail.checksum:
                name = sequence.request.request_id
                raise CorruptBlock(MissReason.CHECKSUM, f"the tail of request {name} does not match")
            self.pool.write_tail(sequence.own_slots[len(blocks)], tail.payload, tail.tokens)
        size = self.config.block_tokens
        sequence.onboard((sequence.lent + len(blocks)) * size + (tail.tokens if tail else 0), size)

    def _enter(self, sequence: Sequence) -> None:
        self._sequences[sequence.request.request_id] = sequence
        self._changed()

    def _changed(self) -> None:
        self._planned = None
        self._promised = self._demand.promised(self._sequences.values())

    # One step

    def _plan(self) -> Plan:
        for sequence, index in self._allotment.take_over(self._sequences.values()):
            self._copy_out(sequence, [index])
        return plan_step(
            self._sequences.values(),
            self._prompt_rows,
            self.config.block_tokens,
            self.slots.n_free,
            self.slots.is_shared,
        )

    def _prompt_rows(self, decoding: int) -> int:
        rows_max = self.config.step_tokens_max
        return rows_max - decoding if self._pacing is None else self._pacing.prompt_rows(decoding, rows_max)

    def _learn(self, chunks: Seq[Chunk], seconds: float) -> None:
        """What a step took, for those who plan by it."""
        if self._speculator is not None:
            self._speculator.observe(chunks, seconds)
        if self._pacing is not None:
            self._pacing.took(sum(chunk.rows + len(chunk.drafts) for chunk in chunks), seconds)

    def _take(self, chunk: Chunk, drawn: Iterator[Drawn]) -> list[TokenEvent]:
        """What was drawn for its rows, as far as its drafts hold. Blocks that became full are copied out: of
        the tokens before each of those it took, and of none behind."""
        sequence, draws = chunk.sequence, chunk.draws
        events = sequence.accept(list(islice(drawn, draws + len(chunk.drafts))), chunk.drafts)
        if chunk.drafts and self._speculator is not None:
            self._speculator.verified(chunk, [event.token_id for event in events])
        full = sequence.advance(chunk.rows + len(events) - draws, self.config.block_tokens)
        self._copy_out(sequence, full)  # while its slots are held
        self._park_or_release(sequence, events)
        return events

    def _copy_out(self, sequence: Sequence, indexes: Collection[int]) -> None:
        name, attempt = sequence.request.request_id, sequence.request.attempt
        self._copies.begin([FullBlock(name, attempt, index, sequence.slots[index]) for index in indexes])

    def _goes_on(self, request_id: str) -> bool:
        """Will steps to come compute it?"""
        sequence = self._sequences.get(request_id)
        return sequence is not None and not sequence.parked

    def _park_or_release(self, sequence: Sequence, events: Seq[TokenEvent]) -> None:
        if not events:
            return
        finish = events[-1].finish
        finished = finish is not None
        if finish in (FinishReason.STOP, FinishReason.LENGTH):
            longest = sequence.tokens_max - len(sequence.request.prompt_ids)
            self._demand.prediction.ended(sequence.output_count, longest)
        if sequence.hold or (sequence.keep and finished):
            sequence.parked = True
        elif finished:
            self._leave(sequence.request.request_id)
