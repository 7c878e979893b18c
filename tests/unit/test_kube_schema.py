# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""The published models find what is wrong with objects: cryoci's, and those of the API server of these tests."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit import kube_schema
from tests.unit.kube_api import node, pod
from tests.unit.kube_cluster import Cluster, cluster, program  # noqa: F401


def changed(path: str, value: Any) -> dict[str, Any]:
    """A Pod with `value` at a path such as spec.containers.0.name."""
    made = copy.deepcopy(pod("web", "app"))
    *way, last = path.split(".")
    at: Any = made
    for word in way:
        at = at[int(word)] if isinstance(at, list) else at.setdefault(word, {})
    at[last] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.contianers", [], "Pod.spec.contianers: unknown field"),
        ("spec.containers.0.nmae", "x", "Pod.spec.containers[0].nmae: unknown field"),
        ("spec.containers", {}, "is no list"),
        ("spec.containers", [{"image": "x"}], "Pod.spec.containers[0].name: required"),
        ("spec.containers.0.name", "No_Label", "is not a valid name"),
        ("spec.nodeSelector", {"gpu": True}, "is no map of strings"),
        ("spec.hostPID", "true", "is no bool"),
        ("spec.priority", True, "is no int"),
        ("spec.priority", None, "is null"),
        ("spec.restartPolicy", "Sometimes", "none of Always OnFailure Never"),
        ("spec.affinity.nodeAffinity", {"requiredDuringSchedulingIgnoredDuringExecution": {}}, "required"),
        ("spec.containers.0.resources", {"limits": {"memory": "1 GB"}}, "is no quantity"),
        ("metadata.labels", {"a/b/c": "x"}, "is no valid key"),
        ("metadata.labels", {"chip": "NVIDIA H100"}, "is no valid value"),
        ("metadata.annotations", {f"io.cryoci.restore.{'c' * 60}": "x"}, "is no valid key"),
        ("metadata.name", "web.-restored", "is not a valid name"),
        ("metadata.creationTimestamp", "yesterday", "is no Time"),
        ("apiVersion", "v2", "Kubernetes has no Pod of v2"),
    ],
)
def test_what_is_wrong_is_found(path: str, value: Any, said: str) -> None:
    assert kube_schema.problems(pod("web", "app")) == kube_schema.problems(node("n1")) == []
    assert any(said in one for one in kube_schema.problems(changed(path, value)))


def test_values_are_those_of_the_descriptions() -> None:
    for (name, key), values in kube_schema.ONE_OF.items():
        (found,) = (
            kube_schema.part(module, name)
            for module in ("core_v1", "apps_v1", "meta_v1")
            if kube_schema.part(module, name)
        )
        assert found is not None
        said = re.search(rf"\* \*\*{key}\*\*.*?(?=\n\s*\* \*\*|\Z)", found.description, re.DOTALL)
        assert said is not None and all(value in said[0] for value in values.split()), (name, key)


def test_the_server_refuses_what_kubernetes_does_not_know(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "pod.json").write_text(json.dumps(changed("spec.contianers", [])))
    words = ["create", "--raw=/api/v1/namespaces/shop/pods", "-f", str(tmp_path / "pod.json")]
    refused = cluster.kubectl(*words)
    assert refused.returncode != 0 and "contianers: unknown field" in refused.stderr
    assert cluster.kubectl("get", "--raw=/api/v1/namespaces/shop/pots").returncode != 0
    assert len(cluster.api.broken) == 2 and cluster.api.created == []
    cluster.api.broken.clear()
    served = cluster.kubectl("api-resources", "--no-headers").stdout
    assert re.search(r"^runtimeclasses\s+node.k8s.io/v1\s+false\s+RuntimeClass$", served, re.MULTILINE)
