"""The bench: every engine is a process that stays; within a round they take turns at each measurement.

A round's prompts differ from the last one's and are the same for all. What cannot be started is absent, with
its reason; what fails later fails the bench.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cli
from cli.bench.engines.plan import CALL_S, ENGINES, START_S, Plan
from cli.bench.figures import Spread
from cli.bench.jsonlines import Child, ChildFailed
from engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Setup:
    """What all engines run."""

    folder: Path
    dtype: str
    threads: int
    peers: Path | None  # the folder of vLLM's environment; None: without peers
    batch_invariant: bool = False


@dataclass(slots=True)
class Result:
    plan: Plan
    setup: Setup
    prefill_s: dict[str, dict[str, Spread]] = field(default_factory=dict)  # engine -> tokens -> seconds
    decode_tok_s: dict[str, dict[str, Spread]] = field(default_factory=dict)  # engine -> Decode.name
    what: dict[str, str] = field(default_factory=dict)  # engine -> version and mode
    absent: dict[str, str] = field(default_factory=dict)  # engine -> why


def run(plan: Plan, setup: Setup, say: Callable[[str], None]) -> Result:
    """Raises ChildFailed when an engine that started does not do its part, or ours does not start."""
    result = Result(plan, setup)
    prefills: dict[tuple[str, str], list[float]] = defaultdict(list)
    decodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    vocabulary = ModelConfig.from_folder(setup.folder).vocab_size
    with contextlib.ExitStack() as stack:
        children = dict(_started(plan, setup, result, say, stack))
        for number in range(plan.rounds + 1):
            say(f"round {number} of {plan.rounds}")
            for tokens in plan.prefills:
                for name, child in children.items():
                    asked = {"tokens": tokens, "seed": 1000 * number + tokens, "vocabulary": vocabulary}
                    got = child.ask("prefill", CALL_S, **asked)
                    if number:
                        prefills[name, str(tokens)].append(got["seconds"])
            for decode in plan.decodes:
                for name, child in children.items():
                    asked = {"tokens": plan.tokens, "seed": 1000 * number + sum(decode)}
                    asked |= {"vocabulary": vocabulary, **decode._asdict()}
                    got = child.ask("decode", CALL_S, **asked)
                    if number:
                        decodes[name, decode.name].append(got["tokens_s"])
    for name in children:
        result.prefill_s[name] = {str(n): Spread.of(prefills[name, str(n)]) for n in plan.prefills}
        result.decode_tok_s[name] = {d.name: Spread.of(decodes[name, d.name]) for d in plan.decodes}
    return result


def _started(
    plan: Plan, setup: Setup, result: Result, say: Callable[[str], None], stack: contextlib.ExitStack
) -> Iterator[tuple[str, Child]]:
    asked = {
        "folder": str(setup.folder), "dtype": setup.dtype, "threads": setup.threads,
        "context_max": plan.context_max, "sequences": max(decode.batch for decode in plan.decodes),
    }  # fmt: skip
    for name in ENGINES if setup.peers is not None else ENGINES[:1]:
        say(f"starting {name}")
        ours = {"batch_invariant": setup.batch_invariant} if name == "kvstrata" else {}
        try:
            child = _child(name, setup, stack)
            stack.callback(child.close)
            result.what[name] = str(child.ask("start", START_S, **asked, **ours)["what"])
        except ChildFailed as error:
            if name == "kvstrata":
                raise
            result.absent[name] = str(error)
            continue
        yield name, child


def _child(name: str, setup: Setup, stack: contextlib.ExitStack) -> Child:
    """Raises ChildFailed, with the reason, when it is not installed."""
    if name == "kvstrata":
        return Child.of_module("cli.bench.engines.ours")
    if name == "transformers":
        if importlib.util.find_spec("transformers") is None:
            raise ChildFailed("not installed: pip install transformers")
        return Child.of_module("cli.bench.engines.transformers_model")
    assert setup.peers is not None
    python = setup.peers / "bin/python"
    if not python.exists():
        raise ChildFailed(f"not installed in {setup.peers}: add --install-peers")
    # Its Python sees this one package of ours and none of our dependencies.
    source = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstrata-bench-")))
    (source / "cli").symlink_to(Path(cli.__path__[0]), target_is_directory=True)
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {"PYTHONPATH": str(source), "PATH": path, "OMP_NUM_THREADS": str(setup.threads)}
    return Child(name, [str(python), "-m", "cli.bench.engines.vllm_engine"], env)


def threads_here() -> int:
    return len(os.sched_getaffinity(0))
