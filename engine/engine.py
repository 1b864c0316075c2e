"""The engine: sequences in, tokens and full blocks out, one step at a time. It knows nothing of stores.

    admit(request, lent, ...)      take all slots the request can ever need, but for those it is lent; copy in
                                   what others computed
    step()                         one forward pass: a row of every decoding sequence, then chunks of
                                   prompts within the token budget; draw tokens; copy out what became full
    take_tail(id), release(id)     what a handoff takes along; give the slots back

Slots are taken at admission for the worst case (prompt and max_tokens), so nothing is ever preempted and a
sequence's blocks are adjacent where the pool allows: attention then reads them in place. A request that
does not fit now is the caller's to keep; `can_admit` asks first.

Synchronous and owned by one thread. What a step costs: docs/benchmarks.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import structlog
import torch

from engine.batch import Chunk, make_batch
from engine.block_copies import BlockCopies, FullBlock
from engine.config import EngineConfig
from engine.detokenizer import IncrementalDetokenizer
from engine.device import Device
from engine.models.config import ModelConfig
from engine.pool import KVPool
from engine.runner import make_runner
from engine.sampling.rows import NO_TOKEN, Drawn
from engine.scheduler import schedule
from engine.sequence import Sequence
from engine.tokenizer import Tokenizer
from engine.types import GenerationRequest, StepResult, TailKV, TokenEvent
from engine.weights import DTYPES, Weights, load_weights
from kvstore.errors import ConfigError, CorruptBlock, OverLimit
from kvstore.frame import payload_checksum
from kvstore.nouns import KVLayout, MissReason
from kvstore.tiers.pool_slots import PoolSlots

__all__ = ["Engine"]

Payload = memoryview | npt.NDArray[np.uint8]

log = structlog.get_logger(__name__)


class Engine:
    """See the module. `layout`, `weights_digest` and `tokenizer` name what its KV is interchangeable with."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        weights: Weights,
        tokenizer: Tokenizer,
        *,
        device: Device | None = None,
    ) -> None:
        """`device` is where it computes, None: where `config` says."""
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.weights_digest = weights.digest
        self.layout = KVLayout(
            layers=model_config.layers,
            head_begin=0,
            head_end=model_config.kv_heads,
            head_dim=model_config.head_dim,
            dtype=config.dtype,
            block_tokens=config.block_tokens,
        )
        n_slots = config.pool_blocks or config.pool_nbytes // self.layout.block_nbytes
        self.max_model_len = _max_model_len(config, model_config, n_slots)
        self._runner = make_runner(
            config, model_config, weights, self.layout, n_slots, self.max_model_len, device
        )
        self.slots = PoolSlots(n_slots)
        self._sequences: dict[str, Sequence] = {}  # in the order of admission
        self._copies = BlockCopies(self.pool)

    @classmethod
    def load(cls, folder: Path, config: EngineConfig) -> Self:
        """Read a Hugging Face style folder. Raises ModelError's kinds, ConfigError for settings that do not
        fit the model or this machine. Sets torch's threads, for the whole process."""
        torch.set_num_threads(config.compute_threads)
        model_config = ModelConfig.from_folder(folder)
        weights = load_weights(folder, model_config, DTYPES[config.dtype])
        return cls(config, model_config, weights, Tokenizer.from_folder(folder))

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

    def admit(
        self,
        request: GenerationRequest,
        *,
        lent: Seq[int] = (),
        blocks: Seq[Payload] = (),
        tail: TailKV | None = None,
        hold: bool = False,
        keep: bool = False,
    ) -> tuple[int, ...]:
        """Take a request in; the slots of its chain. Its prompt, and the output it may already have, are
        computed by the next steps but for what is there: `lent` are slots of full blocks of chain index 0 and
        on, read in place and the caller's to take back after `release`; `blocks` are verified payloads of
        those behind them, `tail` the KV right behind these. With `hold` the sequence parks after its next
        token until `release`; with `keep` it holds its slots until then when it has ended, too.

        Raises OverLimit if it does not fit (nothing is taken), CorruptBlock for a tail that does not match
        its checksum, ValueError for what no correct caller passes.
        """
        self._check_request(request, lent, blocks, tail)
        if not self.can_admit(request, hold=hold, lent=len(lent)):
            raise self._over_limit(request, hold)
        needed = self.blocks_needed(request, hold=hold) - len(lent)
        own = self.slots.allocate(needed, request.request_id, after=lent[-1] if lent else None)
        try:
            sequence = self._new_sequence(request, (*lent, *own), len(lent), hold, keep)
            self._onboard(sequence, blocks, tail)
        except BaseException:
            self.slots.give_back(own)
            raise
        self._sequences[request.request_id] = sequence
        return sequence.slots

    def step(self) -> StepResult:
        """Compute one batch. Empty if there is no work. A sequence that ended has left the engine when its
        last event is returned, unless it was admitted with `hold` or `keep`. On a GPU a block may come with a
        later step than it became full in, but with its sequence's last event at the latest."""
        chunks = schedule(self._sequences.values(), self.config.step_tokens_max)
        if not chunks:
            return StepResult()
        logits = self._runner.run(make_batch(chunks, self.config.block_tokens))
        drawing = [chunk.sequence for chunk in chunks if chunk.draws]
        take_drawn = self._runner.begin_draw(logits, [sequence.sampling_row() for sequence in drawing])
        self._copies.begin([block for chunk in chunks for block in self._advance(chunk)])
        events = [self._take_token(*each) for each in zip(drawing, take_drawn(), strict=True)]
        blocks = self._copies.take(self._goes_on)
        return StepResult(tuple(events), tuple(blocks), sum(chunk.rows for chunk in chunks))

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
        the edge shard. Does nothing if it is not there."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.slots.give_back(sequence.own_slots)

    def check_integrity(self, lent: Seq[int] = (), kept: Collection[int] = ()) -> None:
        """Independent walk: every slot is free, or used by exactly the sequences that name it, those that
        were `lent` counted where they were, or kept by the edge shard."""
        own = (slot for sequence in self._sequences.values() for slot in sequence.own_slots)
        self.slots.check_integrity(Counter(own) + Counter(lent), kept)

    # Admission

    def blocks_needed(self, request: GenerationRequest, *, hold: bool = False) -> int:
        """Slots in the worst case, lent ones included. The last token of all is drawn but never computed.
        From any thread."""
        known = len(request.prompt_ids) + len(request.output_ids)
        final = min(len(request.prompt_ids) + request.sampling.max_tokens, self.max_model_len)
        tokens = known if hold else max(known, final - 1)
        return -(-tokens // self.config.block_tokens)

    def _check_request(
        self, request: GenerationRequest, lent: Seq[int], blocks: Seq[Payload], tail: TailKV | None
    ) -> None:
        name, known = request.request_id, len(request.prompt_ids) + len(request.output_ids)
        if name in self._sequences:
            raise ValueError(f"request {name} is in this engine already: release it first")
        if not request.prompt_ids:
            raise ValueError(f"request {name} has no prompt tokens")
        if len(request.output_ids) >= request.sampling.max_tokens:
            raise ValueError(f"request {name} already has its {request.sampling.max_tokens} output tokens")
        highest = max(*request.prompt_ids, *request.output_ids, 0)
        lowest = min(*request.prompt_ids, *request.output_ids, 0)
        if lowest < 0 or highest >= self.model_config.vocab_size:
            raise ValueError(f"request {name} has token ids outside 0..{self.model_config.vocab_size - 1}")
        size = self.config.block_tokens
        if len(lent) * size >= known:
            raise ValueError(f"request {name} of {known} tokens would write into the last block lent to it")
        onboarded = (len(lent) + len(blocks)) * size + (tail.tokens if tail else 0)
        if onboarded > known or (tail and not 0 < tail.tokens < self.config.block_tokens):
            raise ValueError(f"request {name} has {known} tokens, KV of {onboarded} was given")

    def _over_limit(self, request: GenerationRequest, hold: bool) -> OverLimit:
        known = len(request.prompt_ids) + len(request.output_ids)
        needed = self.blocks_needed(request, hold=hold)
        what = f"request {request.request_id} of {known} tokens"
        if known >= self.max_model_len:
            return OverLimit(f"{what} leaves no room for output: this engine takes {self.max_model_len}")
        return OverLimit(
            f"{what} needs {needed} KV blocks of {self.slots.n_free} free and a place among "
            f"{self.config.running_max} running sequences ({self.running} taken): wait for others to end"
        )

    def _new_sequence(
        self, request: GenerationRequest, slots: tuple[int, ...], lent: int, hold: bool, keep: bool
    ) -> Sequence:
        sampling = request.sampling
        return Sequence(
            request,
            slots=slots,
            lent=lent,
            hold=hold,
            keep=keep,
            tokens_max=min(len(request.prompt_ids) + sampling.max_tokens, self.max_model_len),
            eos_token_ids=self.model_config.eos_token_ids,
            detokenizer=IncrementalDetokenizer(self.tokenizer, sampling.stop) if sampling.stop else None,
        )

    def _onboard(self, sequence: Sequence, blocks: Seq[Payload], tail: TailKV | None) -> None:
        for slot, payload in zip(sequence.own_slots, blocks, strict=False):
            self.pool.write_block(slot, payload)
        if tail is not None:
            if payload_checksum(tail.payload.data) != tail.checksum:
                name = sequence.request.request_id
                raise CorruptBlock(MissReason.CHECKSUM, f"the tail of request {name} does not match")
            self.pool.write_tail(sequence.own_slots[len(blocks)], tail.payload, tail.tokens)
        full = sequence.lent + len(blocks)
        sequence.onboard(full, full * self.config.block_tokens + (tail.tokens if tail else 0))

    # One step

    def _advance(self, chunk: Chunk) -> list[FullBlock]:
        sequence = chunk.sequence
        request = sequence.request
        return [
            FullBlock(request.request_id, request.attempt, index, sequence.slots[index])
            for index in sequence.advance(chunk.rows, self.config.block_tokens)
        ]

    def _goes_on(self, request_id: str) -> bool:
        """Will steps to come compute it?"""
        sequence = self._sequences.get(request_id)
        return sequence is not None and not sequence.parked

    def _take_token(self, sequence: Sequence, drawn: Drawn) -> TokenEvent:
        if drawn.token_id == NO_TOKEN:
            event = sequence.fail(
                "the model's logits are not finite: its weights or onboarded KV are damaged"
            )
        else:
            event = sequence.append(drawn)
        if sequence.hold or (sequence.keep and event.finish is not None):
            sequence.parked = True
        elif event.finish is not None:
            self.release(sequence.request.request_id)
        return event


def _max_model_len(config: EngineConfig, model_config: ModelConfig, n_slots: int) -> int:
    made_for = model_config.max_position_embeddings
    if n_slots < 1:
        raise ConfigError("the KV pool holds not one block: raise pool_nbytes")
    if config.max_model_len is None:
        return min(made_for, n_slots * config.block_tokens)
    if config.max_model_len > made_for:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the model was made for {made_for}: lower it"
        )
    held = n_slots * config.block_tokens
    if held < config.max_model_len:
        log.warning("the KV pool is smaller than max_model_len", tokens=held, wanted=config.max_model_len)
    return min(config.max_model_len, held)
