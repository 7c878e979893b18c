# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from engine to engine and from tool to tool, with the real ones of the node tree.

One container of podman's and one of bare runc, both on the node's network, are the subjects of all tests.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.subject import runs_on
from tests.nodes import tree, workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

PODMAN = "podman --runtime runc"
CLEARED, OPAQUE = (
    f"/usr/lib/python3.13/{name}" for name in ("wsgiref", "dbm")
)  # which the counter does not use
SECRET = "correct-horse-battery"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(tag="shelf") as made:
        yield made


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> NamespaceNode:
    """A node with podman's archive /srv/podman.tar and image, and cryoci's images `web:1` and `box:1`.

    All are of containers that have ended. web has changed its file system, box is bare.
    """
    node = cluster.start("a")
    workload.load(node)
    workload.bundle(node, "/srv/box", args=("--memory-mib=4",))
    node.sh("chmod 555 /srv/box/rootfs")  # as podman makes it, and CRIU compares
    workload.detach(node, ["runc", "run", "-d", "--bundle", "/srv/box", "box"], "/srv/box.log")
    node.write("/srv/box.json", json.dumps(workload.wait(node, 2)))
    node.sh("cryoci checkpoint box -o box:1 && rm -rf /srv/box", timeout=120)
    node.sh(f"{PODMAN} run -d --name web --network host --env TOKEN={SECRET} {workload.IMAGE}")
    before = workload.wait(node, 2)
    node.sh("podman exec web sh -c 'echo new >/etc/new; rm /usr/bin/tac'")
    node.sh(f"{PODMAN} container checkpoint -R web --create-image podman-made", timeout=120)
    node.sh("skopeo copy -q containers-storage:localhost/podman-made oci:/srv/podman-made:1")
    node.sh("cryoci checkpoint -R web -o web:1", timeout=120)
    node.sh(f"{PODMAN} container checkpoint web --compress none --export /srv/podman.tar", timeout=120)
    node.write("/srv/web.json", json.dumps(before))
    return node


@pytest.fixture
def free(node: NamespaceNode) -> Iterator[NamespaceNode]:
    """The node while nothing holds the counter's port; containers of the test go afterwards."""
    node.sh("podman rm -fa -t0")
    yield node
    node.sh("podman rm -fa -t0")


@pytest.fixture(scope="module")
def containerd(node: NamespaceNode) -> NamespaceNode:
    """The node with containerd running, and the counter's image in it."""
    node.sh("podman rm -fa -t0; containerd >/var/log/containerd.log 2>&1 &")
    node.sh("for i in $(seq 100); do ctr version >/dev/null 2>&1 && exit; sleep 0.1; done; exit 1")
    node.sh(f"ctr image import {workload.ARCHIVE}")
    return node


def image_id(node: NamespaceNode) -> str:
    return node.sh(f"podman image inspect --format '{{{{.Id}}}}' {workload.IMAGE}").strip()


def cryoci(node: NamespaceNode, *words: str) -> Any:
    return json.loads(node.run(["cryoci", *words, "--json"], timeout=120).stdout)


def saved(node: NamespaceNode, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.read(f"/srv/{name}.json"))
    return found


def test_cryocis_image_becomes_podmans_archive(free: NamespaceNode) -> None:
    done = cryoci(free, "convert", "web:1", "--to", "podman", "-o", "/srv/web-podman.tar.zst")
    assert done["lost"] == []
    free.sh(f"{PODMAN} container restore -i /srv/web-podman.tar.zst", timeout=120)
    runs_on(saved(free, "web"), workload.wait(free, saved(free, "web")["count"] + 3))
    assert free.sh("podman exec web cat /etc/new") == "new\n"
    assert "tac" not in free.sh("podman exec web ls /usr/bin").split()


def test_bare_becomes_podmans(free: NamespaceNode) -> None:
    base = ("--base-image", workload.IMAGE, "--base-id", image_id(free))
    done = cryoci(free, "convert", "box:1", "--to", "podman", *base, "-o", "/srv/box-podman.tar")
    assert done["lost"] == [] and not any("skip-file-rwx-check" in line for line in done["assumed"])
    free.sh(f"{PODMAN} container restore -i /srv/box-podman.tar", timeout=120)
    runs_on(saved(free, "box"), workload.wait(free, saved(free, "box")["count"] + 3))
    assert free.sh("podman ps --format '{{.Names}}'") == "box\n"


def contents(node: NamespaceNode, execute: str, directory: str) -> list[str]:
    """What the container web has in a directory."""
    return node.sh(f"{execute} web ls -A {directory}").split()


def test_podmans_archive_restores_under_containerd(containerd: NamespaceNode) -> None:
    """And what containerd's `ctr` checkpoints comes back, is inspected, and becomes podman's again."""
    node = containerd
    done = cryoci(node, "convert", "/srv/podman.tar", "--to", "ctr", "-o", "/srv/web-ctr.tar")
    wanted = [line for line in done["assumed"] if ", mounted at " in line]
    assert any("skip-file-rwx-check" in line for line in done["assumed"])
    for line in wanted:  # what the conversion says this node must have
        source = line.partition(" has ")[2].partition(", mounted at ")[0]
        kind = "mkdir -p" if source.endswith("/shm") else "touch"
        node.sh(f"mkdir -p $(dirname {source}) && {kind} {source}")
    node.write("/etc/criu/runc.conf", "skip-file-rwx-check\n")
    node.sh("ctr image import --no-unpack --all-platforms /srv/web-ctr.tar")
    node.sh("ctr container restore --rw --live web cryoci.local/checkpoint/web:latest", timeout=120)
    before = workload.wait(node, saved(node, "web")["count"] + 3)
    runs_on(saved(node, "web"), before)
    # an opaque directory, as overlayfs makes it
    anew = f"rm -rf {CLEARED}; mkdir -m 750 {CLEARED}; echo only >{CLEARED}/only"
    node.run(["ctr", "task", "exec", "--exec-id", "x", "web", "sh", "-c", anew])
    # containerd 1.7 leaves parts out of a checkpoint when it has blobs like them: here that of the spec
    node.sh("ctr image rm --sync cryoci.local/checkpoint/web:latest")
    node.sh("ctr container checkpoint --image --task --rw web localhost/ctr-made:1", timeout=120)
    node.sh("ctr task kill -s KILL web; sleep 0.5; ctr task rm web; ctr container rm web", check=False)
    export = "ctr image export --skip-manifest-json --all-platforms /srv/ctr-made.tar localhost/ctr-made:1"
    node.sh(export, timeout=120)
    found = cryoci(node, "inspect", "/srv/ctr-made.tar")
    assert (
        found["engine"] == "containerd" and found["container"]["name"] == "web" and found["problems"] == []
    )
    assert [p["name"] for p in found["processes"]] == ["python3", "python3"]
    base = ("--base-image", workload.IMAGE, "--base-id", image_id(node))
    done = cryoci(node, "convert", "/srv/ctr-made.tar", "--to", "podman", *base, "-o", "/srv/ctr-podman.tar")
    gone = json.loads(node.sh("tar -xOf /srv/ctr-podman.tar deleted.files"))
    assert "/usr/bin/tac" in gone
    names = node.sh("tar -xOf /srv/ctr-podman.tar rootfs-diff.tar | tar -t").split()
    assert any(name.strip("/") == "etc/new" for name in names) and not any(".wh." in name for name in names)
    assert any("skip-file-rwx-check" in line for line in done["assumed"])
    node.sh(f"{PODMAN} container restore -i /srv/ctr-podman.tar", timeout=120)
    assert contents(node, "podman exec", CLEARED) == ["only"]
    node.sh("podman rm -fa -t0; rm /etc/criu/runc.conf")


def test_an_opaque_whiteout_as_containerd_takes_it(containerd: NamespaceNode) -> None:
    """containerd 1.7 writes a whiteout for each file; BuildKit and others write `.wh..wh..opq`, which it applies.

    The layer of a checkpoint is given one, and the real containerd and the real podman make the same of it.
    """
    node = containerd
    node.sh(
        "rm -rf /srv/opaque && mkdir -p /srv/opaque/layer && cd /srv/opaque && cryoci pull /srv/ctr-made.tar ./ck"
    )
    node.sh(
        f"""cd /srv/opaque/layer && mkdir -p .{OPAQUE} && echo new >.{OPAQUE}/new && : >.{OPAQUE}/.wh..wh..opq
        gzip -dc ../ck/rootfs-diff.tar >../layer.tar
        tar -rf ../layer.tar .{OPAQUE}/.wh..wh..opq .{OPAQUE}/new && gzip -c ../layer.tar >../ck/rootfs-diff.tar"""
    )
    base = ("--base-image", workload.IMAGE, "--base-id", image_id(node))
    for engine in ("ctr", "podman"):
        done = cryoci(
            node, "convert", "/srv/opaque/ck", "--to", engine, *base, "-o", f"/srv/opaque/{engine}.tar"
        )
        assert not any(OPAQUE in lost["what"] for lost in done["lost"])
    node.write("/etc/criu/runc.conf", "skip-file-rwx-check\n")
    node.sh("ctr image ls -q | grep checkpoint | xargs -r ctr image rm --sync")
    node.sh("ctr image import --no-unpack --all-platforms /srv/opaque/ctr.tar")
    node.sh("ctr container restore --rw --live web cryoci.local/checkpoint/web:latest", timeout=120)
    assert contents(node, "ctr task exec --exec-id y", OPAQUE) == ["new"]
    node.sh("ctr task kill -s KILL web; sleep 0.5; ctr task rm web; ctr container rm web")
    node.sh(f"{PODMAN} container restore -i /srv/opaque/podman.tar", timeout=120)
    assert contents(node, "podman exec", OPAQUE) == ["new"]
    node.sh("podman rm -fa -t0; rm /etc/criu/runc.conf")


def test_containerd_imports_cryocis_image(containerd: NamespaceNode) -> None:
    """As an image of its own: its CRI (2.1 to 2.3) restores it; 1.7, in the tree, has no such restore."""
    containerd.sh("cryoci save web:1 /srv/web-image.tar && ctr image import /srv/web-image.tar", timeout=120)
    assert "web:1" in containerd.sh("ctr image ls -q").split()


@pytest.mark.parametrize("engine", ["crio", "containerd"])
def test_checkpointctl_reads_every_dialect(node: NamespaceNode, engine: str) -> None:
    archive = f"/srv/web-{engine}.tar"
    base = ("--base-image", workload.IMAGE, "--base-id", image_id(node))
    done = cryoci(node, "convert", "/srv/podman.tar", "--to", engine, *base, "-o", archive)
    assert done["dialect"] == engine
    shown = node.sh(f"checkpointctl show {archive}")
    assert {"crio": "CRI-O", "containerd": "containerd"}[engine] in shown
    tree = json.loads(node.sh(f"checkpointctl inspect --ps-tree --format json {archive}"))
    assert tree[0]["process_tree"]["command"] == "python3"
    assert cryoci(node, "inspect", archive)["engine"] == {"crio": "cri-o"}.get(engine, engine)


def test_checkpointctl_on_what_cryoci_pulls(node: NamespaceNode) -> None:
    node.sh("cryoci pull web:1 /srv/web-pulled.tar")
    theirs = json.loads(node.sh("checkpointctl inspect --all --format json /srv/web-pulled.tar"))[0]
    ours = cryoci(node, "inspect", "web:1")
    assert theirs["container_name"] == ours["container"]["name"]
    assert theirs["id"] == ours["container"]["id"] and theirs["runtime"] in ours["runtime"]
    assert theirs["checkpoint_size"]["memory_pages_size"] == ours["sizes"]["memory"]
    assert theirs["statistics"] == {k: v for k, v in ours["statistics"].items() if v}
    opened = {
        p["pid"]: [f["path"] for f in p["open_files"] if f["type"] == "REG"]
        for p in theirs["file_descriptors"]
    }
    assert opened == {
        p["pid"]: [f["what"] for f in p["files"] if f["kind"] == "file"] for p in ours["processes"]
    }
    sockets = theirs["sockets"][0]["open_sockets"][0]["data"]
    assert f"{sockets['src']}:{sockets['src_port']}" == ours["processes"][0]["sockets"][0]["source"]
    assert {m["destination"] for m in theirs["mounts"]} == {m["destination"] for m in ours["spec_mounts"]}


def test_memory_as_checkpointctl_reads_it(free: NamespaceNode) -> None:
    """Its 1.3 reads no memory of CRIU 4.2's images, so these are of 4.1, which dumps no TCP socket here."""
    code = f"import time; kept = b'{SECRET}' * 3; time.sleep(1000)"
    podman = ["podman", "--runtime=runc", "run", "-d", "--name=old", "--network=host", workload.IMAGE]
    free.run([*podman, "python3", "-c", code])
    time.sleep(0.5)
    path = f"PATH={os.path.dirname(tree.OLD_CRIU)}:$PATH"
    free.sh(f"{path} {PODMAN} container checkpoint old --compress none --export /srv/old.tar", timeout=120)
    theirs = free.sh("checkpointctl memparse -p 1 /srv/old.tar")
    rows = [line for line in theirs.splitlines() if re.match("[0-9a-f]{16} ", line)]
    assert len(rows) > 1000
    for line in rows[:200:20]:
        address, *rest = line.split()
        ours = free.sh(f"cryoci memory /srv/old.tar --pid 1 --range {address}+16").split()
        assert int(ours[0], 16) == int(address, 16) and ours[1:17] == rest[:16]
    said = free.sh(f"checkpointctl memparse -p 1 -s {SECRET} /srv/old.tar")
    found = cryoci(free, "memory", "/srv/old.tar", "--pid", "1", "--search", SECRET)["matches"]
    theirs_at = {int(x, 16) for x in re.findall(r"\b[0-9a-f]{16}\b", said)}
    assert theirs_at and theirs_at <= {int(m["address"], 16) for m in found}
    said = free.sh("checkpointctl memparse -p 1 -r 'correct-[a-z]+-battery' /srv/old.tar")
    regex = ("--search-regex", "correct-[a-z]+-battery")
    found = cryoci(free, "memory", "/srv/old.tar", "--pid", "1", *regex)["matches"]
    theirs_at = {int(x, 16) for x in re.findall(r"\b[0-9a-f]{16}\b", said)}
    assert theirs_at and theirs_at <= {int(m["address"], 16) for m in found}
    assert free.sh("checkpointctl memparse /srv/old.tar").count("python3") == 1
    (row,) = cryoci(free, "memory", "/srv/old.tar")["processes"]
    assert row["name"] == "python3" and row["stored"] > 1 << 20


def test_command_lines_and_environments(node: NamespaceNode) -> None:
    words = cryoci(node, "inspect", "--cmd", "web:1")["words"]
    assert words[0]["command"] == list(workload.COMMAND) and f"TOKEN={SECRET}" in words[0]["environment"]
    assert f"TOKEN={SECRET}" in node.sh("cryoci inspect --env /srv/podman.tar")
    assert SECRET not in node.sh("cryoci inspect --all web:1")


def test_podmans_own_image(free: NamespaceNode) -> None:
    """One layer without a word about its content: inspected on request, searched, and restored."""
    found = cryoci(free, "inspect", "--fetch", "oci:/srv/podman-made:1")
    assert found["complete"] and len(found["processes"]) == 2 and found["engine"] == "podman"
    matches = cryoci(free, "memory", "oci:/srv/podman-made:1", "--pid", "1", "--search", SECRET)["matches"]
    assert matches
    free.sh("cryoci restore oci:/srv/podman-made:1 --detach --allow host-namespaces", timeout=120)
    runs_on(saved(free, "web"), workload.wait(free, saved(free, "web")["count"] + 3))


def test_an_image_as_checkpointctl_builds_it(node: NamespaceNode) -> None:
    """`checkpointctl build` (1.4 and later) is these four steps of buildah's, and these annotations."""
    noted = {
        "engine.name": "Podman",
        "container.name": "web",
        "rootfsImageName": workload.IMAGE,
        "runtime.name": "runc",
    }
    config = " ".join(f"--annotation=org.criu.checkpoint.{key}={value}" for key, value in noted.items())
    node.sh(
        f"""c=$(buildah from scratch); buildah add -q $c /srv/podman.tar /; buildah config {config} $c
        buildah commit -q $c built; buildah push -q built oci:/srv/built:1""",
        timeout=120,
    )
    found = cryoci(node, "inspect", "--fetch", "oci:/srv/built:1")
    assert found["container"]["name"] == "web" and len(found["processes"]) == 2
    assert "PATH=" in node.sh("cryoci memory oci:/srv/built:1 --pid 1 --search PATH= -c 20")
    changes = cryoci(node, "diff", "--fetch", "oci:/srv/podman-made:1", "oci:/srv/built:1")["changes"]
    assert any(c["section"] == "file" and c["subject"] == "1 python3 fd 3" for c in changes)


def test_an_archive_becomes_an_image_of_this_nodes(free: NamespaceNode) -> None:
    """As `checkpointctl build` does: in containers-storage, from where podman restores it without a registry."""
    before = free.sh("buildah containers -qa")
    done = cryoci(free, "push", "/srv/podman.tar", "containers-storage:localhost/stored:1")
    assert done["digest"] in free.sh("buildah images --digests --no-trunc localhost/stored:1")
    assert free.sh("buildah containers -qa") == before
    noted = json.loads(free.sh("skopeo inspect --raw containers-storage:localhost/stored:1"))["annotations"]
    assert noted["org.criu.checkpoint.container.name"] == "web"
    free.sh(f"{PODMAN} container restore localhost/stored:1", timeout=120)
    runs_on(saved(free, "web"), workload.wait(free, saved(free, "web")["count"] + 3))


def test_diff_of_what_checkpointctl_reads(free: NamespaceNode) -> None:
    """Two checkpoints of one container: what changed by checkpointctl's own numbers, whose `diff` came after 1.3."""
    theirs = [
        json.loads(free.sh(f"checkpointctl inspect --all --format json {path}"))[0]
        for path in ("/srv/podman.tar", "/srv/later.tar")
        if free.sh(f"test -e {path} || cryoci pull web:1 {path}") is not None
    ]
    ours = cryoci(free, "diff", "--show-unchanged", "/srv/podman.tar", "/srv/later.tar")
    assert ours["same_container"] == (theirs[0]["id"] == theirs[1]["id"])
    sizes = [one["checkpoint_size"]["memory_pages_size"] for one in theirs]
    assert ours["memory"] == sizes[1] - sizes[0]

    def opened(one: dict[str, Any]) -> set[tuple[str, str]]:
        return {
            (f"{p['pid']} python3 fd {f['fd'].removeprefix('FD ')}", f["path"])
            for p in one["file_descriptors"]
            for f in p["open_files"]
            if f["type"] == "REG" and f["fd"].removeprefix("FD ").isdigit()
        }

    files = {c["subject"]: c["kind"] for c in ours["changes"] if c["section"] == "file"}
    for subject, _ in opened(theirs[0]) & opened(theirs[1]):
        assert files[subject] in ("same", "changed")  # its position may be another
    assert {c["kind"] for c in ours["changes"] if c["section"] == "process"} == {"same"}


def test_oras_and_buildah_take_cryocis_image(cluster: Cluster, node: NamespaceNode) -> None:
    registry = cluster.registry(node)
    digest = cryoci(node, "copy", "--plain-http", "web:1", f"{registry}/team/web:1")["digest"]
    fetched = json.loads(node.sh(f"oras manifest fetch --plain-http --descriptor {registry}/team/web:1"))
    assert fetched["digest"] == digest
    node.sh(
        f"mkdir -p /srv/oras && cd /srv/oras && oras pull --plain-http {registry}/team/web:1", timeout=120
    )
    assert node.sh("ls /srv/oras") != ""
    node.sh(
        f"""c=$(buildah from --tls-verify=false {registry}/team/web:1); m=$(buildah mount $c)
        ls $m/checkpoint/inventory.img $m/config.dump; buildah rm $c""",
        timeout=120,
    )


def test_list_of_a_kubelets_directory(node: NamespaceNode) -> None:
    name = "checkpoint-web-0_default-app-2026-11-01T10:00:00Z.tar"
    node.sh(
        f"mkdir -p /var/lib/kubelet/checkpoints && cp /srv/podman.tar /var/lib/kubelet/checkpoints/{name}"
    )
    assert "web-0" in node.sh("checkpointctl list")
    (entry,) = cryoci(node, "ls", "/var/lib/kubelet/checkpoints")
    assert (entry["pod"], entry["namespace"], entry["container"]) == ("web-0", "default", "web")
