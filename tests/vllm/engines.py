"""vLLM engines for tests, each a process in vLLM's environment."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, Final

from cli.bench.jsonlines import Child
from cli.bench.peers.vllm_environment import vllm_folder

REPO: Final = Path(__file__).resolve().parents[2]
START_S: Final = 240.0
CALL_S: Final = 60.0
FINISH_S: Final = 60.0
STEPS_A_CALL: Final = 64
_ids = count()


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    cached: int  # prompt tokens that were not computed
    finish: str
    params: dict[str, Any] | None  # kv_transfer_params of the answer


class VllmEngine:
    """One engine. Calls wait for their answer, CALL_S at most: what hangs fails the test."""

    def __init__(self, folder: Path, transfer: dict[str, Any] | None = None, **options: Any) -> None:
        python = vllm_folder() / "bin/python"
        self._child = Child("vllm", [str(python), "-m", "tests.vllm.engine_child"], environment())
        defaults = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "disable_log_stats": False}
        asked = {"folder": str(folder), "transfer": transfer, "options": defaults | options}
        try:
            started = self._child.ask("start", START_S, **asked)
        except BaseException:
            self._child.close()
            raise
        self.block_size: int = started["block_size"]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int = 8,
        *,
        params: dict[str, Any] | None = None,
        salt: str = "",
    ) -> list[Answer]:
        """Greedy answers to all prompts, in company, in the order of the prompts."""
        ids = self.add(prompts, tokens, params=params, salt=salt)
        answers = self.finish()
        return [answers[asked] for asked in ids]

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        *,
        params: dict[str, Any] | None = None,
        salt: str = "",
    ) -> list[str]:
        ids = [f"request-{next(_ids)}" for _ in prompts]
        requests = [
            {"id": asked, "prompt": list(prompt), "tokens": tokens, "params": params, "salt": salt}
            for asked, prompt in zip(ids, prompts, strict=True)
        ]
        self._child.ask("add", CALL_S, requests=requests)
        return ids

    def finish(self) -> dict[str, Answer]:
        """Step until nothing is unfinished; what finished. A step may do nothing: a request that waits for
        the store is no reason to wait. What is unfinished after FINISH_S hangs."""
        answers: dict[str, Answer] = {}
        deadline = monotonic() + FINISH_S
        while self.step(STEPS_A_CALL, answers):
            assert monotonic() < deadline, f"unfinished after {FINISH_S} s, of {len(answers)} finished ones"
        return answers

    def step(self, count: int, answers: dict[str, Answer]) -> bool:
        """At most so many steps; what finished goes to `answers`. Whether anything is unfinished."""
        asked = self._child.ask("step", CALL_S, count=count)
        for found in asked["finished"]:
            answers[found["id"]] = Answer(
                tuple(found["tokens"]), found["cached"], found["finish"], found["params"]
            )
        return bool(asked["unfinished"])

    def idle_steps(self, count: int = 4) -> None:
        """Steps without requests, in which what ended last is told between the halves of a connector."""
        self._child.ask("idle", CALL_S, count=count)

    def abort(self, ids: Sequence[str]) -> None:
        self._child.ask("abort", CALL_S, ids=list(ids))

    def forget(self) -> None:
        """vLLM's own prefix cache goes; the connector is told nothing."""
        assert self._child.ask("reset", CALL_S, connector=False, running=False)["done"]

    def reset(self, *, running: bool = False) -> None:
        """As whoever changed the weights has to: the connector is told, too."""
        assert self._child.ask("reset", CALL_S, connector=True, running=running)["done"]

    def perturb(self, seed: int) -> None:
        self._child.ask("perturb", CALL_S, seed=seed)

    def reload(self, folder: Path) -> None:
        self._child.ask("reload", CALL_S, folder=str(folder))

    def counted(self, event: str) -> float:
        """Of the connector's counters, as Prometheus has it."""
        return self.counters().get(f"vllm:kvstrata_events_total{{event={event}}}", 0.0)

    def counters(self) -> dict[str, float]:
        found: dict[str, float] = self._child.ask("counters", CALL_S)["counters"]
        return found

    def until_nothing_is_held(self) -> None:
        """By the connector's halves or in vLLM's pool: threads beside the steps give things back."""
        deadline = monotonic() + FINISH_S
        while held := {what: count for what, count in self._child.ask("held", CALL_S).items() if count}:
            assert monotonic() < deadline, f"after {FINISH_S} s: {held}"

    def close(self) -> None:
        self._child.close()


@contextmanager
def engine(folder: Path, transfer: dict[str, Any] | None = None, **options: Any) -> Iterator[VllmEngine]:
    started = VllmEngine(folder, transfer, **options)
    try:
        yield started
    finally:
        started.close()


def environment() -> dict[str, str]:
    """Of a process in vLLM's environment that finds our source."""
    binaries = vllm_folder() / "bin"
    return {
        "PYTHONPATH": str(REPO),
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
