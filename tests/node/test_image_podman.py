# SPDX-License-Identifier: Apache-2.0
"""cryoci's images in the hands of others: podman, skopeo, checkpointctl, buildah."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

PODMAN = "podman --runtime runc"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(tag="image") as made:
        yield made


@pytest.fixture(scope="module")
def place(cluster: Cluster) -> str:
    """A repository in a registry that holds image :1, made by cryoci of podman's own archive."""
    a = cluster.start("a")
    registry = cluster.registry(a)
    workload.load(a)
    a.sh(f"{PODMAN} run -d --name c -p 8765:8765 {workload.IMAGE}")
    time.sleep(1)
    a.sh(f"{PODMAN} container checkpoint c --export /tmp/c.tar.zst", timeout=120)
    a.sh(f"cryoci push --plain-http /tmp/c.tar.zst {registry}/team/c:1", timeout=120)
    return f"{registry}/team/c"


@pytest.fixture(scope="module")
def other(cluster: Cluster, place: str) -> NamespaceNode:
    """A node that never saw the container."""
    return cluster.start("b")


def test_podman_pulls_and_restores(other: NamespaceNode, place: str) -> None:
    workload.load(other)
    other.sh(f"podman pull -q --tls-verify=false {place}:1", timeout=120)
    shown = json.loads(other.sh(f"podman image inspect {place}:1"))[0]
    assert shown["Annotations"]["io.podman.annotations.checkpoint.runtime.name"] == "runc"
    assert shown["Annotations"]["org.criu.checkpoint.container.name"] == "c"
    other.sh(f"{PODMAN} container restore {place}:1", timeout=120)
    assert json.loads(other.sh("podman inspect c"))[0]["State"]["Running"]
    before = other.sh("podman logs c")
    time.sleep(1.5)
    assert len(other.sh("podman logs c")) > len(before)
    other.sh(f"{PODMAN} rm -f -t0 c")


def test_skopeo_copies_and_keeps_the_digest(other: NamespaceNode, place: str) -> None:
    digest = json.loads(other.sh(f"cryoci inspect --plain-http --json {place}:1"))["digest"]
    other.sh(
        f"skopeo copy -q --all --preserve-digests --src-tls-verify=false docker://{place}:1 oci:/var/tmp/l:1"
    )
    assert json.loads(other.sh("cryoci inspect --json oci:/var/tmp/l:1"))["digest"] == digest
    other.sh("cryoci pull oci:/var/tmp/l:1 /var/tmp/out")
    assert other.sh("ls /var/tmp/out/checkpoint/inventory.img")


def test_checkpointctl_shows_what_we_pull(other: NamespaceNode, place: str) -> None:
    other.sh(f"cryoci pull --plain-http {place}:1 /var/tmp/ck && tar -C /var/tmp/ck -cf /var/tmp/ck.tar .")
    shown = other.sh("checkpointctl show /var/tmp/ck.tar")
    assert "Podman" in shown and "runc" in shown


def test_image_that_buildah_made(other: NamespaceNode, place: str) -> None:
    other.sh(
        f"""cryoci pull --plain-http {place}:1 /var/tmp/raw && tar -C /var/tmp/raw -cf /var/tmp/raw.tar .
        c=$(buildah from scratch); buildah add -q $c /var/tmp/raw.tar /
        buildah config --annotation=org.criu.checkpoint.container.name=c $c
        buildah commit -q $c made; buildah push -q made oci:/var/tmp/made:1""",
        timeout=120,
    )
    other.sh("cryoci pull oci:/var/tmp/made:1 /var/tmp/back && diff -r /var/tmp/raw /var/tmp/back")


def test_buildah_backend_makes_the_same_content(other: NamespaceNode, place: str) -> None:
    other.sh(f"cryoci pull -q --plain-http {place}:1 /var/tmp/same")
    before = other.sh("buildah images -qa; buildah containers -qa")
    for target in (f"{place}:buildah", "oci:/var/tmp/by-buildah:c"):
        report = json.loads(
            other.sh(
                f"cryoci push --json --plain-http --backend buildah /var/tmp/same {target}", timeout=120
            )
        )
        shown = json.loads(other.sh(f"cryoci inspect --plain-http --json {target}"))
        assert shown["digest"] == report["digest"] and shown["container"]["name"] == "c"
        assert shown["annotations"]["io.podman.annotations.checkpoint.runtime.name"] == "runc"
        out = f"/var/tmp/out-{report['digest'][7:19]}"
        other.sh(f"cryoci pull -q --plain-http {target} {out} && diff -r /var/tmp/same {out}")
        other.sh(f"rm -r {out}")
    assert other.sh("buildah images -qa; buildah containers -qa") == before
    failed = other.run(
        ["cryoci", "push", "--backend", "buildah", "/var/tmp/same", "127.0.0.1:9/none/c:1"], check=False, timeout=120
    )  # fmt: skip
    said = failed.stderr.decode()
    assert failed.returncode == 1 and "  command: buildah push" in said and "refused" in said
    assert other.sh("buildah images -qa; buildah containers -qa") == before
