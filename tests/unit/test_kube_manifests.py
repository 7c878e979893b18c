# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""crio-config/kubernetes: roles that grant what is called and no more, overlays that kubectl builds and applies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit import kube_schema
from tests.unit.images import no_credentials, registry  # noqa: F401
from tests.unit.kube_api import Asked, controller
from tests.unit.kube_cluster import (  # noqa: F401
    MANIFESTS,
    REPO,
    Cluster,
    cluster,
    granted,
    images,
    program,
    role,
)
from tests.unit.test_kube_restore import OWNERS

pytestmark = pytest.mark.usefixtures("no_credentials")


def test_the_role_is_enough_and_nothing_is_too_much(cluster: Cluster, images: dict[str, str]) -> None:
    """Everything that the plugin does needs exactly what cryoci-checkpointer grants."""
    rules = role("cryoci-checkpointer", "base/rbac.yaml")
    cluster.api.rules, cluster.api.agents = rules, True
    assert cluster.run("doctor").returncode == 0
    assert cluster.run("checkpoint", "web").returncode == 0
    owner = cluster.api.pods["web"]["metadata"]["ownerReferences"][0]
    for kind, (version, selector) in OWNERS.items():
        owner |= {"apiVersion": version, "kind": kind}
        cluster.api.controllers[f"{kind.lower()}s", "web"] = controller(kind, "web", selector)
        restore = ["restore", "web", "--image", images["cpu"], "--name", "web-1"]
        assert cluster.run(*restore).returncode == 0, kind
    assert cluster.api.used == granted(rules)
    for words in (
        ["delete", "pod", "web", "--now"],
        ["get", "pods"],
        ["label", "node", "n1", "cryoci.io/runtime=true"],
        ["get", "--raw=/api/v1/namespaces/shop/secrets/key"],
    ):
        refused = cluster.kubectl(*words)
        assert refused.returncode != 0 and "forbidden" in refused.stderr.lower(), words


@pytest.mark.parametrize(
    ("resource", "words"),
    [
        ("nodes/proxy", ("checkpoint", "web")),
        ("pods", ("checkpoint", "web")),
        ("nodes", ("restore", "web", "--image", "{cpu}")),
        ("runtimeclasses", ("restore", "web", "--image", "{cpu}")),
        ("replicasets", ("restore", "web", "--image", "{cpu}")),
    ],
)
def test_what_the_role_lacks_is_said(
    cluster: Cluster, images: dict[str, str], resource: str, words: tuple[str, ...]
) -> None:
    rules = role("cryoci-checkpointer", "base/rbac.yaml")
    cluster.api.rules = [one for one in rules if resource not in one["resources"]]
    said = cluster.fails(*(word.format(**images) for word in words))
    assert "the API server forbids that" in said and f'"{resource}"' in said
    assert "--clusterrole=cryoci-checkpointer" in said and cluster.api.created == []


def test_the_agents_role(cluster: Cluster) -> None:
    """It labels nodes, by a patch, and can do nothing else."""
    rules = role("cryoci-node-labeller", "components/gpu/rbac.yaml")
    assert granted(rules) == {Asked("patch", "", "nodes")}


OVERLAYS = {
    path.parent.name: path.parent for path in sorted(MANIFESTS.glob("overlays/*/kustomization.yaml"))
}


def built(program: str, directory: Path) -> list[dict[str, Any]]:
    made = subprocess.run([program, "kustomize", str(directory)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(made.stdout))


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays(cluster: Cluster, program: str, name: str) -> None:
    """kubectl builds each, and every object is one that Kubernetes knows, to the last field."""
    objects = {(one["kind"], one["metadata"]["name"]): one for one in built(program, OVERLAYS[name])}
    assert [kube_schema.problems(one) for one in objects.values()] == [[]] * len(objects)
    install = objects["DaemonSet", "cryoci-install"]["spec"]["template"]["spec"]["initContainers"][0]
    assert install["env"] == [{"name": "ENGINE", "value": "crio" if "cri-o" in name else "containerd"}]
    agent = objects["DaemonSet", "cryoci-agent"]["spec"]["template"]["spec"]
    container = agent["containers"][0]
    assert container["image"] == install["image"] == "registry.example.com/cryoci:0.1.0"
    (configured,) = (key for key in objects if key[0] == "ConfigMap")
    assert container["envFrom"] == [{"configMapRef": {"name": configured[1]}}]
    gpu = name.endswith("-gpu")
    assert agent["automountServiceAccountToken"] is gpu
    assert (("ClusterRole", "cryoci-node-labeller") in objects) is gpu
    variables = {one["name"] for one in container["env"]}
    assert ("CRYOCI_AGENT_LABEL_NODE" in variables) == gpu and "CRYOCI_AGENT_NODE" in variables
    namespaced = {
        one["metadata"].get("namespace") for key, one in objects.items() if key[0] in _IN_NAMESPACES
    }
    assert namespaced == {"cryoci"}
    applied = cluster.kubectl("apply", "-k", str(OVERLAYS[name]), "--dry-run=client", "--validate=false")
    assert applied.returncode == 0, applied.stderr
    assert len(applied.stdout.splitlines()) == len(objects)
    assert all(
        line.endswith(("created (dry run)", "configured (dry run)")) for line in applied.stdout.splitlines()
    )


_IN_NAMESPACES = ("DaemonSet", "ConfigMap", "ServiceAccount")


def test_every_document_is_one_of_kubernetes() -> None:
    """Patches and kustomizations are kubectl's, and seen in what it builds."""
    files = [path for path in MANIFESTS.rglob("*.yaml") if path.name != "kustomization.yaml"]
    documents = [one for path in files for one in yaml.safe_load_all(path.read_text())]
    assert len(documents) == 9
    assert [problem for one in documents for problem in kube_schema.problems(one)] == []
    for one in documents:
        for rule in one.get("rules", ()):
            for asked in granted([rule]):
                if asked.resource == "nodes/checkpoint":  # no API server's: it is what kubelets ask about
                    continue
                (served,) = (
                    each
                    for each in kube_schema.resources(asked.group, "v1")
                    if each.plural == asked.resource
                )
                assert asked.verb in served.verbs, asked


def test_a_kustomization_of_ones_own(program: str, tmp_path: Path) -> None:
    """That of the how-to. What signing adds is what the agent takes, by the names of cosign's Secret."""
    (tmp_path / "crio-config").symlink_to(MANIFESTS.parent)
    text = (REPO / "docs/how-to/kubernetes.md").read_text()
    own = "".join(line[7:] + "\n" for line in text.splitlines() if line.startswith(" " * 7))
    (tmp_path / "kustomization.yaml").write_text(own)
    objects = {(one["kind"], one["metadata"]["name"]): one for one in built(program, tmp_path)}
    assert [kube_schema.problems(one) for one in objects.values()] == [[]] * len(objects)
    (configured,) = (one for key, one in objects.items() if key[0] == "ConfigMap")
    assert configured["data"] == {
        "CRYOCI_AGENT_TO": "registry.shop.example/checkpoints",
        "CRYOCI_AGENT_KEEP": "1",
    }
    agent = objects["DaemonSet", "cryoci-agent"]["spec"]["template"]["spec"]
    volume = next(one for one in agent["volumes"] if one["name"] == "signing")
    assert volume["secret"] == {"secretName": "cryoci-signing", "defaultMode": 0o400}
    container = agent["containers"][0]
    assert container["image"] == "registry.shop.example/cryoci:1"
    assert container["envFrom"] == [{"configMapRef": {"name": configured["metadata"]["name"]}}]
    argv = [sys.executable, "-m", "cryoci.cli.main", *container["command"][1:], "--to", "registry.example/a"]
    said = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=False).stderr
    assert "no key at /signing/cosign.key" in said
