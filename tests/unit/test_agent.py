# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""The node agent: archives of every engine become signed images; nothing leaves the node before it is safe."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cryoci.errors import NotFoundError, PrivilegeError, ToolError, TrustError, UsageError
from cryoci.ociimage import image, reference, stores
from cryoci.ociimage.seal import age
from cryoci.ociimage.seal.keyring import Identities, Recipients
from cryoci.ociimage.trust import keys
from cryoci.ociimage.trust.verify import verify
from cryoci.uses import node_labels
from cryoci.uses.agent import Agent, Options
from tests.unit import kube_api, kubelet_archives
from tests.unit.images import (  # noqa: F401
    Proxy,
    Request,
    no_credentials,
    no_sleep,
    program,
    proxy,
    registry,
)
from tests.unit.test_devices_nvidia import driver

pytestmark = pytest.mark.usefixtures("no_credentials")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair as a Secret holds it: cosign.key and cosign.pub."""
    prefix = tmp_path_factory.mktemp("secret") / "cosign"
    keys.generate(prefix, b"pw")
    return prefix


@pytest.fixture(scope="module")
def key(pair: Path) -> keys.SigningKey:
    return keys.load_private(pair.with_suffix(".key"), lambda: b"pw")


class Node:
    """A kubelet's directory, and an agent over it that waits for nothing."""

    def __init__(self, directory: Path, to: str, *, key: keys.SigningKey | None, keep: int | None) -> None:
        directory.mkdir(exist_ok=True)
        self.directory, self.to, self.said = directory, to, list[str]()
        self.options = Options(directory, to, keep, settle=0, key=key, node="n1")
        self.agent = Agent(self.options, self.said.append)

    def archive(self, engine: str, gpu_dump: bytes | None = None) -> str:
        """A new archive of `engine`, in the directory at once; its name."""
        name = f"checkpoint-web_shop-{engine}-2026-01-02T03:04:01Z.tar"
        more = {"checkpoint/gpu.dump": gpu_dump} if gpu_dump is not None else {}
        kubelet_archives.ENGINES[engine](self.directory / name, **more)
        return name

    def shown(self, engine: str) -> image.ImageInfo:
        ref = reference.parse(f"{self.to}:web_shop-{engine}-2026-01-02T03-04-01Z")
        assert isinstance(ref, reference.RegistryRef)
        return image.inspect(ref)


@pytest.mark.parametrize("engine", list(kubelet_archives.ENGINES))
def test_every_engines_archive_becomes_a_signed_image(
    tmp_path: Path, registry: str, pair: Path, key: keys.SigningKey, engine: str
) -> None:
    node = Node(tmp_path / "checkpoints", f"{registry}/all", key=key, keep=0)
    name = node.archive(engine)
    node.agent.look()
    assert len(node.said) == 3 and node.said[2] == f"removed {name}, which the registry has", node.said
    shown = node.shown(engine)
    assert shown.engine == engine and shown.facts["pod.namespace"] == "shop"
    assert shown.base_digest == kubelet_archives.DIGEST and shown.criu_version == "4.2"
    if engine == "cri-o":
        assert (shown.container_name, shown.facts["pod.name"]) == ("app", "web")
    store = stores.open_store(reference.RegistryRef(registry, "all"), None)
    found = verify(store, shown.digest, [keys.load_public(pair.with_suffix(".pub"))])
    assert found.signatures and found.others == 0
    (claim,) = found.provenance
    assert claim.predicate["runDetails"]["builder"]["id"] == "urn:cryoci:node:n1"
    assert claim.predicate["buildDefinition"]["internalParameters"]["engine.name"] == engine
    cosign = [program("cosign"), "verify", "--key", str(pair.with_suffix(".pub"))]
    words = ["--insecure-ignore-tlog=true", "--allow-http-registry", f"{registry}/all@{shown.digest}"]
    subprocess.run([*cosign, *words], check=True, capture_output=True)


def test_images_for_some_eyes_only(tmp_path: Path, registry: str) -> None:
    node = Node(tmp_path / "checkpoints", f"{registry}/sealed", key=None, keep=0)
    to = Recipients.parse([age.generate(tmp_path / "id")])
    node.agent = Agent(replace(node.options, encrypt_to=to), node.said.append)
    node.archive("cri-o")
    node.agent.look()
    shown = node.shown("cri-o")
    assert all(layer.media_type.endswith("+encrypted") for layer in shown.layers)
    ref = reference.RegistryRef(registry, "sealed", digest=shown.digest)
    with pytest.raises(TrustError, match="no key was given"):
        image.pull(ref, tmp_path / "out")
    image.pull(ref, tmp_path / "out", identities=Identities.load([tmp_path / "id"]))
    assert (tmp_path / "out/checkpoint/inventory.img").exists()


def test_gpus_stand_in_annotations(tmp_path: Path, registry: str) -> None:
    """An engine that knows nothing of GPUs has archived gpu.dump, and restores are scheduled by the image."""
    node = Node(tmp_path / "checkpoints", f"{registry}/gpus", key=None, keep=None)
    dump = kubelet_archives.gpu_dump("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")
    node.archive("cri-o", gpu_dump=dump)
    broken = node.archive("containerd", gpu_dump=b'{"version": 1, "gpus": 7}')
    node.agent.look()
    noted = node.shown("cri-o").annotations
    assert noted["io.cryoci.gpu.driver"] == "580.159.04" and noted["io.cryoci.gpu.memory"] == str(2 << 20)
    assert json.loads(noted["io.cryoci.gpu.names"]) == ["NVIDIA H100 80GB HBM3"] * 2
    assert "gpu.dump of the checkpoint is not valid" in node.agent.state.archives[broken].problem


def test_what_is_not_signed_is_not_done(
    tmp_path: Path, proxy: Proxy, no_sleep: list[float], key: keys.SigningKey
) -> None:
    """A signature that fails is tried again, without a second push, and its archive stays on the node."""
    node = Node(tmp_path / "checkpoints", f"{proxy.host}/slow", key=key, keep=0)
    name = node.archive("cri-o")
    proxy.before = lambda request: (
        request.method == "PUT" and request.path.endswith(".sig") and request.answer(403)
    )
    node.agent.look()
    known = node.agent.state.archives[name]
    assert known.digest and not known.signed and known.attempts == 1
    assert "could not be signed, attempt 1" in node.said[-1] and (node.directory / name).exists()
    assert node.agent.metrics()[1].samples == [({}, 1)]
    proxy.before, proxy.log = lambda request: False, []
    node.agent.look()
    assert not known.signed  # it waits
    known.retry = 0
    node.agent.look()
    assert known.signed == key.public.id and known.problem == "" and not (node.directory / name).exists()
    assert not any(path.endswith("03-04-01Z") for method, path in proxy.log if method == "PUT")


def test_another_key_signs_again(tmp_path: Path, registry: str, key: keys.SigningKey) -> None:
    to, directory = f"{registry}/again", tmp_path / "checkpoints"
    node = Node(directory, to, key=None, keep=None)
    name = node.archive("podman")
    node.agent.look()
    assert node.agent.state.archives[name].digest and len(node.said) == 1
    later = Node(directory, to, key=key, keep=None)  # the same node, with a key now
    later.agent.look()
    assert [line.split()[0] for line in later.said] == ["signed"]


def test_no_repository(tmp_path: Path, registry: str) -> None:
    for to in ("name", f"{registry}/a:1"):
        with pytest.raises(UsageError, match="no repository"):
            Node(tmp_path, to, key=None, keep=None)


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[kube_api.Api, Path]]:
    """A service account as it is mounted into a pod, and its API server."""
    with kube_api.serving(tmp_path) as (api, config):
        server = json.loads(config.read_text())["clusters"][0]["cluster"]["server"]
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", server.rpartition(":")[2])
        where = tmp_path / "account"
        where.mkdir()
        (where / "token").write_text(f"{kube_api.TOKEN}\n")
        (where / "ca.crt").symlink_to(tmp_path / "ca.pem")
        yield api, where


def test_the_node_is_labelled(account: tuple[kube_api.Api, Path], tmp_path: Path) -> None:
    api, where = account
    driver(tmp_path / "root")
    said: list[str] = []
    labeller = node_labels.Labeller("n1", said.append, where, str(tmp_path / "root"))
    labeller.refresh()
    labeller.refresh()  # not yet
    labels = api.nodes["n1"]["metadata"]["labels"]
    assert labels[node_labels.CHIP] == "NVIDIA-H200" and labels[node_labels.DRIVER] == "580.159.04"
    assert said == ["labelled node n1: cryoci.io/gpu-chip=NVIDIA-H200, cryoci.io/gpu-driver=580.159.04"]
    node_labels.put("n1", {node_labels.CHIP: None, node_labels.DRIVER: None}, where)
    assert node_labels.CHIP not in api.nodes["n1"]["metadata"]["labels"]
    api.rules = []
    with pytest.raises(PrivilegeError, match=r"forbids the agent to label node n1 \(403\)"):
        node_labels.put("n1", {}, where)
    api.rules = None
    with pytest.raises(ToolError, match="404"):
        node_labels.put("gone", {}, where)
    with pytest.raises(NotFoundError, match="no service account"):
        node_labels.put("n1", {}, tmp_path / "none")
    node_labels.Labeller("n1", said.append, tmp_path / "none").refresh()
    assert "component gpu" in said[-1]
    (where / "ca.crt").unlink()
    (where / "ca.crt").write_text("no certificate")
    with pytest.raises(ToolError, match="cannot be asked"):
        node_labels.put("n1", {}, where)


def test_amd_and_what_there_is_most_of(tmp_path: Path) -> None:
    """By the PCI driver's devices, which a pod sees whatever it may use."""
    assert node_labels.found(str(tmp_path)) == {node_labels.CHIP: None, node_labels.DRIVER: None}
    for number in range(3):
        device = tmp_path / f"sys/bus/pci/drivers/amdgpu/0000:{number:02x}:00.0"
        device.mkdir(parents=True)
        (device / "device").write_text("0x74a1\n")
    (tmp_path / "sys/bus/pci/drivers/amdgpu/new_id").touch()
    assert node_labels.found(str(tmp_path)) == {node_labels.CHIP: "amd-74a1", node_labels.DRIVER: None}
    driver(tmp_path)  # and two of NVIDIA's
    assert node_labels.found(str(tmp_path))[node_labels.CHIP] == "amd-74a1"


def test_labels_are_written_as_kubernetes_takes_them() -> None:
    assert node_labels.value("NVIDIA H100 80GB HBM3") == "NVIDIA-H100-80GB-HBM3"
    assert node_labels.value(" (Tesla) T4/" + "x" * 90).startswith("Tesla-T4-x")
    assert len(node_labels.value("x" * 90)) == 63
