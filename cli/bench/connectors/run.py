"""One run: within a round each prompt meets everybody, and who is compared is measured one after the other.

A pair is vLLM alone, cold, and another case with the same prompt; who comes first changes with every round.
Ratios are of pairs, so that a busy machine slows both. The first round warms up and is thrown away. Before
the next measurement begins what was saved is visible: nothing runs beside one but what belongs to it.

First all that lives in memory, every process at once; then NVMe, a codec and a process at a time, with the
same prompts. A hit that is not whole fails its case by name: it is not a hit's figure.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cli.bench.connectors import plan as cases
from cli.bench.connectors.plan import Case, Plan
from cli.bench.figures import Spread
from cli.bench.jsonlines import ChildFailed

__all__ = ["ConnectorBench", "FirstToken", "Machine", "Prompt", "Result", "SavedTo", "Vllm"]


class Prompt(NamedTuple):
    tokens: int  # that can be hit; TAIL_TOKENS more are behind them
    seed: int


class FirstToken(NamedTuple):
    seconds: float  # from handing the prompt over
    cached: int  # tokens of it


class Vllm(Protocol):
    """One process. All methods raise ChildFailed."""

    what: str

    def first_token(self, prompt: Prompt) -> FirstToken: ...

    def forget(self) -> None:
        """Empty its own prefix cache."""
        ...

    def close(self) -> None: ...


class SavedTo(Protocol):
    """A store's shard, seen from outside vLLM. All methods raise ChildFailed."""

    def until_saved(self, prompts: Sequence[Prompt]) -> None:
        """Wait until the whole blocks of all of them are visible."""
        ...

    def take(self, prompt: Prompt) -> None:
        """Bring a prompt's KV here from the store in memory, and wait until it lies on NVMe alone."""
        ...

    def close(self) -> None: ...


class Machine(Protocol):
    """Starts what is measured. All methods raise ChildFailed, with the reason."""

    def alone(self) -> Vllm: ...

    def shard(self, codec: str | None) -> SavedTo:
        """The store in memory, or one that keeps everything on NVMe, encoded so."""
        ...

    def saving(self) -> Vllm: ...

    def looking(self) -> Vllm:
        """Never saves, and reads without shared memory."""
        ...

    def reading(self, codec: str) -> Vllm:
        """Never saves, and reads from the store with that codec."""
        ...

    def example(self) -> Vllm:
        """vLLM's own example connector, its files in memory."""
        ...


@dataclass(slots=True)
class Result:
    plan: Plan
    ttft_s: dict[tuple[Case, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    pairs: dict[tuple[Case, int], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # its seconds, and those of vLLM alone, cold, with the same prompt
    what: dict[str, str] = field(default_factory=dict)  # process -> what it is
    absent: dict[str, str] = field(default_factory=dict)  # case -> why

    def spread(self, case: Case, tokens: int) -> Spread:
        return Spread.of(self.ttft_s[case, tokens])

    def forget(self, case: Case, why: str) -> None:
        """Of a case that failed nothing is told but that."""
        self.absent[case] = why
        for tokens in self.plan.lengths:
            self.ttft_s.pop((case, tokens), None)
            self.pairs.pop((case, tokens), None)


class ConnectorBench:
    def __init__(self, plan: Plan, machine: Machine, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._machine = machine
        self._say = say
        self._result = Result(plan)

    def run(self) -> Result:
        """Raises ChildFailed when vLLM alone, or ours in memory, does not do its part."""
        with contextlib.ExitStack() as stack:
            self._alone = self._started("vLLM alone", self._machine.alone, stack)
            self._shard = self._machine.shard(None)
            stack.callback(self._shard.close)
            with contextlib.ExitStack() as in_memory:
                self._rounds_in_memory(in_memory)
            for codec in self._plan.codecs:
                self._or_absent(cases.nvme_case(codec), functools.partial(self._from_nvme, codec))
        return self._result

    def _started(self, name: str, start: Callable[[], Vllm], stack: contextlib.ExitStack) -> Vllm:
        self._say(f"starting {name}")
        process = start()
        stack.callback(process.close)
        self._result.what[name] = process.what
        return process

    # -- rounds ------------------------------------------------------------------------------------

    def _rounds_in_memory(self, stack: contextlib.ExitStack) -> None:
        machine = self._machine
        self._saving = self._started("vLLM with kvstrata", machine.saving, stack)
        self._looking = self._started("vLLM with kvstrata, reading over gRPC", machine.looking, stack)
        self._example: Vllm | None = None

        def example() -> None:
            self._example = self._started("vLLM with its example connector", machine.example, stack)

        self._or_absent(cases.EXAMPLE, example)
        for number in range(self._plan.rounds + 1):
            self._say(f"in memory, round {number} of {self._plan.rounds}")
            for tokens in self._plan.lengths:
                self._in_memory(number, tokens)

    def _in_memory(self, number: int, tokens: int) -> None:
        prompt, other = self._prompts(number, tokens)
        cold = self._beside_cold(cases.COLD_SAVING, number, prompt, self._saving)
        self._note(cases.OWN_CACHE, number, prompt, self._hit(self._alone, prompt), cold)
        self._saving.forget()
        self._note(cases.SHM, number, prompt, self._hit(self._saving, prompt), cold)
        self._beside_cold(cases.COLD_LOOKING, number, other, self._looking)
        self._note(cases.GRPC, number, prompt, self._hit(self._looking, prompt), cold)
        if self._example is not None:
            self._or_absent(cases.EXAMPLE, lambda: self._by_example(number, prompt, cold))

    def _by_example(self, number: int, prompt: Prompt, cold: float) -> None:
        assert self._example is not None
        self._note(cases.EXAMPLE_COLD, number, prompt, self._cold(self._example, prompt), cold)
        self._example.forget()
        self._note(cases.EXAMPLE, number, prompt, self._hit(self._example, prompt), cold)

    def _from_nvme(self, codec: str) -> None:
        case = cases.nvme_case(codec)
        with contextlib.ExitStack() as stack:
            shard = self._machine.shard(codec)
            stack.callback(shard.close)
            start = functools.partial(self._machine.reading, codec)
            reading = self._started(f"vLLM with kvstrata on NVMe, {codec}", start, stack)
            for number in range(self._plan.rounds + 1):
                self._say(f"NVMe, {codec}: round {number} of {self._plan.rounds}")
                for tokens in self._plan.lengths:
                    prompt, _ = self._prompts(number, tokens)
                    shard.take(prompt)
                    cold = self._cold(self._alone, prompt)
                    self._note(case, number, prompt, self._hit(reading, prompt), cold)

    def _prompts(self, number: int, tokens: int) -> tuple[Prompt, Prompt]:
        """Of a round: new ones, one that is saved and one that nobody has."""
        seed = 10_000 * (number + 1) + tokens
        return Prompt(tokens, seed), Prompt(tokens, seed + 1)

    # -- measurements ------------------------------------------------------------------------------

    def _beside_cold(self, case: Case, number: int, prompt: Prompt, process: Vllm) -> float:
        """A pair of cold ones, and the seconds of vLLM alone."""
        took: dict[Case, float] = {}
        turns = [(cases.COLD, self._alone), (case, process)]
        for name, each in turns if number % 2 else reversed(turns):
            took[name] = self._cold(each, prompt)
            if name == cases.COLD_SAVING:
                self._shard.until_saved([prompt])
        if number:
            self._result.ttft_s[cases.COLD, prompt.tokens].append(took[cases.COLD])
        self._note(case, number, prompt, took[case], took[cases.COLD])
        return took[cases.COLD]

    def _note(self, case: Case, number: int, prompt: Prompt, seconds: float, cold: float) -> None:
        if number:
            self._result.ttft_s[case, prompt.tokens].append(seconds)
            self._result.pairs[case, prompt.tokens].append((seconds, cold))

    def _cold(self, process: Vllm, prompt: Prompt) -> float:
        process.forget()
        got = process.first_token(prompt)
        if got.cached:
            raise ChildFailed(f"{got.cached} tokens of a new prompt were cached")
        return got.seconds

    def _hit(self, process: Vllm, prompt: Prompt) -> float:
        got = process.first_token(prompt)
        if got.cached < prompt.tokens:
            raise ChildFailed(f"only {got.cached} of {prompt.tokens} tokens were a hit")
        return got.seconds

    def _or_absent(self, case: Case, work: Callable[[], None]) -> None:
        try:
            work()
        except ChildFailed as error:
            self._say(f"{case}: {error}")
            self._result.forget(case, str(error))
            if case == cases.EXAMPLE:
                self._example = None
                self._result.forget(cases.EXAMPLE_COLD, str(error))
