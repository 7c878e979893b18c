# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""`kubectl cryoci restore`: the pod that it makes, where that is scheduled, and when it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ImageError, UnsupportedError, UsageError
from cryoci.uses import kube, kube_fit
from tests.unit import kube_schema
from tests.unit.images import no_credentials, registry  # noqa: F401
from tests.unit.kube_api import controller, node, pod
from tests.unit.kube_cluster import Cluster, cluster, images, program  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
H100 = {"cryoci.io/gpu-chip": "NVIDIA-H100-80GB-HBM3", "cryoci.io/gpu-driver": "580.159.04"}
BY_NVIDIA = {
    "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
    "nvidia.com/cuda.driver-version.full": "580.159.04",
}
L4 = {
    "nvidia.com/gpu.product": "NVIDIA-L4",
    "nvidia.com/cuda.driver.major": "550",
    "nvidia.com/cuda.driver.minor": "54",
}


def test_restore_creates_a_pod_that_belongs_to_nobody(cluster: Cluster, images: dict[str, str]) -> None:
    cluster.api.nodes["n2"] = node("n2")
    result = cluster.run("restore", "web", "--image", images["cpu"].partition("@")[0], "--node", "n2")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"created pod shop/web-restored from {images['cpu']}\n"
    (made,) = cluster.api.created
    assert made["metadata"]["annotations"] == {"io.cryoci.restore.app": images["cpu"]}
    assert made["metadata"]["labels"] == {"app": "web"} and "ownerReferences" not in made["metadata"]
    assert "uid" not in made["metadata"] and "resourceVersion" not in made["metadata"]
    spec = made["spec"]
    assert spec["runtimeClassName"] == "cryoci" and "nodeName" not in spec
    assert spec["nodeSelector"] == {"kubernetes.io/hostname": "n2"}
    assert spec["containers"] == [{"name": "app", "image": "registry.example/app:1"}]
    required = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    arch = {"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]}
    assert required == {"nodeSelectorTerms": [{"matchExpressions": [arch]}]}


def test_restore_goes_where_the_chip_and_the_driver_are(cluster: Cluster, images: dict[str, str]) -> None:
    words = ["restore", "web", "--image", images["gpu"]]
    cluster.api.nodes = {
        "cpu": node("cpu"),
        "l4": node("l4", **L4),
        "old": node("old", **{**H100, "cryoci.io/gpu-driver": "570.86.15"}),
        "arm": node("arm", **{**H100, "kubernetes.io/arch": "arm64"}),
        "bare": node("bare", **{**H100, "cryoci.io/runtime": "false"}),
        "down": node("down", **H100),
    }
    cluster.api.nodes["down"]["status"]["conditions"][0]["status"] = "Unknown"
    cluster.api.runtime_class["scheduling"] = {"nodeSelector": {"cryoci.io/runtime": "true"}}
    said = cluster.fails(*words)
    assert "it takes NVIDIA H100 80GB HBM3 with driver 580.159.04 and architecture amd64" in said
    for line in (
        "cpu has no label that says which GPU it has",
        "l4 has NVIDIA-L4 with driver 550.54",
        "old has NVIDIA-H100-80GB-HBM3 with driver 570.86.15",
        "arm is arm64",
        "bare has no label cryoci.io/runtime=true",
        "down is not ready",
    ):
        assert line in said
    assert "--any-node" in said and cluster.api.created == []
    cluster.api.nodes["good"] = node("good", **BY_NVIDIA)
    assert "no label kubernetes.io/hostname=cpu" in cluster.fails(*words, "--node", "cpu")
    assert cluster.run(*words).returncode == 0
    assert (
        cluster.run("restore", "web", "--image", images["gpu"], "--any-node", "--name", "x").returncode == 0
    )
    chosen, anywhere = cluster.api.created
    assert "affinity" not in anywhere["spec"]
    required = chosen["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    terms = [
        {one["key"]: one["values"][0] for one in term["matchExpressions"]}
        for term in required["nodeSelectorTerms"]
    ]
    arch = {"kubernetes.io/arch": "amd64"}
    parts = {"major": "580", "minor": "159", "revision": "04"}
    product = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    newer = {f"nvidia.com/cuda.driver-version.{key}": text for key, text in parts.items()}
    older = {f"nvidia.com/cuda.driver.{key.removesuffix('ision')}": text for key, text in parts.items()}
    assert terms == [arch | H100, arch | BY_NVIDIA, arch | product | newer, arch | product | older]


OWNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ReplicationController": ("v1", {"app": "web", "tier": "front"}),
    "ReplicaSet": ("apps/v1", {"matchLabels": {"app": "web", "tier": "front"}}),
    "DaemonSet": ("apps/v1", {"matchLabels": {"app": "web"}, "matchExpressions": [
        {"key": "tier", "operator": "Exists"}, {"key": "canary", "operator": "DoesNotExist"}]}),
    "StatefulSet": ("apps/v1", {"matchLabels": {"tier": "front"}}),
    "Job": ("batch/v1", {"matchExpressions": [{"key": "tier", "operator": "In", "values": ["front", "back"]}]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", OWNERS)
def test_no_controller_takes_the_new_pod_for_its_own(
    cluster: Cluster, images: dict[str, str], kind: str
) -> None:
    """The label by which it would is left out, rather not one that most Services select by."""
    version, selector = OWNERS[kind]
    api, words = cluster.api, ["restore", "web", "--image", images["cpu"]]
    words += ["--name", "web-7"] if kind == "StatefulSet" else []
    meta = api.pods["web"]["metadata"]
    meta["labels"] |= {"tier": "front"}
    meta["ownerReferences"][0] |= {"apiVersion": version, "kind": kind}
    assert cluster.run(*words).stderr == ""  # it is gone by now
    api.controllers[f"{kind.lower()}s", "web"] = controller(kind, "web", selector)
    told = cluster.run(*words)
    assert f"label tier=front is left out, by which {kind} web would take" in told.stderr, told.stderr
    assert json.loads(cluster.run(*words, "--dry-run").stdout)["metadata"]["labels"] == {"app": "web"}
    assert cluster.run(*words, "--keep-labels").stderr == ""
    kept = {"app": "web", "tier": "front"}
    assert [one["metadata"]["labels"] for one in api.created] == [
        kept, {"app": "web"}, {**kept, "pod-template-hash": "abc"}
    ]  # fmt: skip


def test_labels_that_no_controller_selects_by_stay(cluster: Cluster, images: dict[str, str]) -> None:
    api, words = cluster.api, ["restore", "web", "--image", images["cpu"]]
    api.controllers["replicasets", "web"] = controller(
        "ReplicaSet", "web", {"matchLabels": {"app": "web", "pod-template-hash": "abc"}}
    )
    assert cluster.run(*words).stderr == ""
    owner = api.pods["web"]["metadata"]["ownerReferences"][0]
    owner["kind"] = "StatefulSet"  # takes only pods that are called web-NUMBER
    api.controllers["statefulsets", "web"] = controller(
        "StatefulSet", "web", {"matchLabels": {"app": "web"}}
    )
    assert cluster.run(*words).stderr == ""
    owner |= {"kind": "CloneSet", "apiVersion": "apps.kruise.io/v1"}
    assert "CloneSet web may take the new pod for its own" in cluster.run(*words).stderr
    owner |= {"kind": "Node", "apiVersion": "v1"}
    assert cluster.run(*words).stderr == ""
    assert [one["metadata"]["labels"] for one in api.created] == [{"app": "web"}] * 4


def test_a_pods_own_affinity_still_holds() -> None:
    source = pod("web", "app")
    zones = [[{"key": "zone", "operator": "In", "values": [name]}] for name in "ab"]
    source["spec"]["affinity"] = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": zone} for zone in zones]
            }
        },
        "podAffinity": {},
    }
    wanted = kube_fit.Needs(chip="NVIDIA L4", driver="580.1")
    options = {"name": None, "node": None, "runtime_class": "cryoci"}
    made = kube.restoring(source, None, "registry.example/a:1", wanted=wanted, **options)  # type: ignore[arg-type]
    affinity = made["spec"]["affinity"]
    required = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    terms = [term["matchExpressions"] for term in required["nodeSelectorTerms"]]
    assert len(terms) == 8 and affinity["podAffinity"] == {}
    assert [term[0] for term in terms] == [zones[0][0]] * 4 + [zones[1][0]] * 4
    assert len(source["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"]) == 2  # fmt: skip


def test_names_that_kubernetes_takes() -> None:
    """A pod of another's name, and a container whose name is longer than an annotation has room for."""
    options = {"name": None, "node": None, "runtime_class": "cryoci"}
    long = "c" * 63
    made = kube.restoring(pod("w" * 53 + ".x", long), None, "registry.example/a:1", **options)  # type: ignore[arg-type]
    assert made["metadata"]["name"] == "w" * 53 + "-restored"
    assert made["metadata"]["annotations"] == {"io.cryoci.restore": "registry.example/a:1"}
    assert kube_schema.problems(made) == []
    with pytest.raises(UsageError, match="room for 45 characters") as caught:
        kube.restoring(pod("web", "app", long), long, "registry.example/a:1", **options)  # type: ignore[arg-type]
    assert "--manifest" in (caught.value.hint or "")


def test_of_a_pod_that_was_restored_the_others_start_anew() -> None:
    source = pod("web", "app", "sidecar")
    source["metadata"]["annotations"] = {
        "io.cryoci.restore": "registry.example/old:1",
        "io.cryoci.restore.app": "registry.example/old:2",
        "restore.criu.org/checkpoint-path.app": "/var/lib/kubelet/checkpoints/old.tar",
        "team": "shop",
    }
    options = {"name": None, "node": None, "runtime_class": "cryoci"}
    made = kube.restoring(source, "sidecar", "registry.example/new:1", **options)  # type: ignore[arg-type]
    wanted = {"team": "shop", "io.cryoci.restore.sidecar": "registry.example/new:1"}
    assert made["metadata"]["annotations"] == wanted


def test_amd_goes_by_the_device_id() -> None:
    """Of any driver, and whoever has put the label there."""
    wanted = kube_fit.needs({"io.cryoci.gpu.amd": '["74a1", "74a1"]'})
    assert str(wanted) == "amd-74a1"
    nodes = [
        node("ours", **{"cryoci.io/gpu-chip": "amd-74a1"}),
        node("theirs", **{"amd.com/gpu.device-id": "74a1"}),
        node("other", **{"amd.com/gpu.device-id": "740f"}),
        node("nvidia", **H100),
    ]
    assert kube_fit.check(nodes, {}, wanted) == ["ours", "theirs"]
    with pytest.raises(
        UnsupportedError, match=r"amd-74a1\. nvidia has NVIDIA-H100.*; other has amd-740f"
    ) as caught:
        kube_fit.check(nodes[2:], {}, wanted)
    assert "--any-node" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("names", "driver", "said"),
    [('["A", "B"]', "580.1", "several kinds of GPU: A, B"), ("7", "580.1", "is no list"), ("[", "1", "is no list"),
     ('["A"]', "", "no driver")],
)  # fmt: skip
def test_annotations_that_name_no_node(names: str, driver: str, said: str) -> None:
    """They come from a registry: whatever stands there is an error that says so."""
    with pytest.raises((ImageError, UnsupportedError), match=said):
        kube_fit.needs({"io.cryoci.gpu.names": names, "io.cryoci.gpu.driver": driver})


def test_restore_of_a_pod_that_is_gone(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "pod.json").write_text(json.dumps(pod("gone", "app")))
    words = [
        "restore",
        "gone",
        "--image",
        "registry.example/a:1",
        "--name",
        "again",
        "--dry-run",
        "--any-node",
    ]
    shown = json.loads(cluster.run(*words, "--manifest", str(tmp_path / "pod.json")).stdout)
    assert shown["metadata"]["name"] == "again" and cluster.api.created == []
    with pytest.raises(UsageError, match="registry"):
        kube.restoring(pod("web", "app"), None, "local:1", name=None, node=None, runtime_class="cryoci")


def test_restore_without_the_runtime_class(cluster: Cluster, images: dict[str, str]) -> None:
    cluster.api.runtime_class.clear()
    assert "no RuntimeClass cryoci" in cluster.fails("restore", "web", "--image", images["cpu"])
    assert "no such thing" not in cluster.fails(
        "restore", "web", "--image", f"{images['cpu'][:-64]}{'0' * 64}"
    )
