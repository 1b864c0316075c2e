"""The chart is true: what it renders lints clean and is what Kubernetes and KubeRay accept."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.helm.chart import CHART, pod_templates, render

CORE_KINDS = ("ConfigMap", "NetworkPolicy", "Service", "ServiceAccount")
CRDS = {"RayCluster": "ray.io_rayclusters.yaml.gz", "RayJob": "ray.io_rayjobs.yaml.gz"}
SCHEMAS = Path(__file__).with_name("schemas")

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gpu": {"prefill": {"gpus": 1, "replicas": 4}, "decode": {"gpus": 1, "replicas": 4}},
    "placed": {
        "imagePullSecrets": [{"name": "pull"}],
        "store": {
            "nodeSelector": {"disk": "fast"},
            "tolerations": [{"key": "store", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {"podAntiAffinity": {}},
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        },
    },
    "open": {
        "networkPolicy": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
        "router": {"port": 9000, "service": {"type": "LoadBalancer", "annotations": {"a": "b"}}},
    },
}


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
def test_lints_without_a_warning(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    information = 1
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] != information] == []


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_core_objects_meet_the_schemas_of_kubernetes(values: dict[str, Any], version: str) -> None:
    objects = render(values)
    for kind in CORE_KINDS:
        kubernetes_validate.validate(objects[kind], version, strict=True)
    for role, template in pod_templates(objects).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(
            pod | {"metadata": {"name": role, **template["metadata"]}}, version, strict=True
        )


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("kind", CRDS)
def test_ray_objects_meet_the_schemas_of_kuberay(values: dict[str, Any], kind: str) -> None:
    document = render(values)[kind]
    validator = jsonschema.Draft7Validator(crd_schema(kind))
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)] == []


@pytest.mark.parametrize("kind", CRDS)
def test_the_schema_of_kuberay_sees_a_wrong_field(kind: str) -> None:
    document = render()[kind]
    document["spec"]["noSuchField"] = 1
    assert not jsonschema.Draft7Validator(crd_schema(kind)).is_valid(document)


@functools.cache
def crd_schema(kind: str) -> dict[str, Any]:
    """The v1 schema of a KubeRay kind, with unknown fields refused wherever fields are listed."""
    text = gzip.decompress((SCHEMAS / CRDS[kind]).read_bytes())
    versions = yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]
    (v1,) = [version for version in versions if version["name"] == "v1"]
    schema: dict[str, Any] = v1["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    refuse_unknown_fields(schema)
    return schema


def refuse_unknown_fields(node: Any) -> None:
    """Kubernetes prunes unknown fields in silence; a chart that writes one has a typing error."""
    if isinstance(node, list):
        for item in node:
            refuse_unknown_fields(item)
    if not isinstance(node, dict):
        return
    for value in node.values():
        refuse_unknown_fields(value)
    if node.pop("x-kubernetes-int-or-string", False):
        node["type"] = ["integer", "string"]
    is_closed = node.get("type") == "object" and isinstance(node.get("properties"), dict)
    if is_closed and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
