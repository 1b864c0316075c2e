"""The chart's own promises: it makes the workers it asks for, safe by default, reachable where it says."""

from __future__ import annotations

import json
import shlex
from typing import Any

import helm_python
import pytest

from tests.helm.chart import REPO, pod_templates, render

BAD_VALUES: dict[str, dict[str, Any]] = {
    "unknown key": {"replicas": 3},
    "no worker": {"prefill": {"replicas": 0}},
    "fraction of a worker": {"decode": {"replicas": 1.5}},
    "privileged port": {"router": {"port": 80}},
    "a port of Ray's": {"router": {"port": 8265}},
    "cpu as a number": {"head": {"cpu": 2}},
    "memory without a number": {"store": {"memory": "lots"}},
    "a model that is a command": {"model": "x; rm -rf /"},
    "Ray without token authentication": {"rayVersion": "2.40.0"},
    "root": {"podSecurityContext": {"runAsNonRoot": False}},
    "escalation": {"securityContext": {"allowPrivilegeEscalation": True}},
    "configuration as a map": {"config": {"store": {}}},
    "name too long": {"fullnameOverride": "k" * 44},
    "no clients": {"networkPolicy": {"clients": []}},
}


@pytest.mark.parametrize("values", BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values_are_refused_by_the_schema(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmValuesError):
        render(values)


def test_a_name_that_kubernetes_refuses_is_refused_before_it() -> None:
    with pytest.raises(helm_python.HelmRenderError, match="begin with a letter"):
        render(name="1st")


def test_names_stay_within_kuberays_limit() -> None:
    job = render(name="r" * 53)["RayJob"]
    assert len(job["metadata"]["name"]) <= 47


def test_every_pod_is_confined_and_gets_what_it_asks_for() -> None:
    for role, template in pod_templates(render()).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, role
        assert spec["automountServiceAccountToken"] is False, role
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, role
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, role
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, role
            assert container["resources"]["requests"] == container["resources"]["limits"], role


def test_a_disk_is_mounted_into_the_shards_and_nobody_else() -> None:
    source = {"hostPath": {"path": "/mnt/nvme0", "type": "Directory"}}
    disk = {"mountPath": "/nvme0", "source": source}
    secret = {"name": "kvstrata-store", "key": "secret"}
    with pytest.raises(helm_python.HelmRenderError, match="secret"):
        render({"store": {"disks": [disk]}})
    for role, template in pod_templates(render({"store": {"disks": [disk], "secret": secret}})).items():
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["mountPath"] == "/nvme0"]
        assert len(mounts) == (role == "store"), role
        if mounts:
            assert volumes[mounts[0]["name"]]["hostPath"] == source["hostPath"]


def test_the_stores_secret_reaches_the_head_alone() -> None:
    values = {"store": {"secret": {"name": "kvstrata-store", "key": "secret"}}}
    for role, template in pod_templates(render(values)).items():
        env = {e["name"]: e for e in template["spec"]["containers"][0].get("env", [])}
        assert ("KVSTRATA_STORE__SECRET" in env) == (role == "head"), role


def test_a_group_holds_one_worker_a_pod_and_gpus_only_where_asked() -> None:
    values = {"prefill": {"replicas": 3, "gpus": 1}, "decode": {"replicas": 2}, "store": {"replicas": 4}}
    groups = {g["groupName"]: g for g in render(values)["RayCluster"]["spec"]["workerGroupSpecs"]}
    assert {role: group["replicas"] for role, group in groups.items()} == {
        "prefill": 3,
        "decode": 2,
        "store": 4,
    }
    for role, group in groups.items():
        # KubeRay pastes the value into a shell command: the outer quotes are the shell's.
        (argument,) = shlex.split(group["rayStartParams"]["resources"])
        assert json.loads(argument) == {role: 1}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == ("1" if role == "prefill" else None)


def test_the_service_finds_the_router_and_the_policy_lets_clients_in() -> None:
    objects = render({"router": {"port": 9000}}, name="blue")
    name = objects["RayCluster"]["metadata"]["name"]
    assert objects["Service"]["spec"]["selector"] == {"ray.io/cluster": name, "ray.io/node-type": "head"}
    (port,) = objects["Service"]["spec"]["ports"]
    head = objects["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {p["name"]: p["containerPort"] for p in head["ports"]}[port["targetPort"]] == port["port"] == 9000
    opened = [rule["ports"] for rule in objects["NetworkPolicy"]["spec"]["ingress"] if "ports" in rule]
    assert [{"port": 9000, "protocol": "TCP"}] in opened
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == {"ray.io/cluster": name}


def test_no_probe_asks_the_router_before_the_job_may_start_it() -> None:
    """The job waits until every pod is ready, and the router runs in it: such a probe would wait for ever."""
    for role, template in pod_templates(render()).items():
        for container in template["spec"]["containers"]:
            assert not {"readinessProbe", "startupProbe", "livenessProbe"} & container.keys(), role


def test_the_job_runs_on_this_cluster_behind_a_token() -> None:
    objects = render(name="blue")
    name = objects["RayCluster"]["metadata"]["name"]
    assert objects["RayJob"]["spec"]["clusterSelector"] == {"ray.io/cluster": name}
    assert objects["RayCluster"]["spec"]["authOptions"] == {"mode": "token"}


def test_a_changed_configuration_changes_the_pods() -> None:
    def annotations(config: str) -> set[str]:
        templates = pod_templates(render({"config": config}))
        return {
            t["metadata"]["annotations"]["checksum/config"] for r, t in templates.items() if r != "submitter"
        }

    before, after = annotations(""), annotations("# other\n")
    assert len(before) == len(after) == 1
    assert before != after


def test_the_network_policy_can_be_left_to_others() -> None:
    assert "NetworkPolicy" not in render({"networkPolicy": {"enabled": False}})


def test_ray_is_the_version_that_is_tested() -> None:
    pins = (REPO / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"ray=={render()['RayCluster']['spec']['rayVersion']}" in pins
