"""Settings: file, then environment, then flags; what is wrong is named with its cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from kvstore.config import StoreConfig, load_config
from kvstore.errors import ConfigError


class Service(BaseModel):
    model_config = ConfigDict(extra="forbid")

    store: StoreConfig = StoreConfig()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "kvstrata.toml"
    path.write_text("[store]\nshards = 3\npolicy = 'lru'\n")
    return path


def test_flags_win_over_environment_over_file(file: Path) -> None:
    assert load_config(Service, None, env={}).store.shards == 2
    assert load_config(Service, file, env={}).store.shards == 3
    env = {"KVSTRATA_STORE__SHARDS": "4", "KVSTRATA_CACHE": "/elsewhere"}
    assert load_config(Service, file, env=env).store.shards == 4
    assert load_config(Service, file, {"store.shards": 5, "store.policy": None}, env).store.shards == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[store]\nshard = 3\n", "store.shard is not a setting: did you mean shards?"),
        ("[stor]\n", "stor is not a setting: did you mean store?"),
        ("[store]\nshards = 0\n", "store.shards: Input should be greater than or equal to 1"),
        ("[store\n", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(Service, path, env={})
    assert says in str(error.value)


def test_a_missing_file_and_a_value_used_as_section(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(Service, tmp_path / "none.toml", env={})
    with pytest.raises(ConfigError, match="not a section"):
        load_config(Service, None, {"store": 1, "store.shards": 2}, env={})


def test_a_listener_beyond_loopback_needs_tls_or_a_word() -> None:
    with pytest.raises(ConfigError, match="insecure = true"):
        StoreConfig(host="10.0.0.1").server(token="t")
    assert StoreConfig(host="10.0.0.1", insecure=True).server(token="t").host == "10.0.0.1"
    with pytest.raises(ConfigError, match="both"):
        StoreConfig(tls_cert=Path("cert.pem")).server(token="t")
