"""kv_connector_extra_config: what is wrong is refused by name, with what to do."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ConfigError
from kvstore.integrations.vllm import config as module
from kvstore.integrations.vllm.config import ConnectorConfig, read_config
from kvstore.nouns import Quality


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"blocktokens": 16}, "blocktokens is not a setting: did you mean block_tokens?"),
        ({"weights_digest": "abc"}, "no digest: give 32 hex digits"),
        ({"min_quality": "best"}, "use one of lossless, int8"),
        ({"token": "t"}, "is the name of a store of this machine"),
        ({"store": []}, "give at least one shard's address"),
        ({"store": "h:1", "token": "t", "token_file": "/f"}, "the token or its file, not both"),
        ({"save": "some"}, "kv_connector_extra_config.save"),
        ({"lookup_timeout_s": 0}, "kv_connector_extra_config.lookup_timeout_s"),
    ],
)
def test_what_is_wrong_is_named(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=r"kv_connector_extra_config") as caught:
        read_config(extra)
    assert says in str(caught.value)


def test_a_store_is_a_name_or_addresses(tmp_path: Path) -> None:
    assert read_config({}).addresses == []
    assert read_config({"store": "lab"}).addresses == []
    assert read_config({"store": "10.0.0.7:7400"}).addresses == ["10.0.0.7:7400"]
    (tmp_path / "token").write_text("secret\n")
    both = read_config({"store": ["a:1", "b:2"], "token_file": str(tmp_path / "token")})
    assert (both.addresses, both.shown_token()) == (["a:1", "b:2"], "secret")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config({"store": "a:1", "token_file": str(tmp_path / "none")}).shown_token()
    assert "secret" not in repr(read_config({"store": "a:1", "token": "secret"}))


def test_a_quality_is_given_by_its_name() -> None:
    assert read_config({"min_quality": "k4v4"}).min_quality is Quality.K4V4


def test_every_setting_is_read_somewhere() -> None:
    folder = Path(module.__file__).parent
    read = {
        node.attr
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert set(ConnectorConfig.model_fields) - read == set()
