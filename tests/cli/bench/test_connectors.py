"""`kvstrata bench vllm` without vLLM: who is measured beside whom, what counts, and what the figures say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.bench.connectors import plan as cases
from cli.bench.connectors.command import _plan
from cli.bench.connectors.plan import PROMISES, Plan
from cli.bench.connectors.report import document, draw, kept
from cli.bench.connectors.run import ConnectorBench, FirstToken, Prompt, Result
from cli.bench.jsonlines import ChildFailed
from cli.main import app
from kvstore.codecs import CODECS

PLAN = Plan(rounds=3, lengths=(512, 2048), codecs=("lossless", "int8"))


class FakeVllm:
    """Cold it takes a second per 1,024 tokens, times `slower`; a hit takes `hit_s`."""

    def __init__(self, fake: FakeMachine, name: str, slower: float = 1.0, hit_s: float = 0.1) -> None:
        self.what = f"fake {name}"
        self._fake = fake
        self._name = name
        self._slower = slower
        self._hit_s = hit_s
        self._own: set[Prompt] = set()

    def first_token(self, prompt: Prompt) -> FirstToken:
        fake = self._fake
        assert not fake.unsettled, f"{self._name} runs beside what is still being saved"
        if self._name == fake.breaks:
            raise ChildFailed(f"{self._name} broke off")
        hit = prompt in self._own or prompt in fake.holds(self._name)
        fake.order.append((self._name, prompt, hit))
        self._own.add(prompt)
        if self._name in ("saving", "example"):
            fake.saved.setdefault(self._name, set()).add(prompt)
        if self._name == "saving" and not hit:
            fake.unsettled.append(prompt)
        if hit:
            return FirstToken(self._hit_s, prompt.tokens - fake.short.get(self._name, 0))
        return FirstToken(prompt.tokens / 1024 * self._slower, 0)

    def forget(self) -> None:
        self._own.clear()

    def close(self) -> None:
        self._fake.open.remove(self._name)


class FakeShard:
    def __init__(self, fake: FakeMachine, codec: str | None) -> None:
        self._fake = fake
        self._codec = codec

    def until_saved(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._fake.unsettled.remove(prompt)

    def take(self, prompt: Prompt) -> None:
        assert prompt in self._fake.saved["saving"], "what was never saved cannot be brought"
        self._fake.saved.setdefault(str(self._codec), set()).add(prompt)

    def close(self) -> None:
        self._fake.open.remove(f"shard {self._codec}")


class FakeMachine:
    def __init__(self, breaks: str = "", missing: str = "", short: dict[str, int] | None = None) -> None:
        self.breaks, self.missing, self.short = breaks, missing, short or {}
        self.order: list[tuple[str, Prompt, bool]] = []  # who, what, whether it was a hit
        self.saved: dict[str, set[Prompt]] = {}
        self.unsettled: list[Prompt] = []
        self.open: list[str] = []
        self.together = 0

    def holds(self, name: str) -> set[Prompt]:
        """What this process finds outside of itself."""
        source = {"saving": "saving", "looking": "saving", "example": "example"}.get(name, name)
        return self.saved.get(source, set())

    def _started(self, name: str, slower: float = 1.0, hit_s: float = 0.1) -> FakeVllm:
        if name == self.missing:
            raise ChildFailed("not installed")
        self.open.append(name)
        self.together = max(self.together, sum(not each.startswith("shard") for each in self.open))
        return FakeVllm(self, name, slower, hit_s)

    def alone(self) -> FakeVllm:
        return self._started("alone")

    def shard(self, codec: str | None) -> FakeShard:
        self.open.append(f"shard {codec}")
        return FakeShard(self, codec)

    def saving(self) -> FakeVllm:
        return self._started("saving", slower=1.04, hit_s=0.2)

    def looking(self) -> FakeVllm:
        return self._started("looking", slower=1.04, hit_s=0.25)

    def reading(self, codec: str) -> FakeVllm:
        return self._started(codec, hit_s=0.5)

    def example(self) -> FakeVllm:
        return self._started("example", slower=1.5, hit_s=0.4)


def ran(machine: FakeMachine, plan: Plan = PLAN) -> Result:
    result = ConnectorBench(plan, machine, lambda _: None).run()
    assert machine.open == [], "what was started is closed"
    return result


def test_every_case_is_measured_once_a_round_and_warming_up_does_not_count() -> None:
    result = ran(FakeMachine())
    once = {
        cases.OWN_CACHE, cases.COLD_SAVING, cases.COLD_LOOKING, cases.SHM, cases.GRPC, cases.EXAMPLE_COLD,
        cases.EXAMPLE, *(cases.nvme_case(codec) for codec in PLAN.codecs),
    }  # fmt: skip
    counts = {row: len(seconds) for row, seconds in result.ttft_s.items()}
    expected = {(case, n): PLAN.rounds for case in once for n in PLAN.lengths}
    assert counts == expected | {(cases.COLD, n): 2 * PLAN.rounds for n in PLAN.lengths}
    assert result.absent == {}


def test_prompts_are_new_in_each_round_and_pairs_stand_side_by_side_in_changing_order() -> None:
    machine = FakeMachine()
    ran(machine, dataclasses.replace(PLAN, codecs=()))
    colds = [(who, prompt) for who, prompt, hit in machine.order if not hit and who != "example"]
    firsts: dict[str, list[str]] = {"saving": [], "looking": []}
    for (one, prompt), (other, same) in zip(colds[::2], colds[1::2], strict=True):
        assert prompt == same
        (beside,) = {one, other} - {"alone"}
        firsts[beside].append(one)
    assert all(len(set(order)) == 2 for order in firsts.values()), "who comes first changes"
    assert len({prompt for _, prompt in colds}) == (PLAN.rounds + 1) * len(PLAN.lengths) * 2


def test_codecs_come_after_the_rest_is_closed_one_process_at_a_time() -> None:
    machine = FakeMachine()
    result = ran(machine)
    assert machine.together == 4
    for codec in PLAN.codecs:
        assert result.spread(cases.nvme_case(codec), 2048).median == 0.5


def test_a_codec_that_fails_or_an_example_that_is_not_there_is_named_and_the_rest_goes_on() -> None:
    result = ran(FakeMachine(breaks="int8", missing="example"))
    assert result.absent == {"kvstrata_nvme_int8": "int8 broke off", "example_tmpfs": "not installed",
                             "example_cold_saving": "not installed"}  # fmt: skip
    told = document(result, "float32")
    assert told["absent"] == result.absent
    assert "kvstrata_nvme_lossless" in told["ttft_s"]
    assert not {"kvstrata_nvme_int8", "example_tmpfs"} & set(told["ttft_s"])


def test_half_a_hit_is_no_figure() -> None:
    result = ran(FakeMachine(short={"lossless": 32}))
    assert "only 480 of 512 tokens" in result.absent["kvstrata_nvme_lossless"]
    machine = FakeMachine(short={"saving": 128})
    with pytest.raises(ChildFailed, match="only 384 of 512"):
        ConnectorBench(PLAN, machine, lambda _: None).run()
    assert machine.open == []


def test_a_cold_prompt_that_was_cached_fails_the_run() -> None:
    machine = FakeMachine()
    machine.saved["looking"] = machine.saved["saving"] = {Prompt(512, 10_000 + 512 + 1)}
    with pytest.raises(ChildFailed, match="of a new prompt were cached"):
        ConnectorBench(PLAN, machine, lambda _: None).run()


def test_promises_are_judged_by_both_figures() -> None:
    result = ran(FakeMachine())
    saving, looking, hit = PROMISES
    assert kept(result, saving, 2048).met is True, "4 % of 5 %"
    assert kept(result, looking, 512).met is False, "4 % of 3 %"
    assert kept(result, hit, 2048).of_medians == pytest.approx(10.0)
    assert kept(result, hit, 512) == (2.5, kept(result, hit, 512).of_pairs, None, None), "not promised there"
    uneven = Result(PLAN)
    uneven.pairs[cases.COLD_SAVING, 512] = [(1.2, 1.1), (1.0, 1.0), (9.0, 1.5)]
    judged = kept(uneven, saving, 512)
    assert judged.of_medians == pytest.approx(1.2 / 1.1)
    assert judged.of_pairs.median == pytest.approx(1.2 / 1.1)
    uneven.pairs[cases.COLD_SAVING, 512] = [(1.0, 1.0), (1.0, 1.0), (1.2, 1.0), (1.2, 1.0), (1.0, 0.9)]
    assert kept(uneven, saving, 512).met is False, "the median pair is worse than the medians are"


def test_the_document_and_the_table_say_what_was_promised_and_what_was_kept() -> None:
    result = ran(FakeMachine())
    told = json.loads(json.dumps(document(result, "bfloat16")))
    assert set(told) == {
        "ttft_s", "ratios", "dtype", "rounds", "tail_tokens", "what", "absent",
    }  # fmt: skip
    assert told["ttft_s"]["kvstrata_shm"] == {
        "512": 0.2, "512_min": 0.2, "512_max": 0.2, "2048": 0.2, "2048_min": 0.2, "2048_max": 0.2,
    }  # fmt: skip
    assert told["ratios"]["saving, of cold"]["2048"] == {
        "of_medians": 1.04, "of_pairs": 1.04, "of_pairs_min": 1.04, "of_pairs_max": 1.04, "bound": 1.05,
        "met": True,
    }  # fmt: skip
    assert told["ratios"]["times faster than cold"]["kvstrata_grpc"]["2048"] == 8.0
    assert told["what"]["vLLM alone"] == "fake alone"
    console = Console(file=StringIO(), width=160)
    draw(result, "bfloat16", console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        "looking up in vain, of cold, 512 tokens: 1.040 of medians, 1.040 (1.040 to 1.040) of pairs" in shown
    )
    assert shown.count("at most 1.03: NOT met") == 2
    assert "times faster than recomputing, 2,048 tokens: 10.000" in shown


def test_without_vllm_it_says_what_to_do(tmp_path: Path) -> None:
    asked = ["bench", "vllm", "--quick", "--json", "--vllm-venv", str(tmp_path)]
    done = CliRunner().invoke(app, asked)
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"not installed in {tmp_path}" in done.stderr
    assert "--install-peers" in done.stderr


def test_codecs_are_chosen_by_name(tmp_path: Path) -> None:
    assert _plan(None, "all", quick=True).codecs == tuple(CODECS)
    assert _plan(7, "none", quick=False) == Plan(rounds=7)
    assert _plan(None, "int8, k4v4", quick=False).codecs == ("int8", "k4v4")
    done = CliRunner().invoke(app, ["bench", "vllm", "--codecs", "zip", "--vllm-venv", str(tmp_path)])
    assert (done.exit_code, "zip is no codec" in done.stderr) == (2, True)
