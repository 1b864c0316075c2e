"""Adapters' names: what was saved under one was computed with its files, also while they change."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore.integrations.vllm import file_times
from kvstore.integrations.vllm.adapters import Adapters
from tests.kvstore.integrations.vllm.parts import PROMPT, counted, engine_of
from tests.kvstore.integrations.vllm.request import FakeRequest
from tests.kvstore.integrations.vllm.store import LocalStore


@pytest.mark.parametrize("deed", ["touch", "replace", "keep_times", "remove", "in_place"])
async def test_an_adapter_whose_files_change_has_no_name(tmp_path: Path, deed: str) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"tensors")
    adapters = Adapters()
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    name = await adapters.name_of(lora)
    assert name is not None
    assert len(name) == 32
    assert await adapters.name_of(lora) == name
    assert await adapters.name_of(None) == ""
    assert adapters.still_named(lora)
    assert adapters.still_named(None)
    if deed == "replace":
        file.write_bytes(b"other tensors")
    elif deed == "keep_times":
        before = file.stat()
        file.write_bytes(b"rosnets")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif deed == "remove":
        file.unlink()
    elif deed == "touch":
        os.utime(file, ns=(1, 1))
    else:
        lora.load_inplace = True
    if deed != "in_place":
        assert not adapters.still_named(lora), "before anybody asks for its name again"
    assert await adapters.name_of(lora) is None
    assert not adapters.still_named(lora)
    lora.load_inplace = False
    assert await adapters.name_of(lora) is None, "vLLM may have either"


async def test_an_adapter_that_vllm_may_have_read_before_it_changed_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"tensors")
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    monkeypatch.setattr(file_times, "process_started_s", lambda: file.stat().st_ctime)
    assert await Adapters().name_of(lora) is not None
    monkeypatch.setattr(file_times, "process_started_s", lambda: file.stat().st_ctime - 1.0)
    adapters = Adapters()
    assert await adapters.name_of(lora) is None
    assert not adapters.still_named(lora)


@pytest.mark.parametrize("deed", ["replace", "in_place"])
def test_a_request_under_way_saves_nothing_once_its_adapter_may_be_another(
    store: LocalStore, tmp_path: Path, deed: str
) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"tensors")
    engine = engine_of(store)
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    request = FakeRequest("r", list(PROMPT), max_tokens=30, lora_request=lora)
    engine.add(request)
    for _ in range(8):
        engine.side.settle()
        engine.step()
    before = len(engine.workers.saves)
    assert before > 0
    if deed == "replace":
        file.write_bytes(b"other tensors")
    else:
        inplace = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), load_inplace=True)
        engine.add(FakeRequest("other", list(PROMPT), lora_request=inplace))
        engine.side.settle()
    engine.run()
    assert request.num_tokens > len(PROMPT) + 8, "it went on"
    assert len(engine.workers.saves) == before
    assert counted(engine)["left_out:adapter"] > 0
    engine.close()
