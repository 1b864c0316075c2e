"""`kvstrata vllm-config`: what it prints is what our own engine calls the same model."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.vllm_config import identity_of
from engine.config import EngineConfig
from engine.engine import Engine
from kvstore.integrations.vllm.config import read_config
from kvstore.nouns import NamespaceSpec
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["vllm-config", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_identities_are_those_of_our_engine(folder: Path, dtype: str) -> None:
    document = json.loads(printed(str(folder), "--dtype", dtype, "--json"))
    extra = document["kv_connector_extra_config"]
    engine = Engine.load(folder, EngineConfig(dtype=dtype, pool_blocks=8, batch_invariant=False))
    assert extra["weights_digest"] == engine.weights_digest.hex()
    assert extra["tokenizer_digest"] == engine.tokenizer.digest.hex()
    spec = NamespaceSpec(folder.name, engine.layout, engine.tokenizer.digest)
    assert identity_of(folder, dtype, extra["model_id"]).spec() == spec


def test_the_connector_takes_what_is_printed(folder: Path, tmp_path: Path) -> None:
    asked = (str(folder), "--store", "10.0.0.7:7400, 10.0.0.8:7400", "--token-file", str(tmp_path / "t"))
    document = json.loads(printed(*asked, "--role", "producer", "--model-id", "mine", "--json"))
    assert document["kv_role"] == "kv_producer"
    assert document["kv_load_failure_policy"] == "recompute"
    config = read_config(document["kv_connector_extra_config"])
    assert config.addresses == ["10.0.0.7:7400", "10.0.0.8:7400"]
    assert (config.token_file, config.model_id) == (tmp_path / "t", "mine")


def test_the_files_are_named_too_so_that_others_are_not_taken_for_them(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    first, again = (json.loads(printed(str(folder), "--json")) for _ in range(2))
    named = first["kv_connector_extra_config"]["files_digest"]
    assert read_config(first["kv_connector_extra_config"]).files_digest == named
    assert again == first
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    other = json.loads(printed(str(folder), "--json"))
    assert other["kv_connector_extra_config"]["files_digest"] != named


def test_two_lines_to_paste(folder: Path) -> None:
    store, server = printed(str(folder)).splitlines()
    assert store == "kvstrata store"
    words = shlex.split(server)
    assert words[:5] == ["vllm", "serve", str(folder), "--dtype", "bfloat16"]
    assert json.loads(words[words.index("--kv-transfer-config") + 1]) == json.loads(
        printed(str(folder), "--json")
    )
    assert printed(str(folder), "--store", "other").startswith("kvstrata store --name other\n")
    (alone,) = printed(str(folder), "--store", "10.0.0.7:7400").splitlines()
    assert "10.0.0.7:7400" in alone, "a store elsewhere is not started here"


def test_what_goes_with_addresses_alone_is_refused_with_a_name(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["vllm-config", str(folder), "--token-file", str(tmp_path / "t")])
    assert done.exit_code == 2
    missing = CliRunner().invoke(app, ["vllm-config", str(tmp_path / "nothing"), "--json"])
    assert missing.exit_code == 1
    assert missing.stdout == ""
