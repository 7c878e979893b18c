# SPDX-License-Identifier: Apache-2.0
"""Install into the real podman and containerd of a node; their own parsers judge."""

from __future__ import annotations

import json

import pytest

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
