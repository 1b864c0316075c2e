"""Joining a cluster: what stands in the way is told in seconds, with its cure; a token is shown unasked."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router import cluster
from router.errors import StartFailed


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and an environment that says nothing of Ray and is put back."""
    for name in ("AUTH_MODE", "AUTH_TOKEN", "AUTH_TOKEN_PATH", "ADDRESS", "NUM_REDIS_GET_RETRIES"):
        monkeypatch.setenv(f"RAY_{name}", "")
        monkeypatch.delenv(f"RAY_{name}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.2", 0)) as server:
        yield f"127.0.0.2:{server.getsockname()[1]}"


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Ray would be asked for, instead of asking it."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(cluster, "_init", lambda **options: calls.append(options))
    return calls


def test_where_nothing_listens_ray_is_not_asked(joined: list[dict[str, Any]]) -> None:
    with socket.create_server(("127.0.0.2", 0)) as closed:
        address = f"127.0.0.2:{closed.getsockname()[1]}"
    with pytest.raises(StartFailed, match=f"nothing listens at {address}: give the address of the"):
        cluster.join(address)
    assert joined == []


def test_an_address_without_a_port_is_none() -> None:
    with pytest.raises(
        StartFailed, match="'elsewhere' is no address of a cluster: give `auto`, or host:port"
    ):
        cluster.join("elsewhere")


def test_without_a_cluster_the_cure_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_address: str) -> str:
        raise ConnectionError

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", none)
    with pytest.raises(StartFailed, match="no Ray cluster runs on this machine: start one"):
        cluster.join("auto")


def test_a_refusal_speaks_of_the_token(listening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_options: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setattr(cluster, "_init", refuse)
    with pytest.raises(StartFailed, match="where it asks for a token, set RAY_AUTH_MODE=token"):
        cluster.join(listening)


@pytest.mark.parametrize("where", ["home", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_is_there_is_shown(
    where: str, home: Path, listening: str, joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "home":
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").touch()
    else:
        monkeypatch.setenv(where, "given")
    cluster.join(listening)
    assert len(joined) == 1
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_without_a_token_or_where_it_was_said_the_mode_stays(
    listening: str, joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.join(listening)
    assert "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster.join(listening)
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert len(joined) == 2
