"""A model's folder in the cache is whole or not there, whatever stops its making."""

from __future__ import annotations

import errno
import fcntl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import DiskFull, ModelBusy, ModelCorrupt, ModelError
from engine.model_cache import MARKER, ModelCache, cache_root, needs_disk
from engine.progress import silent

Build = Callable[[Path, Path], dict[str, Any]]


def writes(text: str) -> Build:
    def build(folder: Path, scratch: Path) -> dict[str, Any]:
        (scratch / "download").write_text("kept by nobody")
        (folder / "weights").write_text(text)
        return {"from": "a test"}

    return build


def fails(error: BaseException) -> Build:
    def build(folder: Path, scratch: Path) -> dict[str, Any]:
        (folder / "weights").write_text("half")
        raise error

    return build


def left_in(cache: ModelCache) -> list[str]:
    return sorted(path.name for path in (cache.root / "models").iterdir())


def test_a_made_folder_is_complete_and_made_once(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    folder = cache.make("m", writes("one"), silent)
    assert cache.is_complete("m")
    assert cache.make("m", fails(AssertionError("made twice")), silent) == folder
    assert (folder / "weights").read_text() == "one"
    assert (cache.complete_names(), left_in(cache)) == (["m"], ["m"])


@pytest.mark.parametrize("error", [ModelCorrupt("wrong sha256", "Try again"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    cache = ModelCache(tmp_path)
    with pytest.raises(type(error)):
        cache.make("m", fails(error), silent)
    assert left_in(cache) == []
    assert cache.make("m", writes("later"), silent).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_and_names_the_cure(tmp_path: Path, number: int) -> None:
    cache = ModelCache(tmp_path)
    with pytest.raises(DiskFull, match="KVSTRATA_CACHE"):
        cache.make("m", fails(OSError(number, "no room")), silent)
    assert left_in(cache) == []


def test_an_unwritable_root_names_the_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError, match="KVSTRATA_CACHE"):
        ModelCache(tmp_path / "file").make("m", writes("one"), silent)


def test_what_a_killed_maker_left_is_removed(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    (tmp_path / "models" / ".m.killed" / "folder").mkdir(parents=True)
    cache.make("m", writes("one"), silent)
    assert left_in(cache) == ["m"]


@pytest.mark.parametrize("harm", ["shorter", "gone", "no marker", "bad marker"])
def test_a_harmed_folder_is_not_complete_and_is_made_again(tmp_path: Path, harm: str) -> None:
    cache = ModelCache(tmp_path)
    folder = cache.make("m", writes("whole"), silent)
    if harm == "shorter":
        (folder / "weights").write_text("w")
    elif harm == "gone":
        (folder / "weights").unlink()
    elif harm == "no marker":
        (folder / MARKER).unlink()
    else:
        (folder / MARKER).write_text("{")
    assert not cache.is_complete("m")
    assert (cache.make("m", writes("again"), silent) / "weights").read_text() == "again"
    assert left_in(cache) == ["m"]


def test_two_makers_at_once_make_one(tmp_path: Path) -> None:
    made, entered = [], threading.Event()
    both = threading.Barrier(2, timeout=20)

    def build(folder: Path, scratch: Path) -> dict[str, Any]:
        made.append(folder)
        assert entered.wait(20), "the other maker never came to wait"
        return writes("one")(folder, scratch)

    def waits(stage: str, done: int, total: int) -> None:
        entered.set()

    results: list[Path] = []

    def run() -> None:
        both.wait()
        results.append(ModelCache(tmp_path).make("m", build, waits))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(made), len(set(results)), len(results)) == (1, 1, 2)


def test_waiting_for_another_maker_is_bounded(tmp_path: Path) -> None:
    times = iter(range(100))
    cache = ModelCache(
        tmp_path, lock_wait_s_max=5, monotonic=lambda: float(next(times)), sleep=lambda _: None
    )
    (tmp_path / "locks").mkdir()
    stages: list[str] = []
    with (tmp_path / "locks" / "m.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ModelBusy, match="5 s"):
            cache.make("m", writes("one"), lambda stage, done, total: stages.append(stage))
    assert len(stages) == 4
    assert cache.make("m", writes("one"), silent).exists()


def test_disk_space_is_asked_for_beforehand(tmp_path: Path) -> None:
    needs_disk(tmp_path, 1)
    with pytest.raises(DiskFull, match="MB"):
        needs_disk(tmp_path, 1 << 60)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"KVSTRATA_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/kvstrata"),
        ({"HOME": "/c"}, "/c/.cache/kvstrata"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wanted: str) -> None:
    for name in ("KVSTRATA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(wanted)
