# SPDX-License-Identifier: Apache-2.0
"""Engines' own checkpoint and restore verbs with cryoci-runtime, and images that go both ways."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.node.conftest import Site
from tests.node.subject import CONFIG, KINDS, Subject, connections, echo, runs_on
from tests.nodes.node import Node

pytestmark = pytest.mark.node

PODMAN = ["podman", "--runtime=cryoci-runtime"]
SHIM = KINDS["podman+cryoci-runtime"]
RUNTIME_NAME = "io.podman.annotations.checkpoint.runtime.name"


def carry(site: Site, path: str) -> None:
    """Copy a file from node a to node b."""
    site.b.path(path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(site.a.path(path), site.b.path(path))


@pytest.mark.parametrize("leave", [False, True], ids=["stop", "leave-running"])
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_podman_export_and_import(site: Site, compress: str, leave: bool) -> None:
    subject = site.subject(SHIM)
    before = subject.start()
    subject.ask("/write?path=/root/new&text=here")
    archive = f"/srv/{subject.name}.tar"
    words = [f"--export={archive}", f"--compress={compress}", *(["--leave-running"] if leave else [])]
    site.a.run([*PODMAN, "container", "checkpoint", *words, subject.name])
    if leave:
        runs_on(before, subject.wait(before["count"] + 3))
    else:
        assert subject.status == "exited"
    log = site.a.read(f"/run/cryoci/containers/default/{subject.id}/dump.log").decode()
    assert "Dumping finished successfully" in log  # podman's own copy goes with the container
    carry(site, archive)
    there = subject.on(site.b)
    site.b.run([*PODMAN, "container", "restore", f"--import={archive}"])
    runs_on(before, there.wait(before["count"] + 3))
    assert there.ask("/read?path=/root/new") == {"text": "here"}
    there.remove()
    subject.remove()


def test_podman_image_of_a_checkpoint(site: Site) -> None:
    """--create-image, push, pull, restore IMAGE: podman alone, with the runtime below it."""
    subject = site.subject(SHIM)
    before = subject.start()
    image = f"{site.registry}/podman/{subject.name}:1"
    site.a.run([*PODMAN, "container", "checkpoint", f"--create-image={image}", subject.name])
    site.a.run(["podman", "push", "--quiet", image])
    subject.remove()
    site.b.run(["podman", "pull", "--quiet", image])
    there = subject.on(site.b)
    site.b.run([*PODMAN, "container", "restore", image])
    # podman names the container anew: it is the only one
    there.name = site.b.sh("podman ps --quiet --no-trunc").strip()
    runs_on(before, there.wait(before["count"] + 3))
    there.remove()


def test_a_podman_archive_becomes_an_image(site: Site) -> None:
    subject = site.subject(SHIM)
    before = subject.start()
    archive, image = f"/srv/{subject.name}.tar.zst", f"{site.registry}/checkpoints/{subject.name}:1"
    site.a.run([*PODMAN, "container", "checkpoint", f"--export={archive}", subject.name])
    site.a.run(["cryoci", "push", archive, image])
    subject.remove()
    there = subject.on(site.b)
    there.restore(image)
    runs_on(before, there.wait(before["count"] + 3))
    there.remove()


@pytest.mark.parametrize("name", ["podman+cryoci-runtime", "podman+runc", "podman+crun"])
def test_podman_restores_an_image_of_cryoci(site: Site, name: str) -> None:
    subject = site.subject(KINDS[name])
    before = subject.start()
    subject.ask("/write?path=/root/new&text=here")
    image = f"{site.registry}/checkpoints/{subject.name}:1"
    subject.checkpoint(image)
    subject.remove()
    site.b.run(["podman", "pull", "--quiet", image])
    found = json.loads(site.b.run(["podman", "image", "inspect", image]).stdout)[0]
    assert found["Annotations"][RUNTIME_NAME] == subject.kind.runtime
    site.b.run(["podman", f"--runtime={subject.kind.runtime}", "container", "restore", image])
    there = subject.on(site.b)
    there.name = site.b.sh("podman ps --quiet --no-trunc").strip()
    runs_on(before, there.wait(before["count"] + 3))
    assert there.ask("/read?path=/root/new") == {"text": "here"}
    there.remove()


def checkpointctl(node: Node, verb: str, archive: str, *words: str) -> str:
    return node.run(["checkpointctl", verb, archive, *words]).stdout.decode()


@pytest.mark.parametrize("name", ["podman+cryoci-runtime", "runc"])
def test_checkpointctl_and_skopeo_read_it(site: Site, name: str) -> None:
    subject = site.subject(KINDS[name])
    subject.start()
    image, archive = f"{site.registry}/checkpoints/{subject.name}:1", f"/srv/{subject.name}.tar"
    subject.checkpoint(image, "--leave-running")
    site.b.run(["cryoci", "pull", image, archive])
    assert subject.kind.runtime in checkpointctl(site.b, "show", archive)
    inspected = json.loads(checkpointctl(site.b, "inspect", archive, "--all", "--format=json"))[0]
    # for engines that it does not know, checkpointctl wants the name in a Kubernetes annotation
    assert inspected["container_name"] == (subject.name if subject.kind.podman else "")
    assert inspected["process_tree"]["command"].startswith("python3")
    assert [child["command"] for child in inspected["process_tree"]["children"]] == ["python3"]
    manifest = json.loads(site.b.run(["skopeo", "inspect", "--raw", f"docker://{image}"]).stdout)
    noted = manifest["annotations"]
    assert noted["org.criu.checkpoint.container.name"] == subject.name
    assert noted["io.kubernetes.cri-o.annotations.checkpoint.name"] == subject.name
    assert noted[RUNTIME_NAME] == subject.kind.runtime
    assert any(key.startswith("io.cryoci.") for key in noted)
    subject.remove()


def checkpoint_by_podman(subject: Subject) -> tuple[int, str]:
    words = [f"--export=/srv/{subject.name}.tar", subject.name]
    result = subject.node.run([*PODMAN, "container", "checkpoint", *words], check=False)
    return result.returncode, (result.stderr + result.stdout).decode()


def test_criu_options_that_podman_cannot_pass(site: Site) -> None:
    """config.toml decides at the dump, also for a container that was created before."""
    port = echo(site.c)
    subject = site.subject(SHIM)
    before = subject.start(f"--connect={site.c.address}:{port}")
    status, said = checkpoint_by_podman(subject)
    assert status != 0
    assert "established TCP connections" in said and "--tcp-established" in said
    after = subject.wait(before["count"] + 3)
    runs_on(before, after)
    assert after["peer"] == "open" and len(connections(site.c, port)) >= 1
    site.a.write(CONFIG, "[criu]\ntcp-established = true\n")
    try:
        status, said = checkpoint_by_podman(subject)
        assert status == 0, said
        assert subject.status == "exited"
    finally:
        site.a.run(["rm", "-f", CONFIG])
        subject.remove()


def test_ghost_limit(site: Site) -> None:
    subject = site.subject(SHIM)
    site.a.write(CONFIG, '[criu]\nghost-limit = "1K"\n')
    try:
        before = subject.start("--hold=ghost")
        status, said = checkpoint_by_podman(subject)
        assert (
            status != 0 and "ghost limit" in said and "8192 bytes" in said
        )  # two blocks hold its 5000 bytes
        runs_on(before, subject.wait(before["count"] + 3))
        site.a.write(CONFIG, '[criu]\nghost-limit = "8K"\n')
        status, said = checkpoint_by_podman(subject)
        assert status == 0, said
    finally:
        site.a.run(["rm", "-f", CONFIG])
        subject.remove()
