"""What vLLM's connector costs the scheduler in a step: plain stand-ins for vLLM's own, a store in process.

    python -m benchmarks.vllm_scheduler [--requests N] [--steps N] [--rounds N] [--json]

Rows, in microseconds: a step in which each of N running requests computes one token, and one in 32 of them
completes a block to save (`decode`); the same step for requests that the connector keeps out of the store
(`left_out`: the baseline, what the loop itself costs); the arrival of a prompt of 2,048 tokens (`arrival`:
its tokens are copied, its look-up begins); asking for its hit once that has answered (`matched`); and the
step that computes it (`prefill`: 64 blocks to save). Each row has the median over all steps of all rounds,
the 99th percentile and the greatest. Beside it runs nothing but the look-ups and the store that answers them.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from kvstore.client import StoreClient
from kvstore.integrations.vllm.config import ConnectorConfig
from kvstore.integrations.vllm.scheduling import Scheduling
from kvstore.integrations.vllm.setup import Setup
from kvstore.integrations.vllm.store_side import StoreSide
from kvstore.logs import log_plainly
from kvstore.nouns import KVLayout, NamespaceSpec, WeightsDigest

VLLM_BLOCK: Final = 16
PROMPT_TOKENS: Final = 2_048
LIMIT_US: Final = 300.0
LEFT_OUT: Final = "left_out"


@dataclass(eq=False)
class Request:
    request_id: str
    all_token_ids: list[int]
    mm_features: tuple[Any, ...] = ()
    cache_salt: str | None = None
    lora_request: Any = None
    prompt_embeds: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool = False
    num_prompt_tokens: int = PROMPT_TOKENS
    num_computed_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


@dataclass
class Cached:
    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


@dataclass
class New:
    req_id: str
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int = 0


@dataclass
class Output:
    scheduled_new_reqs: list[New] = field(default_factory=list)
    scheduled_cached_reqs: Cached = field(default_factory=Cached)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    preempted_req_ids: set[str] | None = None


class Bench:
    def __init__(self, requests: int) -> None:
        config = ConnectorConfig(min_load_tokens=1, lookup_timeout_s=30.0)
        layout = KVLayout(2, 0, 2, 32, "float32", config.block_tokens)
        setup = Setup(
            config, (NamespaceSpec("bench", layout, bytes(16)),), 0, VLLM_BLOCK, loads=True, saves=True
        )
        self.side = StoreSide(config, self._connect)
        self.half = Scheduling(setup, self.side, lambda: WeightsDigest(bytes(16)), lambda: True)
        self.side.settle()
        self.requests = requests
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._number = 0

    @staticmethod
    async def _connect() -> StoreClient:
        return await StoreClient.in_process()

    def timed(self, row: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        answer = call()
        self.seconds[row].append(time.perf_counter() - began)
        return answer

    def admit(self, *, is_left_out: bool) -> Request:
        """One request through its prefill."""
        self._number += 1
        tokens = [(self._number * 31 + position) % 30_000 for position in range(PROMPT_TOKENS)]
        request = Request(f"r{self._number}", tokens, mm_features=("image",) if is_left_out else ())
        row = LEFT_OUT if is_left_out else ""
        self.timed(f"{row}arrival", lambda: self.half.on_new_request(request))
        self.side.settle()
        found, _ = self.timed(f"{row}matched", lambda: self.half.matched(request, 0))
        blocks = list(range(PROMPT_TOKENS // VLLM_BLOCK + 1))
        self.half.allocated(request.request_id, blocks, found)
        output = Output(
            [New(request.request_id, (blocks,))],
            num_scheduled_tokens={request.request_id: PROMPT_TOKENS},
        )
        plan = self.timed(f"{row}prefill", lambda: self.half.plan(output))
        assert len(plan.saves) == (0 if is_left_out else 1), "what is measured is what was meant"
        return request

    def decode(self, row: str, steps: int, *, is_left_out: bool) -> None:
        """All run side by side, a step apart, so that some complete a block in every step."""
        running = [self.admit(is_left_out=is_left_out) for _ in range(self.requests)]
        for index, request in enumerate(running):
            request.all_token_ids += [7] * (1 + index % 32)
        saves = 0
        for _ in range(steps):
            output = Output()
            cached = output.scheduled_cached_reqs
            for request in running:
                computed = request.num_tokens - 1
                cached.req_ids.append(request.request_id)
                cached.new_block_ids.append(([computed],) if computed % VLLM_BLOCK == 0 else None)
                cached.num_computed_tokens.append(computed)
                output.num_scheduled_tokens[request.request_id] = 1
            saves += len(self.timed(row, functools.partial(self.half.plan, output)).saves)
            for request in running:
                request.all_token_ids.append(11)
        assert (saves == 0) is is_left_out
        for request in running:
            self.half.finished(request)

    def close(self) -> None:
        self.half.close()
        self.side.close()


def row_of(seconds: list[float]) -> dict[str, float]:
    micros = sorted(1e6 * each for each in seconds)
    return {
        "median_us": statistics.median(micros),
        "p99_us": micros[min(len(micros) - 1, len(micros) * 99 // 100)],
        "max_us": micros[-1],
        "calls": len(micros),
    }


def run(requests: int, steps: int, rounds: int) -> dict[str, Any]:
    bench = Bench(requests)
    try:
        for _ in range(rounds):
            bench.decode("left_out", steps, is_left_out=True)
            bench.decode("decode", steps, is_left_out=False)
    finally:
        bench.close()
    names = ("decode", "left_out", "arrival", "matched", "prefill")
    rows = {name: row_of(bench.seconds[name]) for name in names}
    median = rows["decode"]["median_us"]
    return {
        "requests": requests,
        "rows": rows,
        "decode_to_left_out": median / rows["left_out"]["median_us"],
        "limit_us": LIMIT_US,
        "holds": median < LIMIT_US,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100, help="that run in a step")
    parser.add_argument("--steps", type=int, default=500, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    log_plainly(logging.WARNING, sys.stderr)
    document = run(args.requests, args.steps, args.rounds)
    if args.json:
        print(json.dumps(document))
        return
    print(f"{'microseconds':14}{'median':>10}{'p99':>10}{'max':>10}")
    for name, row in document["rows"].items():
        print(f"{name:14}{row['median_us']:10.1f}{row['p99_us']:10.1f}{row['max_us']:10.1f}")
    print(f"a step of {args.requests} requests must stay under {LIMIT_US:.0f}: {document['holds']}")


if __name__ == "__main__":
    main()
