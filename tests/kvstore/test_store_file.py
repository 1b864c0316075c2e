"""What a store keeps for its own user: private, whole, one holder at a time."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, Unavailable
from kvstore.store_file import ShardPlace, StoreFile, StoreFolder, read_private, state_root


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTRATA_STATE", str(tmp_path / "state"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_secret_and_token_are_made_once_and_are_the_users_alone() -> None:
    folder = StoreFolder.of("one")
    secret = folder.secret()
    assert len(secret) == 64
    assert folder.secret() == secret
    assert folder.token_file().read_text().strip() not in secret.decode()
    assert {mode(folder.path / name) for name in ("secret", "token")} == {0o600}
    assert mode(folder.path) == 0o700
    assert StoreFolder.of("two").secret() != secret


def test_a_file_that_others_can_read_is_refused_with_the_cure() -> None:
    token = StoreFolder.of("one").token_file()
    token.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_private(token)
    token.chmod(0o600)
    token.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_private(token)


def test_a_store_file_says_where_all_shards_are() -> None:
    folder = StoreFolder.of("one")
    places = (ShardPlace("shard-0", "h:1", "h:2", 7), ShardPlace("shard-1", "h:3", "h:4", 8))
    written = StoreFile("one", places, str(folder.token_file()))
    written.write(folder.file)
    found = StoreFile.read(folder.file)
    assert found == written
    assert [entry.address for entry in found.topology().shards] == ["h:1", "h:3"]
    assert [entry.address for entry in found.topology(admin=True).shards] == ["h:2", "h:4"]
    assert (mode(folder.file), found.client_tls()) == (0o600, None)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1, "shards": [{"shard": 1}]}', '{"version": 9}']
)
def test_what_is_no_store_file_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "store.json"
    with pytest.raises(Unavailable, match="kvstrata store"):
        StoreFile.read(path)
    path.write_text(text)
    with pytest.raises(ConfigError):
        StoreFile.read(path)


def test_one_store_of_a_name_runs_at_a_time_and_takes_its_file_along() -> None:
    folder = StoreFolder.of("one")
    with folder.running():
        StoreFile("one", (), "t").write(folder.file)
        with pytest.raises(ConfigError, match="runs already"), folder.running():
            pass
        with StoreFolder.of("two").running():
            pass
    assert not folder.file.exists()
    with folder.running():
        pass


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 65])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        StoreFolder.of(name)


def test_the_state_lies_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTRATA_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert state_root() == Path("/x/kvstrata")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert state_root() == Path("/home/me/.local/state/kvstrata")
