"""What paging saves: the lengths of a trace through the engine's own slots, admission and preemption.

    python -m benchmarks.memory --trace FILE [--requests N] [--pool-requests N] [--json]

Baseline of the same run: a fixed piece of memory a request, as long as the trace's 99th percentile (prompt
and output; longer requests are left out for both), as engines without paging set aside. Then

    same requests   as many at one time as the fixed pieces allow: the bytes of both
    same bytes      as many at one time as fit: how many those are, in the mean of all steps with a backlog
    waste           of each sequence after each step: tokens of its slots that hold nothing

Nothing is computed by a model: a step takes what `plan_step` gives, sequences end where the trace says, and
`max_tokens` is the trace's longest output, which admission does not know to be too much until it has learned.
Prompts share nothing, unless said. Bytes are those of a token of Llama 3 8B in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from engine.admission import BlockDemand
from engine.allotment import Allotment
from engine.pool import KVPool
from engine.sampling.rows import Drawn
from engine.scheduler import Plan, plan_step
from engine.sequence import Sequence
from engine.types import GenerationRequest, SamplingParams
from kvstore.nouns import KVLayout
from kvstore.tiers.pool_slots import PoolSlots

BLOCK_TOKENS = 32
STEP_TOKENS = 8192
TOKEN_NBYTES = 2 * 32 * 8 * 128 * 2  # keys and values, layers, KV heads, head_dim, bfloat16
HASH_TOKENS = 512  # of the trace's hash ids


@dataclass(frozen=True)
class Asked:
    prompt_ids: tuple[int, ...]
    output_tokens: int

    @property
    def total(self) -> int:
        return len(self.prompt_ids) + self.output_tokens


@dataclass
class Tally:
    """Over the steps in which somebody waited."""

    running: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)  # slots
    peak: int = 0
    waste_tokens: list[float] = field(default_factory=list)  # mean over the sequences of a step
    waste_max: int = 0
    preempted: int = 0
    steps: int = 0


def read(path: Path, requests: int, *, shared: bool) -> Iterator[Asked]:
    """With `shared`, equal hash ids are equal tokens; without, no two prompts have one in common."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(islice(lines, requests)):
            row = json.loads(line)
            length = row["input_length"]
            if shared:
                ids = [token for chunk in row["hash_ids"] for token in [chunk] * HASH_TOKENS][:length]
            else:
                ids = [number] * length
            yield Asked(tuple(ids), max(1, row["output_length"]))


class Paged:
    """The engine without its model: everything that decides about slots is the engine's own."""

    def __init__(
        self, n_slots: int, running_max: int, tokens_max: int, output_max: int, *, shares: bool
    ) -> None:
        layout = KVLayout(1, 0, 1, 1, "bfloat16", BLOCK_TOKENS)
        self.slots = PoolSlots(n_slots)
        self.allotment = Allotment(KVPool(layout, n_slots), self.slots, BLOCK_TOKENS)
        self.demand = BlockDemand(BLOCK_TOKENS, tokens_max)
        self.running_max, self.output_max, self.shares = running_max, output_max, shares
        self.sequences: dict[str, Sequence] = {}
        self.ends: dict[str, int] = {}  # all tokens of each
        self.tally = Tally()

    def run(self, asked: Iterable[Asked]) -> Tally:
        waiting = [self._request(number, one) for number, one in enumerate(asked)]
        waiting.reverse()
        while waiting or self.sequences:
            while waiting and self._fits(waiting[-1]):
                self._admit(waiting.pop())
            waiting += self._step(backlog=bool(waiting))
        return self.tally

    def _request(self, number: int, one: Asked) -> GenerationRequest:
        self.ends[str(number)] = one.total
        sampling = SamplingParams(max_tokens=self.output_max)
        return GenerationRequest(str(number), 0, one.prompt_ids, sampling)

    def _fits(self, request: GenerationRequest) -> bool:
        needed = self.demand.of(request, hold=False) + self.demand.promised(self.sequences.values())
        return len(self.sequences) < self.running_max and self.slots.can_allocate(needed)

    def _admit(self, request: GenerationRequest) -> None:
        sequence = Sequence(
            request, slots=(), lent=0, arrival=int(request.request_id), hold=False, keep=False,
            tokens_max=self.demand.tokens_max(request), eos_token_ids=(), detokenizer=None,
        )  # fmt: skip
        sequence.shares = self.shares
        self.sequences[request.request_id] = sequence

    def _step(self, backlog: bool) -> list[GenerationRequest]:
        plan = self._plan()
        preempted = []
        if plan.left_out:
            for victim in self.allotment.victims(self.sequences.values(), plan):
                preempted.append(victim.so_far())
                self._leave(victim)
            plan = self._plan()
        for chunk in plan.chunks:
            assert self.allotment.take(chunk), "planned without slots"
            draws = chunk.draws
            chunk.sequence.advance(chunk.rows, BLOCK_TOKENS)
            if draws:
                self._draw(chunk.sequence)
        self._count(backlog, len(preempted))
        return preempted

    def _plan(self) -> Plan:
        self.allotment.take_over(self.sequences.values())
        return plan_step(
            self.sequences.values(),
            lambda decoding: STEP_TOKENS - decoding,
            BLOCK_TOKENS,
            self.slots.n_free,
            self.slots.is_shared,
        )

    def _draw(self, sequence: Sequence) -> None:
        sequence.accept([Drawn(0)], ())
        if len(sequence.tokens) >= self.ends[sequence.request.request_id]:
            self.demand.prediction.ended(sequence.output_count, self.output_max)
            self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        del self.sequences[sequence.request.request_id]
        self.slots.give_back(sequence.own_slots)

    def _count(self, backlog: bool, preempted: int) -> None:
        tally, used = self.tally, len(self.slots) - self.slots.n_free
        tally.steps += 1
        tally.preempted += preempted
        tally.peak = max(tally.peak, used)
        wasted = [len(s.slots) * BLOCK_TOKENS - s.computed for s in self.sequences.values()]
        tally.waste_max = max([tally.waste_max, *wasted])
        if backlog and wasted:
            tally.running.append(len(self.sequences))
            tally.used.append(used)
            tally.waste_tokens.append(statistics.fmean(wasted))


def measure(path: Path, requests: int, pool_requests: int) -> dict[str, float]:
    """`pool_requests`: fixed pieces that the pool has room for."""
    plain = list(read(path, requests, shared=False))
    piece = statistics.quantiles([one.total for one in plain], n=100)[98]
    piece_blocks = -(-int(piece) // BLOCK_TOKENS)
    longest = piece_blocks * BLOCK_TOKENS
    output_max = max(one.output_tokens for one in plain)

    def paged(running_max: int, shared: bool = False) -> Tally:
        fitting = [one for one in read(path, requests, shared=shared) if one.total <= longest]
        pool = Paged(piece_blocks * pool_requests, running_max, longest, output_max, shares=shared)
        tally = pool.run(fitting)
        pool.slots.check_integrity({}, ())
        return tally

    block_nbytes = BLOCK_TOKENS * TOKEN_NBYTES
    same_requests, same_bytes = paged(pool_requests), paged(1 << 20)
    shared = paged(1 << 20, shared=True)
    fixed_nbytes = piece_blocks * pool_requests * block_nbytes
    used_nbytes = statistics.fmean(same_requests.used) * block_nbytes
    return {
        "requests": len(plain),
        "piece_tokens": piece,
        "mean_tokens": statistics.fmean(one.total for one in plain),
        "fixed_requests": pool_requests,
        "fixed_nbytes": fixed_nbytes,
        "paged_nbytes_mean": used_nbytes,
        "paged_nbytes_peak": same_requests.peak * block_nbytes,
        "saved_mean": 1 - used_nbytes / fixed_nbytes,
        "saved_peak": 1 - same_requests.peak * block_nbytes / fixed_nbytes,
        "paged_requests": statistics.fmean(same_bytes.running),
        "paged_requests_ratio": statistics.fmean(same_bytes.running) / pool_requests,
        "paged_requests_shared": statistics.fmean(shared.running),
        "preempted": same_bytes.preempted,
        "waste_tokens_mean": statistics.fmean(same_bytes.waste_tokens),
        "waste_tokens_max": max(t.waste_max for t in (same_requests, same_bytes, shared)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pool-requests", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    began = time.perf_counter()
    found = measure(asked.trace, asked.requests, asked.pool_requests)
    if asked.json:
        print(json.dumps(found))
        return
    print(report(found))
    print(f"{time.perf_counter() - began:.0f} s")


def report(found: dict[str, float]) -> str:
    gib = {name: value / (1 << 30) for name, value in found.items() if "nbytes" in name}
    return (
        f"{found['requests']:.0f} requests of {found['mean_tokens']:,.0f} tokens in the mean, blocks of 32\n"
        f"fixed: {found['fixed_requests']:.0f} pieces of {found['piece_tokens']:,.0f} tokens (p99), "
        f"{gib['fixed_nbytes']:.0f} GiB\n"
        f"same requests: {gib['paged_nbytes_mean']:.1f} GiB in the mean ({found['saved_mean']:.0%} less), "
        f"{gib['paged_nbytes_peak']:.1f} at the peak ({found['saved_peak']:.0%} less)\n"
        f"same bytes: {found['paged_requests']:.0f} requests at one time, "
        f"{found['paged_requests_ratio']:.1f} times as many "
        f"({found['paged_requests_shared']:.0f} where prefixes are shared)\n"
        f"waste a sequence: {found['waste_tokens_mean']:.1f} tokens in the mean, "
        f"{found['waste_tokens_max']:.0f} at most; {found['preempted']:.0f} preemptions"
    )


if __name__ == "__main__":
    main()
