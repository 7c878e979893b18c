# SPDX-License-Identifier: Apache-2.0
"""Install into the real podman and containerd of a node; their own parsers judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.nodes import tree
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node
SUMS = "find /etc -type f -exec sha256sum {} + | sort; find /etc -type d | sort"


def test_install_and_uninstall(node: NamespaceNode) -> None:
    before = node.sh(SUMS)
    dry = node.run(["cryoci", "install", "--dry-run", "--runtime=crun"]).stdout.decode()
    assert "+cryoci-runtime = [" in dry and '+  BinaryName = "/usr/local/bin/' in dry
    assert "would change" in dry and node.sh(SUMS) == before

    said = node.run(["cryoci", "install", "--runtime=crun"]).stdout.decode()
    assert "systemctl restart containerd" in said
    dump = node.run(["containerd", "config", "dump"]).stdout.decode()
    assert (
        '.containerd.runtimes.cryoci.options]\n            BinaryName = "/usr/local/bin/cryoci-runtime"'
        in dump
    )
    assert 'bin_dir = "/usr/lib/cni"' in dump  # Debian's own lines are still in force
    info = node.run(["podman", "--runtime=cryoci-runtime", "info", "--format=json"]).stdout
    assert json.loads(info)["host"]["ociRuntime"]["path"] == "/usr/local/bin/cryoci-runtime"
    below = node.run(["cryoci-runtime", "--version"]).stdout.decode()
    assert below.startswith("crun version")
    rows = json.loads(node.run(["cryoci", "status", "--json"]).stdout)["engines"]
    assert {row["engine"]: row["state"] for row in rows} == {
        "containerd": "installed",
        "podman": "installed",
    }
    assert "nothing to change" in node.run(["cryoci", "install", "--runtime=crun"]).stdout.decode()

    node.run(["cryoci", "uninstall"])
    assert node.sh(SUMS) == before
    assert "nothing to undo" in node.run(["cryoci", "uninstall"]).stdout.decode()


@pytest.mark.parametrize("version", ["1.7", "2"])
@pytest.mark.parametrize("given", ["debian", "nothing"])
def test_containerds_cri_loads_with_what_is_written(node: NamespaceNode, version: str, given: str) -> None:
    """containerd 1 drops its default handler when a file names another; `config dump` does not say so."""
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    env = {"PATH": path if version == "1.7" else f"{tree.NEW_CONTAINERD}/usr/bin:{path}"}
    if given == "nothing":
        node.run(["rm", "/etc/containerd/config.toml"])
    said = node.run(["cryoci", "install", "--engine=containerd"], env=env).stdout.decode()
    assert f"containerd {version}" in said
    node.run(["/bin/sh", "-c", "setsid containerd >/var/log/containerd.log 2>&1 </dev/null &"], env=env)
    node.sh("for i in $(seq 100); do ctr version >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1")
    plugins = node.run(["ctr", "plugins", "ls"], env=env).stdout.decode()
    states = [line.split()[-1] for line in plugins.splitlines() if ".grpc.v1 " in line and " cri " in line]
    assert states == ["ok"], node.read("/var/log/containerd.log").decode()
    rows = json.loads(node.run(["cryoci", "status", "--json"], env=env).stdout)["engines"]
    assert {row["engine"]: row["state"] for row in rows}["containerd"] == "installed"


def test_a_broken_containerd_configuration_is_not_touched(node: NamespaceNode) -> None:
    node.write("/etc/containerd/config.toml", "version = 2\nroot = [\n")
    before = node.sh(SUMS)
    result = node.run(["cryoci", "install", "--engine=containerd"], check=False)
    assert result.returncode == 1 and b"not valid TOML" in result.stderr and b"hint: " in result.stderr
    node.write(
        "/etc/containerd/config.toml", 'version = 2\noom_score = "high"\n'
    )  # TOML, but not containerd's
    before = node.sh(SUMS)
    result = node.run(["cryoci", "install", "--engine=containerd"], check=False)
    assert result.returncode == 1 and b"does not accept" in result.stderr, result.stderr
    assert node.sh(SUMS) == before


def test_templates_are_taken_by_the_engines(node: NamespaceNode) -> None:
    templates = Path(__file__).parents[2] / "crio-config"
    main = node.read("/etc/containerd/config.toml").decode()
    block = (templates / "containerd/config-v2.toml").read_text().replace("version = 2\n", "")
    node.write("/etc/containerd/config.toml", main + block)
    dump = node.run(["containerd", "config", "dump"]).stdout.decode()
    assert "runtimes.cryoci.options]" in dump and 'pod_annotations = ["io.cryoci.*"' in dump
    node.run(["rm", "/etc/containers/containers.conf.d/50-cryoci.conf"])
    node.write(
        "/etc/containers/containers.conf.d/99-cryoci.conf", (templates / "podman/99-cryoci.conf").read_text()
    )
    assert node.run(["podman", "--runtime=cryoci-runtime", "info"]).returncode == 0
    for name in ("runc", "crun"):
        options = (templates / f"criu/{name}.conf").read_text()
        node.write("/tmp/criu.conf", options)
        assert b"Looks good" in node.run(["criu", "--config", "/tmp/criu.conf", "check"]).stdout
    # podman decodes manifests as Kubernetes does, and then goes as far as it can without a cluster
    for manifest, goes in (("runtimeclass", b"RuntimeClass"), ("install", b"pod cryoci-install-pod")):
        node.write("/tmp/m.yaml", (templates / f"kubernetes/base/{manifest}.yaml").read_text())
        said = node.run(["podman", "--log-level=debug", "kube", "play", "/tmp/m.yaml"], check=False).stderr
        assert goes in said, said
