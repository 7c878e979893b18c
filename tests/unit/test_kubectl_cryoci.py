# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""`kubectl cryoci`, called by a real kubectl as its plugin, against an API server that speaks TLS and knows RBAC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cryoci.errors import NotFoundError, UsageError
from cryoci.ociimage import image, reference
from cryoci.ociimage.trust import keys
from cryoci.ociimage.trust.sign import sign
from cryoci.uses import kube, kube_doctor, kube_fit, kubelet_archive
from tests.nodes import kubectl
from tests.unit.images import make_checkpoint, no_credentials, registry  # noqa: F401
from tests.unit.kube_api import TOKEN, Api, Asked, failure, node, pod, serving

pytestmark = pytest.mark.usefixtures("no_credentials")
REPO = Path(__file__).resolve().parents[2]
MANIFESTS = REPO / "crio-config/kubernetes"
ARCHIVE = "/var/lib/kubelet/checkpoints/checkpoint-web_shop-app-2026-01-02T03:04:05Z.tar"
TAG = "web_shop-app-2026-01-02T03-04-05Z"
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


@pytest.fixture(scope="module")
def program() -> str:
    try:
        return kubectl.program()
    except NotFoundError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def images(registry: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoint images in a registry: of a CPU, and of two H100s; as HOST/REPO:TAG@DIGEST."""
    directory = make_checkpoint(tmp_path_factory.mktemp("image") / "ck", pages=1 << 20)
    chips = json.dumps(["NVIDIA H100 80GB HBM3"] * 2)
    facts = {"cpu": {}, "gpu": {"gpu.names": chips, "gpu.driver": "580.159.04"}}
    found = {}
    for name, noted in facts.items():
        ref = reference.parse(f"{registry}/checkpoints:{name}")
        assert isinstance(ref, reference.RegistryRef)
        noted = {"host.arch": "x86_64", **noted}
        found[name] = f"{ref}@{image.push(directory, ref, annotations=noted).digest}"
    return found


class Cluster:
    """A kubectl with the plugin on its PATH, and the server that it talks to."""

    def __init__(self, program: str, api: Api, config: Path, directory: Path) -> None:
        self.program, self.api, self.config = program, api, config
        plugins = directory / "plugins"
        plugins.mkdir()
        plugin = plugins / "kubectl-cryoci"
        plugin.write_text(f'#!/bin/sh\nexec {sys.executable} -m cryoci.cli.kubectl_cryoci "$@"\n')
        plugin.chmod(0o755)
        (plugins / "kubectl").symlink_to(program)
        self.env = {
            **os.environ,
            "KUBECONFIG": str(config),
            "PATH": f"{plugins}:{os.environ.get('PATH', os.defpath)}",
            "HOME": str(directory),
            "PYTHONPATH": str(REPO),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.kubectl("cryoci", *words)

    def kubectl(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [self.program, *words]
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=60, check=False)

    def fails(self, *words: str) -> str:
        result = self.run(*words)
        assert result.returncode in (1, 2), result.stdout + result.stderr
        assert "Traceback" not in result.stderr and "hint: " in result.stderr, result.stderr
        return result.stderr


@pytest.fixture
def cluster(program: str, tmp_path: Path) -> Iterator[Cluster]:
    with serving(tmp_path) as (api, config):
        yield Cluster(program, api, config, tmp_path)


def role(name: str, *files: str) -> list[dict[str, Any]]:
    """The rules of a ClusterRole in the manifests."""
    texts = [(MANIFESTS / file).read_text() for file in files]
    found = [one for text in texts for one in yaml.safe_load_all(text) if one["kind"] == "ClusterRole"]
    rules: list[dict[str, Any]] = next(one for one in found if one["metadata"]["name"] == name)["rules"]
    return rules


def granted(rules: list[dict[str, Any]]) -> set[Asked]:
    return {
        Asked(verb, group, resource)
        for rule in rules
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


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


def test_push_waits_for_the_agent(
    cluster: Cluster, images: dict[str, str], registry: str, tmp_path: Path
) -> None:
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


def test_the_role_is_enough_and_nothing_is_too_much(cluster: Cluster, images: dict[str, str]) -> None:
    """Everything that the plugin does needs exactly what cryoci-checkpointer grants."""
    rules = role("cryoci-checkpointer", "base/rbac.yaml")
    cluster.api.rules, cluster.api.agents = rules, True
    assert cluster.run("doctor").returncode == 0
    assert cluster.run("checkpoint", "web").returncode == 0
    assert cluster.run("restore", "web", "--image", images["cpu"]).returncode == 0
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


def test_versions() -> None:
    assert kube_doctor.version("v1.33.0-gke.1") == (1, 33) and kube_doctor.version("?") == (0, 0)


OVERLAYS = {
    path.parent.name: path.parent for path in sorted(MANIFESTS.glob("overlays/*/kustomization.yaml"))
}


def built(program: str, directory: Path) -> list[dict[str, Any]]:
    made = subprocess.run([program, "kustomize", str(directory)], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(made.stdout))


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays(cluster: Cluster, program: str, name: str) -> None:
    """kubectl builds each, and every object is one that a server knows."""
    objects = {(one["kind"], one["metadata"]["name"]): one for one in built(program, OVERLAYS[name])}
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


def test_signing_component(program: str, tmp_path: Path) -> None:
    """What it adds is what the agent's command line takes, and the Secret's names are cosign's."""
    (tmp_path / "k").mkdir()
    (tmp_path / "kubernetes").symlink_to(MANIFESTS)
    own = {"resources": ["../kubernetes/overlays/cri-o"], "components": ["../kubernetes/components/signing"]}
    (tmp_path / "k/kustomization.yaml").write_text(yaml.safe_dump(own))
    objects = {(one["kind"], one["metadata"]["name"]): one for one in built(program, tmp_path / "k")}
    agent = objects["DaemonSet", "cryoci-agent"]["spec"]["template"]["spec"]
    volume = next(one for one in agent["volumes"] if one["name"] == "signing")
    assert volume["secret"] == {"secretName": "cryoci-signing", "defaultMode": 0o400}
    command = agent["containers"][0]["command"]
    assert command[0] == "cryoci" and {"--sign-key=/signing/cosign.key"} < set(command)
    argv = [sys.executable, "-m", "cryoci.cli.main", *command[1:], "--to", "registry.example/a"]
    said = subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=False).stderr
    assert "no key at /signing/cosign.key" in said
