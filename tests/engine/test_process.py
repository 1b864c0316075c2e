"""Promise: how threads wait is what the configuration says, and what the user says before it."""

from __future__ import annotations

import os

import pytest

from engine.process import SPIN_COUNT, prepare_process


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_threads_sleep_unless_they_have_cores_of_their_own() -> None:
    prepare_process()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "GOMP_SPINCOUNT" not in os.environ
    prepare_process("active")
    assert os.environ["GOMP_SPINCOUNT"] == SPIN_COUNT


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    prepare_process("active")
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("ACTIVE", "5")


def test_the_count_of_threads_is_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    prepare_process()
    assert "OMP_NUM_THREADS" not in os.environ
