"""`kvstrata weights update`: what it asks a service, as which user, and what it says when that fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from engine.types import UpdateMode
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, Unavailable
from router.published import PublishedStore
from tests.router.conftest import LiveServer, serve

TOKEN = "a token of the service's own"


@pytest.fixture
def up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    """A service of this user's, with its folder for commands."""
    monkeypatch.setenv("KVSTRATA_STATE", str(tmp_path / "state"))
    for live in serve(tmp_path / "model", admin_token=TOKEN):
        with PublishedStore.at(int(live.url.rpartition(":")[2]), StoreConfig(), TOKEN) as published:
            published.write({})
            yield live


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["weights", "update", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_folder_is_told_as_every_process_of_the_machine_finds_it(
    up: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path)
    code, out, err = run("new", "--epoch", "7", "--mode", "recompute", "--url", up.url, "--json")
    assert (code, json.loads(out)["epoch"]) == (0, 7), err
    assert run("org/name", "--epoch", "8", "--url", up.url)[0] == 0
    first, second = up.service.operations.updates
    assert (first.path, first.number, first.mode) == (str(tmp_path / "new"), 7, UpdateMode.RECOMPUTE)
    assert (second.path, second.mode) == ("org/name", UpdateMode.DRAIN)


@pytest.mark.parametrize(
    "error", [ConfigError("x is a model of another shape"), Unavailable("an update is under way")]
)
def test_what_fails_is_told_in_the_services_words(up: LiveServer, error: Exception) -> None:
    up.service.operations.update_fails = error
    code, out, err = run("x", "--epoch", "7", "--url", up.url)
    assert (code, out) == (1, "")
    assert f"error: {error}" in err


def test_another_user_may_not(up: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTRATA_STATE", str(tmp_path / "another"))
    code, _, err = run("x", "--epoch", "7", "--url", up.url)
    assert code == 1
    assert "no service of yours" in err
    assert up.service.operations.updates == []
