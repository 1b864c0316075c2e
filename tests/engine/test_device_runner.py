"""Promise: on a device the engine says what it says on the CPU, and hands on the same blocks, in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.decode_graphs import graph_sizes
from engine.device import Device, HostDevice
from engine.engine import Engine
from engine.prediction import OutputPrediction
from engine.types import CompletedBlock, GenerationRequest, StepResult
from engine.updating import LoadedWeights
from engine.weights import load_weights
from kvstore.errors import ConfigError
from tests.engine.attention.test_triton import run as run_apart
from tests.engine.conftest import EngineFactory, prompt, request, run, tokens_of
from tests.engine.late_device import LateDevice, RecordingDevice
from tests.tiny_model import make_tiny_model

PLAIN = {"batch_invariant": False, "running_max": 6, "max_model_len": 256, "speculation": "off"}


@pytest.fixture
def make_device_engine(make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Engine(device, **settings) over a device of the tests' own."""

    def make(device: Device, **settings: Any) -> Engine:
        monkeypatch.setattr("engine.runner.CudaDevice", lambda _: device)
        return make_engine(device="cuda", **(PLAIN | settings))

    return make


def workload() -> list[GenerationRequest]:
    """Five sequences of all lengths that end at different times; some greedy, some drawn."""
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 30}
    return [
        request("a", prompt(40), 9),
        request("b", prompt(3, 1), 40, seed=5, **drawn),
        request("c", prompt(70, 2), 24),
        request("d", prompt(31, 3), 2, seed=6, **drawn),
        request("e", prompt(33, 4), 33),
    ]


def serve(engine: Engine, requests: list[GenerationRequest]) -> list[StepResult]:
    """Two at first, then one more every third step."""
    waiting = list(requests)
    results: list[StepResult] = []
    while waiting or engine.has_work():
        while waiting and engine.can_admit(waiting[0]) and len(results) >= 3 * (3 - len(waiting)):
            engine.admit(waiting.pop(0))
        results.append(engine.step())
    return results


def told(results: list[StepResult]) -> dict[str, list[int]]:
    return {one.request_id: tokens_of(results, one.request_id) for one in workload()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("step_tokens_max", [16, 512])
def test_a_gpu_says_what_the_cpu_says(make_engine: EngineFactory, step_tokens_max: int) -> None:
    there = make_engine(device="cuda", **(PLAIN | {"step_tokens_max": step_tokens_max}))
    here = make_engine(device="cpu", **(PLAIN | {"step_tokens_max": step_tokens_max}))
    assert told(serve(there, workload())) == told(serve(here, workload()))
    there.check_integrity()


def blocks_of(results: list[StepResult], name: str) -> list[CompletedBlock]:
    return [block for result in results for block in result.blocks if block.request_id == name]


@pytest.mark.parametrize("step_tokens_max", [16, 512])
def test_a_device_says_what_the_cpu_says(
    make_engine: EngineFactory, make_device_engine: Any, step_tokens_max: int
) -> None:
    device = RecordingDevice()
    there = make_device_engine(device, step_tokens_max=step_tokens_max)
    here = make_engine(device="cpu", **(PLAIN | {"step_tokens_max": step_tokens_max}))
    results, expected = serve(there, workload()), serve(here, workload())
    assert told(results) == told(expected)
    assert device.replays > 20, "decoding steps are replays"
    assert [r.tokens_computed for r in results] == [r.tokens_computed for r in expected]
    for one in workload():
        for got, wanted in zip(
            blocks_of(results, one.request_id), blocks_of(expected, one.request_id), strict=True
        ):
            assert (got.chain_index, got.attempt) == (wanted.chain_index, wanted.attempt)
            np.testing.assert_allclose(
                got.payload.view(np.float32), wanted.payload.view(np.float32), atol=2e-5, rtol=1e-4
            )
    there.check_integrity()


def test_what_others_left_in_the_pool_does_not_matter(make_device_engine: Any) -> None:
    clean, dirty = make_device_engine(RecordingDevice()), make_device_engine(RecordingDevice())
    with torch.inference_mode():
        dirty.pool.data[:, :, :-1].fill_(torch.nan)
    assert told(serve(dirty, workload())) == told(serve(clean, workload()))


def test_rows_that_pad_a_batch_write_to_nobodys_slot(make_device_engine: Any) -> None:
    engine = make_device_engine(RecordingDevice())
    for seed, name in enumerate("abcde"):
        engine.admit(request(name, prompt(20, seed), 12), keep=True)
    run(engine)
    used = {slot for sequence in engine._sequences.values() for slot in sequence.slots}
    size = engine.config.block_tokens
    rows = engine.pool.keys(0).view(-1, size, 2, 16)
    touched = {slot for slot in range(len(rows)) if rows[slot].any()}
    assert touched <= used | {engine.pool.n_slots - 1}
    assert engine.pool.n_slots - 1 not in range(len(engine.slots))


def test_blocks_come_late_but_before_their_sequence_ends(make_device_engine: Any) -> None:
    late, prompt_host = LateDevice(), make_device_engine(HostDevice())
    expected = serve(prompt_host, workload())
    results = serve(make_device_engine(late), workload())
    assert told(results) == told(expected)
    for one in workload():
        name = one.request_id
        got, wanted = blocks_of(results, name), blocks_of(expected, name)
        assert [(b.chain_index, b.payload.tobytes()) for b in got] == [
            (b.chain_index, b.payload.tobytes()) for b in wanted
        ]
        last = max(i for i, r in enumerate(results) for e in r.events if e.request_id == name)
        assert all(b.request_id != name for r in results[last + 1 :] for b in r.blocks)
    assert [len(r.blocks) for r in results] != [len(r.blocks) for r in expected], "some were late"


def test_a_parked_sequence_has_all_its_blocks_told(make_device_engine: Any) -> None:
    engine = make_device_engine(LateDevice())
    engine.admit(request("a", prompt(70), 4), hold=True)
    results = run(engine)
    assert [b.chain_index for b in blocks_of(results, "a")] == [0, 1]
    tail = engine.take_tail("a")
    assert tail is not None
    assert tail.tokens == 6


def test_an_onboarded_prefix_is_used(make_device_engine: Any) -> None:
    """Blocks and tail of one engine enter another, and it goes on as the first would."""
    late = LateDevice()
    first, second = make_device_engine(late), make_device_engine(LateDevice())
    wanted = request("a", prompt(70), 12)
    first.admit(wanted, hold=True)
    results = run(first)
    tail = first.take_tail("a")
    (token,) = tokens_of(results, "a")
    second.admit(
        GenerationRequest("a", 0, wanted.prompt_ids, wanted.sampling, (token,)),
        blocks=[block.payload for block in blocks_of(results, "a")],
        tail=tail,
    )
    alone = make_device_engine(HostDevice())
    alone.admit(wanted)
    assert [token, *tokens_of(run(second), "a")] == tokens_of(run(alone), "a")


def test_other_weights_are_computed_with_from_the_next_step_on(
    make_device_engine: Any, tmp_path: Path
) -> None:
    """A graph knows its weights by their addresses: it must be recorded anew."""
    engine = make_device_engine(RecordingDevice())
    other_folder = make_tiny_model(tmp_path, seed=1)
    other = make_device_engine(RecordingDevice(), folder=other_folder)
    assert told(serve(engine, workload())) != told(serve(other, workload()))
    weights = load_weights(other_folder, engine.model_config, torch.float32)
    model = engine.model_beside(engine.model_config, weights)
    engine.swap_weights(LoadedWeights(engine.model_config, model, weights.digest))
    assert told(serve(engine, workload())) == told(serve(other, workload()))


def test_no_block_of_the_old_weights_is_told_under_the_new(make_device_engine: Any) -> None:
    engine = make_device_engine(LateDevice())
    engine.admit(request("a", prompt(70), 20))
    assert not engine.step().blocks, "both are under way"
    model = engine._runner._model
    engine.swap_weights(LoadedWeights(engine.model_config, model, engine.weights_digest))
    assert [b.chain_index for b in blocks_of(run(engine), "a")] == []


def test_who_must_leave_has_its_blocks_told_before(
    make_device_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edge shard may keep a block only while somebody has its slot."""
    monkeypatch.setattr(OutputPrediction, "tokens", lambda _, known, longest: min(known + 1, longest))
    engine = make_device_engine(LateDevice(), pool_blocks=8)
    for index in range(3):
        engine.admit(request(f"r{index}", prompt(60, index), 60))
    had: dict[str, set[int]] = {}
    preempted = 0
    while engine.has_work():
        slots = {name: set(sequence.slots) for name, sequence in engine._sequences.items()}
        result = engine.step()
        for block in result.blocks:
            assert block.slot in slots[block.request_id]
            had.setdefault(block.request_id, set()).add(block.chain_index)
        for gone in result.preempted:
            preempted += 1
            full = (len(gone.prompt_ids) + len(gone.output_ids) - 1) // 32
            assert had[gone.request_id] >= set(range(full))
    assert preempted


def test_more_sequences_than_any_recorded_batch_are_not_admitted(make_device_engine: Any) -> None:
    engine = make_device_engine(RecordingDevice())
    for index in range(6):
        engine.admit(request(f"r{index}", prompt(4, index), 4))
    assert not engine.can_admit(request("one more", prompt(4), 4))


@pytest.mark.timeout(300)
def test_over_tritons_attention_it_says_the_same() -> None:
    said = run_apart("engine_in_interpreter", interpreted=True, timeout_s=280)
    assert said["triton"] == said["torch"]
    assert [len(answer) for answer in said["triton"]] == [4, 5, 6]
    assert said["same_blocks"], "gathered by Triton's kernel and by torch"
    assert said["blocks"] == 3


@pytest.mark.parametrize(
    ("rows_max", "sizes"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64))],
)
def test_recorded_sizes(rows_max: int, sizes: tuple[int, ...]) -> None:
    assert graph_sizes(rows_max) == sizes


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_here_is_refused(make_engine: EngineFactory, device: str) -> None:
    with pytest.raises(ConfigError, match="0 CUDA devices"):
        make_engine(device=device, batch_invariant=False)
