"""docs/vllm.md is true: its options are all there are, its commands run, its log lines are in the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli.bench.connectors.plan as bench_plan
from cli.main import app
from cli.vllm_config import CONNECTOR
from kvstore.integrations.vllm import config, versions
from kvstore.integrations.vllm.config import ConnectorConfig, read_config
from tests.docs.test_python_api import BLOCK
from tests.house.sources import REPO
from tests.tiny_model import make_tiny_model

PAGE = REPO / "docs" / "vllm.md"
TEXT = PAGE.read_text(encoding="utf-8")
CODE = Path(inspect.getfile(config)).parent
ROW = re.compile(r"^\| (`.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)
EXAMPLE = (REPO / "examples/vllm_rl_epochs.py").read_text(encoding="utf-8").split("for step in range")[1]
CALLS = re.compile(r"([\w.]+)\(")
NAMED = re.compile(r"`([^`]+)`")


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def blocks(language: str) -> list[str]:
    return [found[2] for found in BLOCK.finditer(TEXT) if found[1] == language]


def options() -> dict[str, str]:
    """Name -> what the table says its default is."""
    found: dict[str, str] = {}
    for names, default, _ in ROW.findall(section("Options")):
        found |= dict.fromkeys(NAMED.findall(names), default)
    return found


def test_every_option_is_explained_and_none_that_is_not_there() -> None:
    assert set(options()) == set(ConnectorConfig.model_fields)


def test_defaults_are_those_of_the_code() -> None:
    written = {"false": False, "true": True, "1 GiB": 1 << 30}
    for name, said in options().items():
        default = ConnectorConfig.model_fields[name].default
        if said in ("none", "the folder's name", "of the files"):
            assert default is None, name
        elif said.startswith("`"):
            told = json.loads(said.strip("`"))
            assert read_config({name: told}) == read_config({}), name
        else:
            assert (written[said] if said in written else float(said)) == default, name


def test_settings_in_json_are_taken() -> None:
    for example in blocks("json"):
        transfer = json.loads(example)
        assert CONNECTOR.items() <= transfer.items()
        read_config(transfer.get("kv_connector_extra_config", {}))
    inline = re.findall(r'"kv_connector_extra_config": (\{.+?\})[`}]', TEXT)
    assert inline
    for example in inline:
        read_config(json.loads(example))


def ran(line: str, folder: Path, *more: str) -> Result:
    words = shlex.split(line.replace("smollm2-135m", str(folder)))
    assert words[0] == "kvstrata"
    return CliRunner().invoke(app, [*words[1:], *more])


def test_its_commands_run(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert {line.split()[1] for line in lines} == {"vllm-config", "epoch"}
    for line in lines:
        if line.split()[1] == "epoch":
            told = ran(line, folder, "--store", "no-such-store")
            assert (told.exit_code, "no store runs here" in told.output) == (1, True), told.output
            continue
        store, server = ran(line, folder).stdout.splitlines()
        shown = blocks("text")[0].splitlines()
        assert shown[0] == store
        expected = re.escape(shown[1].replace("MODEL_FOLDER", str(folder)))
        pattern = expected.replace(re.escape(" ...}'"), ".+}'")
        assert re.fullmatch(pattern, server), server


def strings() -> set[str]:
    found: set[str] = set()
    for path in CODE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_log_lines_to_look_for_are_in_the_code() -> None:
    known = strings()
    lines = [NAMED.findall(first)[0] for first, _, _ in ROW.findall(section("Troubleshooting"))]
    assert len(lines) >= 8
    missing = [line for line in lines if not any(line in text for text in known)]
    assert missing == []


def test_weights_change_while_nothing_is_in_flight_and_before_anybody_is_told() -> None:
    """Else KV of new weights is saved as of the old ones."""
    steps = re.findall(r"^\d\. (.+)", section("When weights change"), re.MULTILINE)
    assert [step.split()[0] for step in steps] == ["pause", "change", "tell", "tell", "resume:"]
    assert "nothing stay in flight" in steps[0]
    assert "the store" in steps[2]
    assert "reset_prefix_cache(reset_connector=True)" in steps[3]
    told = [
        call for call in CALLS.findall(EXAMPLE) if call in ("train", "announce", "llm.reset_prefix_cache")
    ]
    assert told[:3] == ["train", "announce", "llm.reset_prefix_cache"]


def test_versions_are_those_that_are_let_in() -> None:
    known = " and ".join(f"{major}.{minor}" for major, minor in versions.SUPPORTED)
    assert f"vLLM {known}" in section("Limits")


def test_figures_name_the_command_and_what_was_promised() -> None:
    told = section("When it helps, and when not")
    assert "kvstrata bench vllm" in told
    for promise in bench_plan.PROMISES:
        assert f"{promise.bound:g}" in told or f"{round((promise.bound - 1) * 100)} %" in told


@pytest.mark.parametrize("path", ["examples/vllm_pd/proxy.py", "examples/vllm_rl_epochs.py"])
def test_examples_it_names_are_there(path: str) -> None:
    assert path in TEXT
    assert (REPO / path).is_file()
