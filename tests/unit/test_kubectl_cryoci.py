# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""`kubectl cryoci`, called by a real kubectl as its plugin, against an API server that speaks TLS and knows RBAC."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConflictError, NotFoundError, UsageError
from cryoci.ociimage import image, reference, stores
from cryoci.ociimage.trust import keys
from cryoci.ociimage.trust.sign import sign
from cryoci.uses import kube, kube_doctor, kubelet_archive
from cryoci.uses.kubectl import Kubectl
from tests.unit.images import make_checkpoint, no_credentials, registry  # noqa: F401
from tests.unit.kube_api import TOKEN, failure
from tests.unit.kube_cluster import Cluster, cluster, program, role  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
ARCHIVE = "/var/lib/kubelet/checkpoints/checkpoint-web_shop-app-2026-01-02T03:04:05Z.tar"
TAG = "web_shop-app-2026-01-02T03-04-05Z"


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


def test_push_waits_for_the_agent(cluster: Cluster, registry: str, tmp_path: Path) -> None:
    to = f"{registry}/agent"
    said = cluster.fails("push", "web", "--to", to, "--timeout", "1s")
    assert "no agent has pushed" in said and "logs daemonset/cryoci-agent" in said
    ref = reference.parse(f"{to}:{TAG}")
    assert isinstance(ref, reference.RegistryRef)
    digest = image.push(make_checkpoint(tmp_path / "ck", pages=1 << 20), ref).digest
    assert cluster.run("push", "web", "--to", to).stdout == f"pushed {to}:{TAG}\ndigest {digest}\n"
    assert "no agent has signed" in cluster.fails("push", "web", "--to", to, "--signed", "--timeout", "1s")
    keys.generate(tmp_path / "k", b"")
    sign(ref, keys.load_private(tmp_path / "k.key", lambda: b""))
    assert cluster.run("push", "web", "--to", to, "--signed", "-q").stdout == f"{digest}\n"
    listed = cluster.run("list", "web", "-n", "shop", "-c", "app", "--from", to)
    assert TAG in listed.stdout and listed.returncode == 0, listed.stderr
    assert cluster.run("list", "web", "-n", "other", "--from", to, "-q").stdout == ""


def test_long_waits_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the node, then for its agent, in each period; nothing once it is done."""
    pod = {
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"nodeName": "n1", "containers": [{"name": "app"}]},
        "status": {"phase": "Running"},
    }

    class Slow(Kubectl):
        def get(self, *words: str) -> Any:
            return pod

        def post_raw(self, path: str, body: Any = None, *, timeout: float = 60) -> Any:
            time.sleep(0.1)
            return {"items": [ARCHIVE]}

    def nothing(*words: object) -> None:
        raise NotFoundError("no such tag")

    said: list[str] = []
    monkeypatch.setattr(kube, "PERIOD", 0.03)
    monkeypatch.setattr(kube, "_POLL", 0.01)
    monkeypatch.setattr(stores, "resolve", nothing)
    made = kube.checkpoint(Slow(()), "web", None, 5, said.append)
    assert 2 <= len(said) <= 4
    assert all(one.startswith("node n1 is checkpointing shop/web container app, after 0.") for one in said)
    with pytest.raises(ConflictError, match="no agent has pushed"):
        kube.await_image(made, "127.0.0.1:1/agent", 0.1, None, say=said.append)
    before = len(said)
    assert said[-1].startswith(f"waiting for the agent of node n1 to push 127.0.0.1:1/agent:{TAG}, after 0.")
    time.sleep(0.1)
    assert len(said) == before


def test_doctor(cluster: Cluster) -> None:
    result = cluster.run("doctor", "--json")
    findings = {one["what"]: one for one in json.loads(result.stdout)}
    assert result.returncode == 1  # there are no agents
    assert not findings["agents"]["ok"] and findings["RuntimeClass cryoci"]["ok"]
    assert findings["node n1: gate ContainerCheckpoint"]["ok"] and findings["node n1: runtime"]["ok"]
    assert findings["permission: create nodes/proxy"]["ok"]
    cluster.api.gates = {"ContainerCheckpoint": False}
    cluster.api.nodes["n1"]["status"]["nodeInfo"]["containerRuntimeVersion"] = "containerd://1.7.2"
    cluster.api.nodes["n1"]["status"]["capacity"] = {"nvidia.com/gpu": "8"}
    rules = role("cryoci-checkpointer", "base/rbac.yaml")
    cluster.api.rules = [{**one, "verbs": [v for v in one["verbs"] if v != "create"]} for one in rules]
    findings = {one["what"]: one for one in json.loads(cluster.run("doctor", "--json").stdout)}
    assert not any(
        findings[name]["ok"]
        for name in (
            "node n1: gate ContainerCheckpoint",
            "node n1: runtime",
            "node n1: labels of its GPUs",
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


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        (("web", None, None), True), ((None, "shop", None), True), ((None, None, "app"), True),
        (("web", "shop", "app"), True), (("we", None, None), False), (("web", "sho", None), False),
        (("web", "shop", "ap"), False), ((None, None, "pp"), False), ((None, None, "shop"), False),
        (("w.b", None, None), False),
    ],
)  # fmt: skip
def test_whose_tag_it_is(words: tuple[str | None, str | None, str | None], fits: bool) -> None:
    assert kubelet_archive.is_of(TAG, *words) is fits
    assert not kubelet_archive.is_of("latest", *words)


def test_versions() -> None:
    assert kube_doctor.version("v1.33.0-gke.1") == (1, 33) and kube_doctor.version("?") == (0, 0)
