"""Renders the chart with Helm's own SDK, and finds objects in what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import yaml

REPO = Path(__file__).resolve().parents[2]
CHART = REPO / "helm" / "kvstrata"

Object = dict[str, Any]


def render(values: dict[str, Any] | None = None, name: str = "demo") -> dict[str, Object]:
    """The rendered objects by kind (the chart has one of each). Values are checked against the schema first.

    Raises `helm_python.HelmValuesError` for values that the schema refuses.
    """
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values))
        rendered = chart.render(values, name=name, namespace="serving")
    documents = (yaml.safe_load(text) for path, text in rendered.items() if path.endswith(".yaml"))
    objects = [document for document in documents if document is not None]
    by_kind = {document["kind"]: document for document in objects}
    assert len(by_kind) == len(objects), "two objects of one kind: find them by name instead"
    return by_kind


def pod_templates(objects: dict[str, Object]) -> dict[str, Object]:
    """Every pod template the chart makes: the cluster's groups by role, and the job's submitter."""
    cluster = objects["RayCluster"]["spec"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    submitter = objects["RayJob"]["spec"]["submitterPodTemplate"]
    return {"head": cluster["headGroupSpec"]["template"], **workers, "submitter": submitter}
