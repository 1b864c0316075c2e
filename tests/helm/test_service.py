"""The chart speaks kvstrata's language: its file, flags and variables are what the service reads."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_group

from cli.main import app
from kvstore.config import load_config
from router.config import ServiceConfig
from tests.helm.chart import REPO, Object, render

CONFIG = """
[engine]
dtype = "bfloat16"
[prefill]
resources = {fast = 0.5}
[store]
capacity_nbytes = 2_147_483_648
"""


def commands(objects: dict[str, Object]) -> list[list[str]]:
    """The job's entrypoint, as the commands that its shell will run."""
    return [shlex.split(command) for command in objects["RayJob"]["spec"]["entrypoint"].split(";")]


def service_config(objects: dict[str, Object], folder: Path) -> ServiceConfig:
    """What `kvstrata up` makes of the rendered file under the rendered variables."""
    file = folder / "kvstrata.toml"
    file.write_text(objects["ConfigMap"]["data"]["kvstrata.toml"], encoding="utf-8")
    variables = yaml.safe_load(objects["RayJob"]["spec"]["runtimeEnvYAML"])["env_vars"]
    assert all(isinstance(value, str) for value in variables.values()), "Ray takes strings only"
    return load_config(ServiceConfig, file, env=variables)


def up_flags(objects: dict[str, Object]) -> dict[str, Any]:
    """The flags of the rendered `kvstrata up`, parsed by the command itself, without running it."""
    program, name, *arguments = commands(objects)[-1]
    assert program == "kvstrata"
    return dict(get_group(app).commands[name].make_context(name, arguments).params)


def test_the_rendered_configuration_is_one_the_service_takes(tmp_path: Path) -> None:
    config = service_config(render({"config": CONFIG, "prefill": {"gpus": 1}}), tmp_path)
    assert config.engine.dtype == "bfloat16"
    assert config.store.capacity_nbytes == 2 << 30
    assert config.store.host == "0.0.0.0"
    config.store.server(token="t")  # raises where shards may not listen
    assert (config.prefill.num_gpus, config.decode.num_gpus) == (1, 0)


def test_each_role_is_bound_to_the_pods_made_for_it(tmp_path: Path) -> None:
    objects = render({"config": CONFIG})
    config = service_config(objects, tmp_path)
    groups = {group["groupName"] for group in objects["RayCluster"]["spec"]["workerGroupSpecs"]}
    assert groups == {"prefill", "decode", "store"}
    assert config.prefill.resources == {"fast": 0.5, "prefill": 1}
    assert config.decode.resources == {"decode": 1}
    assert config.store.resources == {"store": 1}


def test_the_job_asks_for_as_many_workers_as_there_are_pods() -> None:
    objects = render({"prefill": {"replicas": 3}, "decode": {"replicas": 2}, "store": {"replicas": 4}})
    flags = up_flags(objects)
    assert (flags["prefill"], flags["decode"], flags["shards"]) == (3, 2, 4)
    assert (flags["address"], flags["host"], flags["insecure"]) == ("auto", "0.0.0.0", True)
    mount = Path(str(flags["config"])).parent
    head = objects["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert str(mount) in {volume["mountPath"] for volume in head["volumeMounts"]}


def test_ports_and_model_are_the_programs_defaults() -> None:
    objects, defaults = render(), ServiceConfig()
    assert objects["Service"]["spec"]["ports"][0]["port"] == defaults.router.port
    flags = up_flags(objects)
    assert (flags["port"], flags["model"]) == (defaults.router.port, defaults.model)


def test_the_api_key_comes_from_a_secret_and_only_to_the_head() -> None:
    def names(values: dict[str, Any]) -> set[str]:
        head = render(values)["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        return {variable["name"] for variable in head.get("env", [])}

    assert names({}) == set()
    assert names({"router": {"apiKeySecret": {"name": "keys"}}}) == {"KVSTRATA_ROUTER__API_KEY"}


def test_the_example_in_the_documents_is_one_the_service_takes(tmp_path: Path) -> None:
    _, _, rest = (REPO / "docs" / "operations.md").read_text(encoding="utf-8").partition("```toml\n")
    example = tmp_path / "kvstrata.toml"
    example.write_text(rest.partition("```")[0], encoding="utf-8")
    assert load_config(ServiceConfig, example, env={}) == ServiceConfig(), "the example shows the defaults"


@pytest.mark.parametrize("line", ["[router]\nprot = 8000", "modle = 'x'"])
def test_a_typing_error_in_the_configuration_is_named(line: str, tmp_path: Path) -> None:
    objects = render({"config": line})
    with pytest.raises(Exception, match="did you mean"):
        service_config(objects, tmp_path)
