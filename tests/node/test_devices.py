# SPDX-License-Identifier: Apache-2.0
"""Devices by CDI under real runc and crun: in the container on one node, and restored on one that differs.

The "GPUs" are /dev/zero and /dev/full under NVIDIA's names; the other node has other ordinals, another
driver version in the names of libraries, and other files behind them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.node.subject import KINDS, Subject
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

CONFIG = "/etc/cryoci/config.toml"
LIBRARIES = "/usr/lib/x86_64-linux-gnu"


def gpu(number: int, minor: int) -> dict[str, object]:
    """A harmless device (major 1) as GPU `number`."""
    node = {"path": f"/dev/nvidia{number}", "type": "c", "major": 1, "minor": minor, "fileMode": 0o666}
    return {"name": str(number), "containerEdits": {"deviceNodes": [node]}}


def equip(node: NamespaceNode, version: str, *gpus: dict[str, object]) -> None:
    """Give `node` a "driver" of `version` with `gpus`."""
    node.sh(f"mkdir -p /opt/driver /etc/cdi; echo {version} >/opt/driver/lib; : >/opt/driver/hook.log")
    node.write("/opt/driver/hook", "#!/bin/sh\necho ran >>/opt/driver/hook.log\n")
    node.sh("chmod 755 /opt/driver/hook")
    names = (f"libcuda.so.{version}", "libnvidia-ml.so.1")
    mounts = [
        {"hostPath": "/opt/driver/lib", "containerPath": f"{LIBRARIES}/{name}", "options": ["ro", "bind"]}
        for name in names
    ]
    common = {
        "env": ["GPU_DRIVER=" + version],
        "deviceNodes": [
            {"path": "/dev/nvidiactl", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666},
        ],
        "mounts": mounts,
        "hooks": [{"hookName": "createRuntime", "path": "/opt/driver/hook", "args": ["hook"]}],
    }
    spec = {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": list(gpus), "containerEdits": common}
    node.write("/etc/cdi/gpu.json", json.dumps(spec))


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[NamespaceNode, NamespaceNode]]:
    """Node a with GPUs 0 and 1 under driver 580.1.2, node b with GPU 3 alone under 580.9.9."""
    with Cluster(tag="devices") as cluster:
        a, b = cluster.start("a"), cluster.start("b")
        equip(a, "580.1.2", gpu(0, 5), gpu(1, 5))
        equip(b, "580.9.9", gpu(3, 7))
        yield a, b


def inside(node: NamespaceNode, kind: str, name: str, script: str) -> str:
    """What `script` prints in the container."""
    return node.run([kind, "exec", name, "/bin/sh", "-c", script]).stdout.decode()


DEVICES = "for d in /dev/nvidia*; do echo $d $(stat -c %t:%T $d); done"


@pytest.mark.parametrize("kind", ["runc", "crun"])
def test_the_same_container_on_a_node_whose_gpus_differ(
    nodes: tuple[NamespaceNode, NamespaceNode], kind: str
) -> None:
    a, b = nodes
    name, base = f"gpu-{kind}", f"/srv/gpu-{kind}"
    for node in nodes:
        node.write(CONFIG, f'[runtime]\npath = "{kind}"\n')
        node.sh(": >/opt/driver/hook.log")
    workload.bundle(a, base, annotations={"io.cryoci.gpus": "1"})
    workload.detach(a, ["cryoci-runtime", "run", "-d", "-b", base, name], "/srv/log")
    before = workload.wait(a, 3)
    assert inside(a, kind, name, DEVICES).split("\n")[:2] == ["/dev/nvidia1 1:5", "/dev/nvidiactl 1:3"]
    assert (
        inside(a, kind, name, f"cat {LIBRARIES}/libcuda.so.580.1.2; echo $GPU_DRIVER")
        == "580.1.2\n580.1.2\n"
    )
    assert inside(a, kind, name, "head -c 3 /dev/nvidia1 | od -An -tx1").split() == ["00"] * 3
    assert a.read("/opt/driver/hook.log") == b"ran\n"
    a.run(["cryoci", "checkpoint", name, "-o", f"{base}.cp"])
    b.run(["tar", "-xC", "/srv"], input=a.run(["tar", "-cC", "/srv", f"gpu-{kind}.cp"]).stdout)
    workload.detach(b, ["cryoci", "restore", "-d", "--allow=host-namespaces", f"{base}.cp"], "/srv/log")
    after = workload.wait(b, before["count"] + 2)
    assert after["boot"] == before["boot"]
    assert inside(b, kind, name, DEVICES).split("\n")[:2] == ["/dev/nvidia3 1:7", "/dev/nvidiactl 1:3"]
    assert inside(b, kind, name, f"cat {LIBRARIES}/libcuda.so.580.1.2 {LIBRARIES}/libnvidia-ml.so.1") == (
        "580.9.9\n580.9.9\n"
    )
    assert inside(b, kind, name, "head -c 3 /dev/nvidia3 | od -An -tx1").split() == ["00"] * 3
    assert b.read("/opt/driver/hook.log") == b""
    b.run(["cryoci-runtime", "delete", "--force", name])


@pytest.mark.parametrize("kind", ["runc", "crun"])
def test_an_engine_that_keeps_the_old_nodes_specification(
    nodes: tuple[NamespaceNode, NamespaceNode], kind: str
) -> None:
    """As podman does: devices, mounts and hooks of the old node are in the bundle of the restore."""
    a, b = nodes
    name, base = f"engine-{kind}", f"/srv/engine-{kind}"
    for node in nodes:
        node.write(CONFIG, f'[runtime]\npath = "{kind}"\n[devices]\nenvironment = true\n')
        node.sh(": >/opt/driver/hook.log")
        config = workload.bundle(node, base)
        config["process"]["env"].append("NVIDIA_VISIBLE_DEVICES=0")
        node.write(f"{base}/config.json", json.dumps(config))
    workload.detach(a, ["cryoci-runtime", "run", "-d", "-b", base, name], "/srv/log")
    before = workload.wait(a, 3)
    a.run(["cryoci-runtime", "checkpoint", "--image-path", f"{base}/img", "--work-path", f"{base}/w", name])
    a.run(["cryoci-runtime", "delete", "--force", name])
    b.run(["tar", "-xC", base], input=a.run(["tar", "-cC", base, "img", "rootfs/data"]).stdout)
    b.write(f"{base}/config.json", a.read(f"{base}/config.json"))
    old = b.read(f"{base}/config.json")
    restore = ["cryoci-runtime", "restore", "-d", "-b", base, "--image-path", f"{base}/img", "--work-path"]
    b.sh("mv /etc/cdi /etc/cdi.away")
    refused = b.run([*restore, f"{base}/w1", name], check=False)
    assert refused.returncode == 1 and b"this node has 0" in refused.stderr
    assert b.read(f"{base}/config.json") == old
    assert b.run(["ls", f"/run/cryoci/containers/default/{name}/runtime"], check=False).returncode != 0
    b.sh("mv /etc/cdi.away /etc/cdi")
    workload.detach(b, [*restore, f"{base}/w2", name], "/srv/log")
    after = workload.wait(b, before["count"] + 2)
    assert after["boot"] == before["boot"]
    assert inside(b, kind, name, DEVICES).split("\n")[:2] == ["/dev/nvidia3 1:7", "/dev/nvidiactl 1:3"]
    assert inside(b, kind, name, f"cat {LIBRARIES}/libcuda.so.580.1.2") == "580.9.9\n"
    assert b.read("/opt/driver/hook.log") == b""
    facts = json.loads(b.read(f"/run/cryoci/containers/default/{name}/record.json"))
    assert facts["devices"]["names"] == ["nvidia.com/gpu=3"]
    # and once more, from there: what the second node put in is what its checkpoint tells of
    b.run(["cryoci-runtime", "checkpoint", "--image-path", f"{base}/img2", "--work-path", f"{base}/w", name])
    again = json.loads(b.read(f"{base}/img2/cryoci-runtime.json"))["devices"]
    assert [n["path"] for n in again["nodes"]] == ["/dev/nvidiactl", "/dev/nvidia3"]
    assert f"{LIBRARIES}/libcuda.so.580.1.2" in [m["destination"] for m in again["mounts"]]
    b.run(["cryoci-runtime", "delete", "--force", name])


@pytest.mark.parametrize("below", ["cryoci-runtime", "runc"])
def test_podmans_container_gets_the_other_nodes_gpu(
    nodes: tuple[NamespaceNode, NamespaceNode], below: str
) -> None:
    """With plain runc podman itself puts the devices in, and cryoci exchanges them."""
    a, b = nodes
    for node in nodes:
        node.write(CONFIG, '[runtime]\npath = "runc"\n')
        node.sh(f"podman image exists {workload.IMAGE} || podman load --quiet --input {workload.ARCHIVE}")
    subject = Subject(a, KINDS[f"podman+{below}"], f"pod-{below}", workload.IMAGE)
    wish = (
        ("--annotation=io.cryoci.gpus=1",) if below == "cryoci-runtime" else ("--device=nvidia.com/gpu=1",)
    )
    before = subject.start(options=wish)
    assert subject.inside("/bin/sh", "-c", DEVICES).split("\n")[0] == "/dev/nvidia1 1:5"
    a.run(["cryoci", "checkpoint", subject.name, "-o", f"/srv/{subject.name}.cp"])
    b.run(["tar", "-xC", "/srv"], input=a.run(["tar", "-cC", "/srv", f"{subject.name}.cp"]).stdout)
    b.run(["cryoci", "restore", "-d", f"/srv/{subject.name}.cp"])
    there = subject.on(b)
    assert there.wait(before["count"] + 2)["boot"] == before["boot"]
    assert there.inside("/bin/sh", "-c", DEVICES).split("\n")[:2] == [
        "/dev/nvidia3 1:7", "/dev/nvidiactl 1:3",
    ]  # fmt: skip
    assert there.inside("cat", f"{LIBRARIES}/libcuda.so.580.1.2") == "580.9.9\n"
    for node in nodes:
        node.run(["podman", "rm", "--force", "--time=0", subject.name])
