"""Settings: file, then environment, then flags; what is wrong is named with its cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from kvstore.config import StoreConfig, load_config
from kvstore.errors import ConfigError
from kvstore.nouns import ShardId
from kvstore.tls import ClientTls


class Service(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = "default"
    epoch: int = 0
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
        ("[store]\nshards = 'zwei'\n", "bad.toml: store.shards: 'zwei' is not a whole number"),
        ("[store]\ninsecure = 'perhaps'\n", "store.insecure: 'perhaps' is not true or false"),
        ("[store]\ncapacity_nbytes = '4GB'\n", "'4GB' is not a whole number: give bytes, like 4_000_000_000"),
        (
            "[store]\nreap_interval_s = 1.5\n",
            "store.reap_interval_s: Input should be less than or equal to 1",
        ),
        ("[store]\npolicy = 'fifo'\n", "store.policy 'fifo' is unknown: use arc"),
        ("[store]\nhost = '0.0.0.0'\n", "store.host 0.0.0.0 is not loopback: set store.tls_cert"),
        ("[store]\ntls_key = 'key.pem'\n", "TLS needs both store.tls_cert and store.tls_key"),
        ("[store]\ntls_ca = 'ca.pem'\n", "store.tls_ca needs store.tls_cert and store.tls_key"),
        ("[store]\nadmin_host = '0.0.0.0'\n", "store.admin_host 0.0.0.0 is not loopback"),
        ("[store]\nclient_key = 'k.pem'\n", "mTLS needs both store.client_cert and store.client_key"),
        ("[store.tenants.a]\n", "store.tenants.a: nothing tells this tenant from others"),
        ("[store.tenants.a]\ntokn = 'x'\n", "store.tenants.a.tokn is not a setting"),
        (
            "[store.tenants.a]\ntoken = 'x'\ntoken_file = 'f'\n",
            "store.tenants.a: token and token_file are both",
        ),
        ("[store.tenants.a]\ncertificate = 'x'\n", "store.tenants.a.certificate is only seen with mTLS"),
        ("[store\n", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(Service, path, env={})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"KVSTRATA_STORE__SHARDS": "zwei"}, "KVSTRATA_STORE__SHARDS: 'zwei' is not a whole number"),
        ({"KVSTRATA_STORE__SHARD": "2"}, "KVSTRATA_STORE__SHARD is not a setting: did you mean shards?"),
        ({"KVSTRATA_STOR__SHARDS": "2"}, "KVSTRATA_STOR__SHARDS is not a setting: did you mean store?"),
        ({"KVSTRATA_STORE__RESOURCES__A": "b"}, "KVSTRATA_STORE__RESOURCES__A: 'b' is not a number"),
        ({"KVSTRATA_EPOCH": "x"}, "KVSTRATA_EPOCH: 'x' is not a whole number"),
    ],
)
def test_a_wrong_variable_is_named_not_the_file(file: Path, env: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Service, file, env=env)
    assert str(error.value) == says


def test_a_wrong_value_in_the_file_is_not_blamed_on_a_variable_nor_on_what_a_flag_hides(file: Path) -> None:
    file.write_text("[store]\nshards = 'zwei'\n")
    with pytest.raises(ConfigError, match=r"kvstrata\.toml: store\.shards"):
        load_config(Service, file, env={"KVSTRATA_STORE__LEASES_MAX": "3"})
    env = {"KVSTRATA_STORE__SHARDS": "drei"}
    assert load_config(Service, file, {"store.shards": 2}, env).store.shards == 2


def test_a_setting_of_one_word_has_its_variable() -> None:
    env = {"KVSTRATA_MODEL": "other", "KVSTRATA_EPOCH": "3", "KVSTRATA_URL": "http://elsewhere"}
    config = load_config(Service, None, env=env)
    assert (config.model, config.epoch) == ("other", 3)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder: give the path of a TOML file"):
        load_config(Service, tmp_path, env={})


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


def test_the_bounds_of_a_shard_reach_its_core() -> None:
    limits = StoreConfig(slots_max=7, leases_max=8, lease_s_max=9.0).driver(ShardId("s"), bytes(16)).limits
    assert (limits.slots_max, limits.leases_max, limits.lease_s_max) == (7, 8, 9.0)


def test_tenants_reach_the_shard_and_their_tokens_no_log(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("from the file\n")
    path = tmp_path / "kvstrata.toml"
    path.write_text(
        f"[store.tenants.alice]\ntoken_file = '{secret}'\nquota_nbytes = 4096\nmay_bind_epochs = true\n"
        "[store.tenants.bob]\ntoken = 'in the clear'\n"
    )
    store = load_config(Service, path, env={}).store
    server = store.server("the cluster's")
    assert [(t.name, t.token, t.may_bind_epochs) for t in server.tenants] == [
        ("alice", "from the file", True),
        ("bob", "in the clear", False),
    ]
    assert store.driver(ShardId("s"), bytes(16)).quotas == {"alice": 4096}
    for shown in (repr(store), str(store), store.model_dump_json(), repr(server)):
        assert "in the clear" not in shown
        assert "from the file" not in shown
        assert "the cluster's" not in shown
    secret.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        store.server("t")
    secret.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        store.server("t")


def test_clients_of_a_shard_with_tls_use_it_too() -> None:
    assert StoreConfig().client_tls() is None
    files = {name: Path(name) for name in ("tls_cert", "tls_key", "client_ca", "client_cert", "client_key")}
    tls = StoreConfig(**files).client_tls()
    assert tls == ClientTls(Path("client_ca"), Path("client_cert"), Path("client_key"))
