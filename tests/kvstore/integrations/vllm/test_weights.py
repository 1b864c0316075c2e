"""Weights' names: equal only where the same files, run the same way, are what vLLM computes with."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from kvstore.clock import wall_clock_seconds
from kvstore.errors import ConfigError
from kvstore.integrations.vllm import file_times
from kvstore.integrations.vllm.config import read_config
from kvstore.integrations.vllm.file_digests import files_digest, weight_files
from kvstore.integrations.vllm.file_times import newer_than_process
from kvstore.integrations.vllm.weights import weights_of
from tests.kvstore.integrations.vllm.test_facts import engine, model_folder

GIVEN = "ab" * 16
LONG = {"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096}

process_started_s = file_times.process_started_s  # itself: the room's tests see another one


def name_of(folder: Path, extra: dict[str, Any] | None = None, **changes: Any) -> bytes:
    return weights_of(engine(folder, **changes)[0], read_config(extra or {}))()


def test_weights_are_named_by_their_bytes_and_how_they_are_run(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    plain = weights_of(engine(folder)[0], read_config({}))()
    assert plain == weights_of(engine(folder)[0], read_config({}))()
    scaled = name_of(folder, overrides={"rope_theta": 1.0})
    (folder / "model.safetensors").write_bytes(b"other")
    other = weights_of(engine(folder)[0], read_config({}))()
    assert len({plain, scaled, other}) == 3
    assert name_of(folder, {"weights_digest": GIVEN}) == bytes.fromhex(GIVEN), "as our own engine has it"


def test_weights_that_nobody_can_name_must_be_named_by_the_user(tmp_path: Path) -> None:
    for config in (
        engine(tmp_path, load_format="dummy")[0],
        engine(tmp_path, overrides=lambda config: config)[0],
    ):
        with pytest.raises(ConfigError, match="give weights_digest"):
            weights_of(config, read_config({}))
    with pytest.raises(ConfigError, match="no safetensors"):
        weights_of(engine(tmp_path)[0], read_config({}))
    weights_of(engine(tmp_path)[0], read_config({"epoch": "store"}))


@pytest.mark.parametrize("extra", [{}, {"weights_digest": GIVEN}], ids=["files", "given"])
@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"quantization": "fp8"}},
        {"model": {"quantization_config": {"linear": "int8"}}},
        {"model": {"hf_config_path": "/elsewhere"}},
        {"model": {"config_format": "mistral"}},
        {"model": {"disable_sliding_window": True}},
        {"model": {"model_class_overrides": {"A": "b:C"}}},
        {"overrides": {"rope_theta": 1.0}, "resolved": {"rope_theta": 1.0}},
    ],
    ids=str,
)
def test_other_kv_of_the_same_files_has_another_name(
    tmp_path: Path, extra: dict[str, Any], changes: dict[str, Any]
) -> None:
    folder = model_folder(tmp_path)
    assert name_of(folder, extra, **changes) == name_of(folder, extra, **changes)
    assert name_of(folder, extra, **changes) != name_of(folder, extra)


def test_a_function_of_overrides_is_named_by_what_it_made(tmp_path: Path) -> None:
    given, told = {"weights_digest": GIVEN}, {"overrides": lambda config: config}
    made = {name_of(tmp_path, given, resolved={"rope_theta": theta}, **told) for theta in (1.0, 2.0)}
    assert len(made | {bytes.fromhex(GIVEN)}) == 3
    dummies = name_of(tmp_path, given, load_format="dummy")
    assert dummies != bytes.fromhex(GIVEN), "no weights of the folder's"


def test_the_settings_that_count_are_those_vllm_has_resolved(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    plain = name_of(folder)
    assert name_of(folder, resolved={"rope_theta": 2.0}) != plain, "from elsewhere than config.json"
    same = {"rope_theta": 1e4, "transformers_version": "5.0", "_name_or_path": "/other"}
    assert name_of(folder, resolved=same) == plain, "who wrote them, and where, makes no KV"


@pytest.mark.parametrize("extra", [{}, {"weights_digest": GIVEN}], ids=["files", "given"])
def test_long_rope_is_another_model_beyond_its_first_length(tmp_path: Path, extra: dict[str, Any]) -> None:
    folder = model_folder(tmp_path)
    names = [name_of(folder, extra, resolved=LONG, max_model_len=n) for n in (2048, 4096, 4097, 131072)]
    assert names[0] == names[1] != names[2] == names[3]
    nested = {"text_config": LONG}
    inner = {name_of(folder, extra, resolved=nested, max_model_len=n) for n in (4096, 4097)}
    assert len(inner) == 2
    assert name_of(folder, extra, max_model_len=9) == name_of(folder, extra, max_model_len=99999), (
        "no other rope"
    )


def test_a_given_digest_is_held_against_the_files(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    printed = {"weights_digest": GIVEN, "files_digest": files_digest(weight_files(folder)).hex()}
    assert name_of(folder, printed) == bytes.fromhex(GIVEN)
    (folder / "model.safetensors").write_bytes(b"of another day")
    with pytest.raises(ConfigError, match="print the settings again"):
        name_of(folder, printed)


def started(monkeypatch: pytest.MonkeyPatch, at_s: float) -> None:
    monkeypatch.setattr(file_times, "process_started_s", lambda: at_s)


@pytest.mark.parametrize("deed", ["write", "keep_times", "rename", "link"])
def test_files_that_changed_under_a_running_vllm_name_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str
) -> None:
    folder = model_folder(tmp_path)
    file, other = folder / "model.safetensors", tmp_path / "other"
    before = name_of(folder)
    if deed == "rename":
        other.write_bytes(b"trained")
        other.rename(file)
    elif deed == "link":
        other.write_bytes(b"trained")
        file.unlink()
        file.symlink_to(other)
    else:
        file.write_bytes(b"trained")
    if deed == "keep_times":
        os.utime(file, (1, 1))
    started(monkeypatch, wall_clock_seconds() - 60.0)
    printed = {"weights_digest": GIVEN, "files_digest": files_digest(weight_files(folder)).hex()}
    names = {name_of(folder) for _ in range(2)} | {name_of(folder, printed) for _ in range(2)}
    assert len(names | {before, bytes.fromhex(GIVEN)}) == 6, "a random one each"


def test_a_folder_that_is_a_link_to_another_version_by_now_names_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v2").mkdir()
    folder = model_folder(tmp_path / "v2")
    changed = max(file.stat().st_ctime for file in weight_files(folder))
    current = tmp_path / "current"
    while not current.is_symlink():
        current.symlink_to(folder)
        if current.lstat().st_ctime <= changed:  # of one tick of the file system's clock
            current.unlink()
    started(monkeypatch, changed)
    assert newer_than_process(weight_files(folder)) is None
    assert newer_than_process(weight_files(current)) == current


def test_times_that_lie_ahead_or_before_the_start_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path)
    os.utime(folder / "model.safetensors", (1 << 33, 1 << 33))
    started(monkeypatch, max(file.stat().st_ctime for file in weight_files(folder)))
    plain = name_of(folder)
    assert plain == name_of(folder)
    monkeypatch.setattr(file_times, "wall_clock_seconds", lambda: 1_000_000)  # a clock that was set back
    started(monkeypatch, 999_000.0)
    assert name_of(folder) == plain


def test_a_process_knows_when_it_began() -> None:
    process_started_s.cache_clear()
    began = process_started_s()
    cpu_s = time.process_time()
    assert began <= wall_clock_seconds() + 1 - min(cpu_s, 0.5)
    assert began > wall_clock_seconds() - 24 * 3600, "this run's"
