"""What speculation brings: n-gram drafts against plain decoding, the same requests in the same process.

    python -m benchmarks.speculation [--model NAME] [--threads N] [--tokens N] [--prompts N] [--batch N]
                                     [--draft N] [--plain-mode] [--json]

Grounded tasks are about a given text (Python's own help topics): summarise, extract, edit. Others are open
questions, greedy and at temperature 1, and prompts of random tokens. The two engines take turns step by step,
so that what else the machine does meets both; process CPU seconds stand beside wall seconds. Only decoding
steps count.
Outputs are compared: in batch-invariant mode they must be equal (exit code 1 if not).

Then what a step of so many rows takes: it decides how many guesses pay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

from engine.process import prepare_process

prepare_process()

import torch  # noqa: E402  the process is prepared first

from engine.attention.base import Segment  # noqa: E402
from engine.batch import Batch  # noqa: E402
from engine.config import EngineConfig  # noqa: E402
from engine.engine import Engine  # noqa: E402
from engine.models.config import ModelConfig  # noqa: E402
from engine.registry import DEFAULT_MODEL, resolve_model  # noqa: E402
from engine.runner import ModelRunner  # noqa: E402
from engine.types import GenerationRequest, SamplingParams  # noqa: E402
from engine.weights import DTYPES, load_weights  # noqa: E402
from kvstore.nouns import KVLayout  # noqa: E402

GROUNDED: Final = {
    "summarise": "Summarise the text above, in its own words where you can.",
    "extract": "Copy every sentence of the text above that says what is not allowed or raises an error.",
    "edit": "Write the text above again, with spelling mistakes corrected and nothing else changed.",
}
QUESTIONS: Final = (
    "Write a short story about a lighthouse keeper.",
    "Why is the sky blue?",
    "Explain what a cache is to a child.",
    "Describe a walk through a market in the morning.",
    "What should I think of before I buy a bicycle?",
    "Write a letter to a friend who has moved to another town.",
    "How do vaccines work?",
    "Give arguments for and against a shorter working week.",
)
TOPICS: Final = ("global", "assert", "del", "return", "in", "booleans", "nonlocal", "slicings")
ROWS: Final = (1, 2, 3, 5, 9, 17, 33)
CONTEXT: Final = 400


@dataclass(slots=True)
class Measured:
    """Of one engine at one task."""

    tokens: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    proposed: int = 0
    accepted: int = 0
    steps: int = 0


@dataclass(slots=True)
class Task:
    plain: Measured = field(default_factory=Measured)
    drafted: Measured = field(default_factory=Measured)
    ratios_cpu: list[float] = field(default_factory=list)  # of each round of requests
    ratios_wall: list[float] = field(default_factory=list)
    equal: bool = True


def prompts(engine: Engine, task: str, count: int) -> list[tuple[int, ...]]:
    if task == "random tokens":
        generator = torch.Generator().manual_seed(5)
        return [tuple(ids) for ids in torch.randint(10, 40_000, (count, 300), generator=generator).tolist()]
    if task in ("questions", "sampled"):
        texts = [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
    else:
        texts = [f"{topics[TOPICS[i % len(TOPICS)]].strip()}\n\n{GROUNDED[task]}" for i in range(count)]
    return [tuple(engine.tokenizer.encode_chat([{"role": "user", "content": text}])) for text in texts]


def measure(
    engines: tuple[Engine, Engine], asked: list[tuple[int, ...]], sampling: SamplingParams, task: Task
) -> None:
    """One batch of requests on both, in turns."""
    sums = Measured(), Measured()
    outputs: tuple[dict[str, list[int]], dict[str, list[int]]] = {}, {}
    for engine in engines:
        for index, ids in enumerate(asked):
            engine.admit(GenerationRequest(str(index), 0, ids, sampling))
    while any(engine.has_work() for engine in engines):
        for engine, measured, output in zip(engines, sums, outputs, strict=True):
            prompt_step = len(output) < len(asked)
            wall, cpu = time.perf_counter(), time.process_time()
            result = engine.step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            for event in result.events:
                output.setdefault(event.request_id, []).append(event.token_id)
            if result.events and not prompt_step:
                measured.wall_s += wall
                measured.cpu_s += cpu
                measured.tokens += len(result.events)
                measured.proposed += result.drafts_proposed
                measured.accepted += result.drafts_accepted
                measured.steps += 1
    task.equal &= outputs[0] == outputs[1]
    plain, drafted = sums
    if plain.tokens:
        task.ratios_cpu.append(plain.cpu_s / drafted.cpu_s)
        task.ratios_wall.append(plain.wall_s / drafted.wall_s)
    for total, part in ((task.plain, plain), (task.drafted, drafted)):
        for name in Measured.__slots__:
            setattr(total, name, getattr(total, name) + getattr(part, name))


def rows_to_seconds(folder: Path, config: EngineConfig, rounds: int = 5) -> dict[int, float]:
    """Median CPU seconds of a step of one sequence with so many rows, logits for each."""
    model = ModelConfig.from_folder(folder)
    layout = KVLayout(model.layers, 0, model.kv_heads, model.head_dim, config.dtype, config.block_tokens)
    slots = tuple(range(-(-(CONTEXT + max(ROWS)) // layout.block_tokens)))
    weights = load_weights(folder, model, DTYPES[config.dtype])
    runner = ModelRunner(config, model, weights, layout, len(slots), CONTEXT + max(ROWS))
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(rounds):
        for rows, measured in seconds.items():
            at = torch.arange(CONTEXT, CONTEXT + rows)
            batch = Batch(at, at, at, (Segment(0, rows, CONTEXT, slots),), torch.arange(rows))
            began = time.process_time()
            runner.run(batch)
            measured.append(time.process_time() - began)
    return {rows: statistics.median(measured) for rows, measured in seconds.items()}


def row(name: str, task: Task) -> str:
    plain, drafted = task.plain, task.drafted
    accepted = drafted.accepted / max(1, drafted.proposed)
    return (
        f"{name:14}{plain.tokens / plain.wall_s:8.1f}{drafted.tokens / drafted.wall_s:8.1f}"
        f"{plain.wall_s / drafted.wall_s:9.2f}{plain.cpu_s / drafted.cpu_s:8.2f}"
        f"{statistics.median(task.ratios_cpu):8.2f}{min(task.ratios_cpu):8.2f}"
        f"{drafted.proposed / drafted.tokens:9.2f}{accepted:7.0%}{drafted.tokens / drafted.steps:8.2f}"
        f"{'  yes' if task.equal else '  NO'}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="at most, of one answer")
    parser.add_argument("--prompts", type=int, default=4, help="of a task")
    parser.add_argument("--batch", type=int, default=1, help="requests at once")
    parser.add_argument("--draft", type=int, default=EngineConfig().draft_tokens_max)
    parser.add_argument("--plain-mode", action="store_true", help="not batch-invariant")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    asked = parse()
    folder = resolve_model(asked.model)
    config = EngineConfig(
        threads=asked.threads, pool_blocks=64 * asked.batch, batch_invariant=not asked.plain_mode
    )
    drafting = {"draft_tokens_max": asked.draft, "speculation": "ngram"}
    engines = (
        Engine.load(folder, config.model_copy(update={"speculation": "off"})),
        Engine.load(folder, config.model_copy(update=drafting)),
    )
    tasks: dict[str, Task] = {name: Task() for name in (*GROUNDED, "questions", "sampled", "random tokens")}
    if not asked.json:
        print(f"{asked.model}, {asked.threads} threads, load average {os.getloadavg()[0]:.1f}")
        print(
            f"{'':14}{'plain':>8}{'drafts':>8}{'ratio':>9}{'cpu':>8}{'median':>8}{'least':>8}"
            f"{'drafts':>9}{'right':>7}{'tokens':>8}  equal\n"
            f"{'':14}{'tok/s':>8}{'tok/s':>8}{'wall':>9}{'ratio':>8}"
            f"{'':>16}{'a token':>9}{'':>7}{'a step':>8}"
        )
    for name, task in tasks.items():
        ids = prompts(engines[1], name, asked.prompts)
        sampling = SamplingParams(asked.tokens, temperature=1.0 if name == "sampled" else 0.0)
        for begin in range(0, len(ids), asked.batch):
            measure(engines, ids[begin : begin + asked.batch], sampling, task)
        if not asked.json:
            print(row(name, task), flush=True)
    del engines
    seconds = rows_to_seconds(folder, config)
    if asked.json:
        measured = {name: asdict(task) for name, task in tasks.items()}
        print(json.dumps({"asked": vars(asked), "tasks": measured, "cpu_s_by_rows": seconds}))
    else:
        print("rows -> CPU ms: " + ", ".join(f"{rows}: {s * 1e3:.0f}" for rows, s in seconds.items()))
    if config.batch_invariant and not all(task.equal for task in tasks.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
