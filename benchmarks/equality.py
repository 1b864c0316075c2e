"""Does prefill -> store -> decode say what one process says? On the default model, greedy, by dtype.

    python -m benchmarks.equality [--dtype float32] [--dtype bfloat16] [--prompts 20] [--tokens 32] [--json]

One process generates each answer alone; then the same prompts go through a prefill role, two shards and a
decode role, all at once, so that they share batches. A second pass asks again: its KV comes from the store.
Prints how many prompts have all tokens equal. In float32 it must be every one (exit code 1 if not).
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.resources
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from engine.process import prepare_process

prepare_process()

from decode.role import DecodeRole  # noqa: E402  torch comes with these: the process is prepared first
from engine.boot import assemble  # noqa: E402
from engine.config import EngineConfig  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.engine_thread import EngineThread  # noqa: E402
from engine.monolithic import generate_all  # noqa: E402
from engine.registry import DEFAULT_MODEL, resolve_model  # noqa: E402
from engine.types import GenerationRequest, SamplingParams  # noqa: E402
from engine.worker_config import WorkerConfig  # noqa: E402
from kvstore.client import StoreClient  # noqa: E402
from kvstore.driver import ShardDriver  # noqa: E402
from kvstore.driver_config import DriverConfig  # noqa: E402
from kvstore.nouns import ShardId  # noqa: E402
from kvstore.tiers.host import HostTier  # noqa: E402
from kvstore.topology import Topology  # noqa: E402
from prefill.role import PrefillRole  # noqa: E402

QUESTIONS = (
    "Write a haiku about rain.",
    "What is the capital of France?",
    "Explain what a cache is to a child.",
    "List three uses of a paper clip.",
    "Why is the sky blue?",
    "Summarise this text in one sentence.",
    "Who is named in this text?",
    "What numbers does this text mention?",
    "Continue this story.",
    "Translate 'good morning' into French.",
)


def prompts(engine: Engine, count: int) -> list[tuple[int, ...]]:
    """Short and long ones: questions alone, and questions about growing parts of the demo's document."""
    document = importlib.resources.files("cli.demo").joinpath("document.txt").read_text(encoding="utf-8")
    made = []
    for i in range(count):
        about = document[: 150 * i] if i % 2 else ""
        text = f"{about}\n\n{QUESTIONS[i % len(QUESTIONS)]}".strip()
        made.append(tuple(engine.tokenizer.encode_chat([{"role": "user", "content": text}])))
    return made


def worker(folder: Path, name: str, config: EngineConfig, shards: Sequence[ShardDriver]) -> Any:
    async def connect(_topology: Topology) -> StoreClient:
        return StoreClient.over(shards)

    settings = WorkerConfig(
        worker_id=name,
        model=str(folder),
        model_id="m",
        engine=config,
        topology=Topology(0, ()),
        epoch_number=1,
    )
    return assemble(settings, Engine.load(folder, config), EngineThread(), connect)


async def through_the_store(
    folder: Path, config: EngineConfig, asked: Sequence[GenerationRequest]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], int]:
    """Outputs of a first and of a second pass, and how many prompt tokens the second one reused."""
    shards = [
        ShardDriver(DriverConfig(ShardId(f"s{i}"), 2 << 30, b"a secret of a benchmark"), HostTier())
        for i in range(2)
    ]
    prefill = PrefillRole(worker(folder, "p", config, shards))
    decode = DecodeRole(worker(folder, "d", config, shards))
    try:
        first, _ = await one_pass(prefill, decode, asked, "first")
        second, cached = await one_pass(prefill, decode, asked, "second")
    finally:
        await prefill.close()
        await decode.close()
    return first, second, cached


async def one_pass(
    prefill: PrefillRole, decode: DecodeRole, asked: Sequence[GenerationRequest], name: str
) -> tuple[list[tuple[int, ...]], int]:
    named = [GenerationRequest(f"{name}-{r.request_id}", 1, r.prompt_ids, r.sampling) for r in asked]
    outputs: dict[str, list[int]] = {}
    running, cached = set(), 0
    for request in named:
        answer = await prefill.prefill(request)
        cached += answer.stats.cached_tokens
        outputs[request.request_id] = [answer.event.token_id]
        handoff = await prefill.handoff(request.request_id, 1)
        if handoff is not None:
            running.add(request.request_id)
            await decode.start(handoff)
    cursor = 0
    while running:
        polled = await decode.poll(cursor, 5.0)
        cursor = polled.cursor
        for event in polled.events:
            if event.request_id in outputs and event.request_id.startswith(name):
                outputs[event.request_id].append(event.token_id)
                if event.finish is not None:
                    running.discard(event.request_id)
    return [tuple(outputs[r.request_id]) for r in named], cached


def compare(folder: Path, dtype: Any, count: int, tokens: int) -> dict[str, Any]:
    config = EngineConfig(dtype=dtype)
    engine = Engine.load(folder, config)
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
    asked = [GenerationRequest(f"{i}", 1, ids, sampling) for i, ids in enumerate(prompts(engine, count))]
    alone = generate_all(engine, asked)
    del engine
    first, second, cached = asyncio.run(through_the_store(folder, config, asked))
    return {
        "dtype": dtype,
        "prompts": count,
        "prompt_tokens": sum(len(r.prompt_ids) for r in asked),
        "reused_tokens": cached,
        "equal_cold": sum(a == b for a, b in zip(alone, first, strict=True)),
        "equal_warm": sum(a == b for a, b in zip(alone, second, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    folder = resolve_model(DEFAULT_MODEL)
    rows = [compare(folder, d, args.prompts, args.tokens) for d in args.dtype or ["float32", "bfloat16"]]
    if args.json:
        print(json.dumps({"equality": rows}))
    else:
        for row in rows:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    exact = [row for row in rows if row["dtype"] == "float32"]
    raise SystemExit(any(row["equal_cold"] + row["equal_warm"] < 2 * row["prompts"] for row in exact))


if __name__ == "__main__":
    main()
