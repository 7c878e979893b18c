# SPDX-License-Identifier: Apache-2.0
"""`kubectl cryoci`, called by a real kubectl as its plugin, against an API server that speaks TLS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import UsageError
from cryoci.uses import kube, kube_doctor, kubelet_archive
from tests.unit.kube_api import TOKEN, Api, failure, pod, serving

REPO = Path(__file__).resolve().parents[2]
ARCHIVE = "/var/lib/kubelet/checkpoints/checkpoint-web_shop-app-2026-01-02T03:04:05Z.tar"
IMAGE = "registry.example:5000/checkpoints:web_shop-app-1"


def find_kubectl() -> str | None:
    """This machine's kubectl, or that of the node tree (it is one static program)."""
    in_tree = sorted(REPO.glob(".cache/node/tree-*/usr/bin/kubectl"))
    return shutil.which("kubectl") or (str(in_tree[-1]) if in_tree else None)


KUBECTL = find_kubectl()
pytestmark = pytest.mark.skipif(
    KUBECTL is None, reason="there is no kubectl on this machine or in the node tree"
)


class Cluster:
    """A kubectl with the plugin on its PATH, and the server that it talks to."""

    def __init__(self, api: Api, config: Path, directory: Path) -> None:
        self.api, self.config = api, config
        plugins = directory / "plugins"
        plugins.mkdir()
        plugin = plugins / "kubectl-cryoci"
        plugin.write_text(f'#!/bin/sh\nexec {sys.executable} -m cryoci.cli.kubectl_cryoci "$@"\n')
        plugin.chmod(0o755)
        (plugins / "kubectl").symlink_to(str(KUBECTL))
        self.env = {
            **os.environ,
            "KUBECONFIG": str(config),
            "PATH": f"{plugins}:{os.environ.get('PATH', os.defpath)}",
            "HOME": str(directory),
            "PYTHONPATH": str(REPO),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", "cryoci", *words],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def fails(self, *words: str) -> str:
        result = self.run(*words)
        assert result.returncode in (1, 2), result.stdout + result.stderr
        assert "Traceback" not in result.stderr and "hint: " in result.stderr, result.stderr
        return result.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with serving(tmp_path) as (api, config):
        yield Cluster(api, config, tmp_path)


def test_checkpoint_goes_through_the_node_proxy(cluster: Cluster) -> None:
    result = cluster.run("checkpoint", "web", "--timeout", "90s", "--json")
    assert result.returncode == 0, result.stderr
    assert cluster.api.asked == ["POST /api/v1/nodes/n1/proxy/checkpoint/shop/web/app?timeout=90"]
    made = json.loads(result.stdout)
    assert (
        made["path"] == ARCHIVE
        and made["node"] == "n1"
        and made["tag"] == "web_shop-app-2026-01-02T03-04-05Z"
    )
    assert cluster.run("checkpoint", "two", "-c", "sidecar", "-n", "shop", "-q").stdout.strip() == ARCHIVE
    assert cluster.api.asked[-1].startswith("POST /api/v1/nodes/n1/proxy/checkpoint/shop/two/sidecar")


FAILED = "checkpointing of shop/web/app failed (rpc error: code = "
RBAC = 'nodes "n1" is forbidden: User "eve" cannot create resource "nodes/proxy" in API group ""'
KUBELET = "Forbidden (user=kube-apiserver-kubelet-client, verb=create, resource=nodes, subresource(s)=[checkpoint])"
REFUSALS: dict[str, tuple[tuple[int, object], str]] = {
    "rbac": (failure(403, "Forbidden", RBAC), "clusterrole=cryoci-checkpointer"),
    "kubelet": ((403, KUBELET), "cryoci-kubelet-checkpoint"),
    "gate": ((404, "404 page not found"), "ContainerCheckpoint is off"),
    "unimplemented": (
        (500, f"{FAILED}Unimplemented desc = unknown method CheckpointContainer)"),
        "cannot checkpoint",
    ),
    "off": (
        (500, f"{FAILED}Unknown desc = checkpoint/restore support not available)"),
        "enable_criu_support",
    ),
    "criu": ((500, f"{FAILED}Unknown desc = failed to checkpoint: criu failed)"), "dump.log says why"),
    "empty": ((200, {"items": []}), "without an archive"),
}


@pytest.mark.parametrize(("kubelet", "said"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_explained(cluster: Cluster, kubelet: tuple[int, object], said: str) -> None:
    cluster.api.kubelet = kubelet
    result = cluster.run("checkpoint", "web")
    assert result.returncode == 1 and said in result.stderr, result.stderr


def test_wrong_words(cluster: Cluster) -> None:
    assert "app|sidecar" in cluster.fails("checkpoint", "two")
    assert "it has app, sidecar" in cluster.fails("checkpoint", "two", "-c", "nope")
    assert "is Succeeded" in cluster.fails("checkpoint", "done")
    assert "no such thing" in cluster.fails("checkpoint", "nobody")
    cluster.config.write_text(cluster.config.read_text().replace(TOKEN, "stale"))
    assert "does not know you" in cluster.fails("checkpoint", "web")


def test_restore_creates_a_pod_that_belongs_to_nobody(cluster: Cluster) -> None:
    result = cluster.run("restore", "web", "--image", IMAGE, "--node", "n2")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"created pod shop/web-restored from {IMAGE}\n"
    (made,) = cluster.api.created
    assert made["metadata"]["annotations"] == {"io.cryoci.restore.app": IMAGE}
    assert made["metadata"]["labels"] == {"app": "web"} and "ownerReferences" not in made["metadata"]
    assert "uid" not in made["metadata"] and "resourceVersion" not in made["metadata"]
    spec = made["spec"]
    assert spec["runtimeClassName"] == "cryoci" and "nodeName" not in spec
    assert spec["nodeSelector"] == {"kubernetes.io/hostname": "n2"}
    assert spec["containers"] == [{"name": "app", "image": "registry.example/app:1"}]


def test_restore_of_a_pod_that_is_gone(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "pod.json").write_text(json.dumps(pod("gone", "app")))
    words = ["restore", "gone", "--image", IMAGE, "--name", "again", "--dry-run"]
    shown = json.loads(cluster.run(*words, "--manifest", str(tmp_path / "pod.json")).stdout)
    assert shown["metadata"]["name"] == "again" and cluster.api.created == []
    with pytest.raises(UsageError, match="registry"):
        kube.restoring(pod("web", "app"), None, "local:1", name=None, node=None, runtime_class="cryoci")


def test_doctor(cluster: Cluster) -> None:
    result = cluster.run("doctor", "--json")
    findings = {one["what"]: one for one in json.loads(result.stdout)}
    assert result.returncode == 1  # there are no agents
    assert not findings["agents"]["ok"] and findings["RuntimeClass cryoci"]["ok"]
    assert findings["node n1: gate ContainerCheckpoint"]["ok"] and findings["node n1: runtime"]["ok"]
    assert findings["permission: create nodes/proxy"]["ok"]
    cluster.api.gates, cluster.api.runtime, cluster.api.may = (
        {"ContainerCheckpoint": False},
        "containerd://1.7.2",
        False,
    )
    findings = {one["what"]: one for one in json.loads(cluster.run("doctor", "--json").stdout)}
    assert not any(
        findings[name]["ok"]
        for name in (
            "node n1: gate ContainerCheckpoint",
            "node n1: runtime",
            "permission: create nodes/proxy",
        )
    )
    assert "featureGates" in cluster.run("doctor").stdout


def test_names_of_archives() -> None:
    long = f"checkpoint-{'p' * 120}_shop-app-2026-01-02T03:04:05Z.tar"
    assert len(kubelet_archive.tag(long)) == 128 != len(long)
    assert kubelet_archive.tag(long) != kubelet_archive.tag(long.replace("05Z", "06Z"))
    assert kubelet_archive.parse("checkpoint-a-b_c-d-e-2026-01-02T03:04:05+02:00.tar") == (
        "a-b_c-d-e", "2026-01-02T03:04:05+02:00",
    )  # fmt: skip
    for name in (
        "checkpoint.tar",
        "checkpoint-a_b-c.tar",
        "../checkpoint-a_b-c-2026-01-02T03:04:05Z.tar.gz",
    ):
        with pytest.raises(UsageError):
            kubelet_archive.parse(name)


def test_versions() -> None:
    assert kube_doctor.version("v1.33.0-gke.1") == (1, 33) and kube_doctor.version("?") == (0, 0)


def test_the_manifests_build() -> None:
    made = subprocess.run(
        [str(KUBECTL), "kustomize", str(REPO / "crio-config/kubernetes/agent")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "kind: DaemonSet" in made and "image: registry.example.com/cryoci:0.1.0" in made
