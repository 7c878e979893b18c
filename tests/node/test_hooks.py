# SPDX-License-Identifier: Apache-2.0
"""The OCI hook under real podman, runc and crun: noted at create, harmless at restore, gone at the end."""

from __future__ import annotations

import json

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, Subject
from tests.nodes import workload
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node
PROGRAM = "/usr/local/bin/cryoci-hook"


@pytest.fixture(scope="module")
def node(site: Site) -> NamespaceNode:
    """Node a with the hook installed as docs/hooks.md says."""
    installed = site.a.sh("echo /opt/cryoci/lib/python3*/site-packages/cryoci/hooks").strip()
    site.a.sh(f"ln -s {installed}/hook.py {PROGRAM}; mkdir -p /usr/share/containers/oci/hooks.d")
    site.a.sh(f"cp {installed}/hooks.d/*.json /usr/share/containers/oci/hooks.d/")
    return site.a


def notes(node: NamespaceNode) -> list[str]:
    return node.sh("ls /run/cryoci/hooked 2>/dev/null || true").split()


def test_podman(site: Site, node: NamespaceNode) -> None:
    subject = site.subject(KINDS["podman+runc"])
    subject.start(options=("--device=/dev/null:/dev/nvidia7",))
    assert notes(node) == [f"{subject.id}.json"]
    note = json.loads(node.read(f"/run/cryoci/hooked/{subject.id}.json"))
    assert note["gpus"] == ["/dev/nvidia7"] and note["stage"] == "createRuntime"
    subject.checkpoint(f"{site.registry}/hooked:1", "--leave-running")
    seen = json.loads(node.run(["cryoci", "inspect", "--json", f"{site.registry}/hooked:1"]).stdout)
    assert seen["annotations"]["io.cryoci.gpu.devices"] == "/dev/nvidia7"
    subject.remove()
    assert notes(node) == []


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_bare_and_restored(site: Site, node: NamespaceNode, runtime: str) -> None:
    subject = Subject(node, KINDS[runtime], f"hooked-{runtime}")
    config = workload.bundle(node, subject.bundle, args=("--memory-mib=4",), network=False)
    config["hooks"] = {
        stage: [{"path": PROGRAM, "args": ["cryoci-hook", stage], "timeout": 5}]
        for stage in ("createRuntime", "prestart", "poststop")
    }
    node.write(f"{subject.bundle}/config.json", json.dumps(config))
    workload.detach(
        node, [runtime, "run", "--detach", "--bundle", subject.bundle, subject.name], subject.log
    )
    before = subject.wait(2)
    name = f"{subject.name}.json"
    assert notes(node) == [name]

    images = f"/srv/{subject.name}-images"
    node.run([runtime, "checkpoint", f"--image-path={images}", f"--work-path={images}", subject.name])
    node.run([runtime, "delete", "--force", subject.name], check=False)
    assert notes(node) == []
    argv = [
        runtime,
        "restore",
        "--detach",
        "--bundle",
        subject.bundle,
        f"--image-path={images}",
        subject.name,
    ]
    workload.detach(node, argv, subject.log)
    assert subject.wait(before["count"] + 1)["boot"] == before["boot"]
    assert notes(node) == ([name] if runtime == "runc" else [])  # crun runs no hooks on restore
    node.run([runtime, "delete", "--force", subject.name])
    assert notes(node) == []


@pytest.mark.parametrize("runtime", ["runc", "crun", "cryoci-runtime"])
def test_precreate(site: Site, node: NamespaceNode, runtime: str) -> None:
    """podman's own stage: the device comes with any runtime, is kept by podman's restore, or missed with a reason."""
    installed = node.sh("echo /opt/cryoci/lib/python3*/site-packages/cryoci/hooks").strip()
    node.sh(f"mkdir -p /etc/cryoci/hooks.d /etc/cdi; cp {installed}/podman.d/*.json /etc/cryoci/hooks.d/")
    fake = {"path": "/dev/fakegpu0", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666}
    one = {"name": "0", "containerEdits": {"deviceNodes": [fake], "env": ["FAKE=1"]}}
    node.write(
        "/etc/cdi/x.json",
        json.dumps({"cdiVersion": "0.6.0", "kind": "vendor.example/gpu", "devices": [one]}),
    )
    hooks = ["--hooks-dir=/usr/share/containers/oci/hooks.d", "--hooks-dir=/etc/cryoci/hooks.d"]
    podman = ["podman", f"--runtime={runtime}", *hooks]
    run = [*podman, "run", "--rm", "--quiet"]
    show = [
        site.image,
        "sh",
        "-c",
        "stat -c %t:%T /dev/fakegpu0; head -c 1 /dev/fakegpu0 | wc -c; echo $FAKE",
    ]
    for key in ("io.cryoci.gpus", "cdi.k8s.io/x"):
        said = node.run([*run, f"--annotation={key}=vendor.example/gpu=0", *show]).stdout.decode()
        assert said.split() == ["1:5", "1", "1"]
    none = node.run([*run, f"--annotation={key}=vendor.example/gpu=9", *show], check=False)
    assert none.returncode == 126 and b"/run/cryoci/hook.log" in none.stderr
    assert "no CDI device vendor.example/gpu=9" in node.read("/run/cryoci/hook.log").decode()
    assert (
        node.run([*run, site.image, "ls", "/dev/fakegpu0"], check=False).returncode == 2
    )  # it asked for none

    name = f"precreate-{runtime}"
    asks = ["--annotation=io.cryoci.gpus=vendor.example/gpu=0", f"--name={name}"]
    node.run([*podman, "run", "--detach", "--quiet", *asks, site.image, "sleep", "1000"])
    node.run([*podman, "container", "checkpoint", name])
    node.run([*podman, "container", "restore", name])
    seen = node.run(["podman", "exec", name, "sh", "-c", "stat -c %t:%T /dev/fakegpu0"]).stdout
    assert seen == b"1:5\n"
    node.run([*podman, "rm", "--force", "--time=0", name])
    assert notes(node) == []


def test_a_hook_that_cannot_write_fails_no_container(site: Site, node: NamespaceNode) -> None:
    node.sh("mkdir -p /run/cryoci; rm -rf /run/cryoci/hooked; touch /run/cryoci/hooked")
    try:
        subject = site.subject(KINDS["podman+crun"])
        subject.start()
        subject.remove()
    finally:
        node.sh("rm /run/cryoci/hooked")
