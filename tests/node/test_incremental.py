# SPDX-License-Identifier: Apache-2.0
"""Incremental checkpoints over the real podman, runc, crun and registry: little is moved, and nothing is missing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.node.conftest import Site
from tests.node.subject import CONFIG, KINDS, failing, runs_on
from tests.nodes import workload
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

MEMORY = '[memory]\nengine = "parallel"\nthreshold = "1M"\nchunk = "8M"\n'
KEPT = "/var/lib/cryoci/chunks"
MIB = 1 << 20
CHANGING = Path(__file__).with_name("changing.py")


def kept(site: Site) -> list[str]:
    """Ids of the containers whose chunk files are kept."""
    return site.a.sh(f"ls -A {KEPT}/* 2>/dev/null || true").split()


def configure(site: Site, text: str = MEMORY) -> None:
    for node in (site.a, site.b):
        node.write(CONFIG, text)


@pytest.mark.parametrize("name", ["podman+cryoci-runtime", "runc"])
def test_the_second_image_shares_what_did_not_change(site: Site, name: str) -> None:
    configure(site)
    subject = site.subject(KINDS[name])
    before = subject.start("--memory-mib=40")
    repository = f"{site.registry}/incremental/{subject.name}"
    first = subject.checkpoint(f"{repository}:1", "-R", "--incremental")
    assert any("no earlier checkpoint" in line for line in first["warnings"])
    assert first["image"]["shared"] == 0 and first["image"]["size"] > 40 * MIB
    second = subject.checkpoint(f"{repository}:2", "-R", "--incremental")
    assert second["warnings"] == []
    assert second["image"]["shared"] > 30 * MIB
    # the first is gone, and the registry has collected; the second is whole
    site.a.run(["cryoci", "rm", f"{repository}:1"])
    site.c.run(["docker-registry", "garbage-collect", "/etc/docker/registry/nodes.yml"])
    runs_on(before, subject.wait(before["count"] + 3))
    there = subject.on(site.b)
    there.restore(f"{repository}:2")
    runs_on(before, there.wait(before["count"] + 3))
    # what was restored has the image that it came from for its parent
    third = there.checkpoint(f"{repository}:3", "-R", "--incremental")
    assert third["image"]["shared"] > 30 * MIB, third
    there.remove()
    # and when the parent is nowhere any more, all is written, and that is said
    site.a.run(["cryoci", "rm", f"{repository}@{second['image']['digest']}"])
    fourth = subject.checkpoint(f"{repository}:4", "-R", "--incremental")
    assert any("nothing is shared with the parent" in line for line in fourth["warnings"])
    runs_on(before, subject.wait(before["count"] + 3))
    assert subject.id in kept(site)
    subject.remove()
    if subject.kind.runtime == "cryoci-runtime":  # else its delete went past cryoci, and the next one sweeps
        assert not kept(site)


def test_in_a_layout_rm_of_the_parent_leaves_what_is_shared(site: Site) -> None:
    configure(site)
    subject = site.subject(KINDS["crun"])
    before = subject.start("--memory-mib=24")
    for number in (1, 2):
        report = subject.checkpoint(f"oci:/srv/inc-layout:{number}", "-R", "--incremental")
    assert report["image"]["shared"] > 16 * MIB
    assert kept(site) == [subject.id]  # what others have left is gone
    site.a.run(["cryoci", "rm", "oci:/srv/inc-layout:1"])
    site.a.run(["crun", "delete", "-f", subject.name])
    subject.restore("oci:/srv/inc-layout:2")
    runs_on(before, subject.wait(before["count"] + 3))
    subject.remove()


def test_encrypted_images_share_nothing_and_say_so(site: Site) -> None:
    configure(site)
    subject = site.subject(KINDS["runc"])
    subject.start()
    key = site.a.sh("age-keygen 2>/dev/null | tee /srv/inc.key | sed -n 's/^# public key: //p'").strip()
    words = ("-R", "--incremental", "--encrypt-to", key)
    subject.checkpoint("oci:/srv/inc-sealed:1", *words)
    second = subject.checkpoint("oci:/srv/inc-sealed:2", *words)
    assert second["image"]["shared"] == 0
    assert any("encrypted" in line for line in second["warnings"])
    third = subject.checkpoint("oci:/srv/inc-sealed:3", "-R", "--incremental")
    assert any("encrypted" in line for line in third["warnings"])
    manifest = site.a.sh("cat /srv/inc-sealed/blobs/sha256/* | grep -a -c layer.chunks || true")
    assert int(manifest) <= 1  # of the third alone
    subject.remove()


def test_what_cannot_be_incremental_is_refused_with_the_reason(site: Site) -> None:
    configure(site, "")
    subject, other = site.subject(KINDS["runc"]), site.subject(KINDS["podman+crun"])
    before = subject.start()
    other.start()
    argv = ["cryoci", "checkpoint", subject.name, "-R", "-o", "/srv/inc-refused", "--incremental"]
    assert 'engine = "parallel"' in failing(site.a, argv)
    assert "--incremental" in failing(site.a, [*argv[:-1], "--parent", "x"])
    configure(site)
    assert "cryoci-runtime" in failing(site.a, [argv[0], argv[1], other.name, *argv[3:]])
    theirs = "oci:/srv/inc-other:1"
    other.checkpoint(theirs, "-R")
    assert "another container" in failing(
        site.a, [*argv[:-2], "oci:/srv/inc-refused:1", "--incremental", "--parent", theirs]
    )
    assert "for directories" in failing(
        site.a, [*argv[:-2], "oci:/srv/inc-refused:1", "--incremental", "--thin"]
    )
    runs_on(before, subject.wait(before["count"] + 3))
    site.a.sh("test ! -e /srv/inc-refused")
    subject.remove()
    other.remove()


class Changing:
    """A bare container of changing.py on a node."""

    def __init__(self, node: NamespaceNode, kind: str, areas: int) -> None:
        self.node, self.name, self.asked = node, f"changing-{kind}", 0
        self.base = f"/srv/{self.name}"
        node.write(CONFIG, f'[runtime]\npath = "{kind}"\n{MEMORY}')
        spec = workload.bundle(node, self.base)
        node.write(f"{self.base}/rootfs/app/changing.py", CHANGING.read_text())
        spec["process"]["args"] = ["python3", "-u", "/app/changing.py", str(areas)]
        node.write(f"{self.base}/config.json", json.dumps(spec))
        argv = ["cryoci-runtime", "run", "-d", "-b", self.base, self.name]
        workload.detach(node, argv, f"{self.base}/log")

    def change(self, *areas: int) -> str:
        """Change so many areas; returns the digest of all."""
        data = f"{self.base}/rootfs/data"
        self.node.sh(f"echo {' '.join(map(str, areas))} > {data}/ask.{self.asked}")
        end = time.monotonic() + 30
        while not (told := self.node.sh(f"cat {data}/told.{self.asked} 2>/dev/null || true")):
            assert time.monotonic() < end, self.node.sh(f"cat {self.base}/log")
            time.sleep(0.02)
        self.asked += 1
        return told

    def checkpoint(self, target: str, *words: str) -> dict[str, Any]:
        argv = ["cryoci", "checkpoint", self.name, "-o", target, "--rootfs=none", "--json", *words]
        found: dict[str, Any] = json.loads(self.node.run(argv, timeout=120).stdout)
        return found

    def end(self) -> None:
        self.node.run(["cryoci-runtime", "delete", "-f", self.name], check=False)

    def restore(self, target: str) -> None:
        argv = ["cryoci", "restore", target, "-d", "--bundle", self.base]
        workload.detach(self.node, argv, f"{self.base}/log")

    def remove(self) -> None:
        self.end()
        self.node.run(["rm", "-rf", self.base])


@pytest.mark.parametrize("kind", ["runc", "crun"])
def test_directories_share_files_and_thin_ones_form_a_chain(site: Site, kind: str) -> None:
    node = site.a
    subject = Changing(node, kind, 6)
    here = f"/srv/chain-{kind}"
    node.sh(f"mkdir {here}")
    told = subject.change()
    subject.checkpoint(f"{here}/c0", "-R")  # an ordinary one is a parent too
    for n in range(1, 6):
        told = subject.change(n - 1)
        report = subject.checkpoint(f"{here}/c{n}", "-R", "--incremental", "--thin")
        assert report["warnings"] == []
        assert report["files"]["new"] < 16 * MIB and report["files"]["shared"] > 32 * MIB
    assert subject.change() == told
    whole = subject.checkpoint(f"{here}/whole", "-R", "--incremental")
    assert whole["files"]["shared"] > 40 * MIB
    subject.end()
    for n in range(5):  # each link is needed
        node.sh(f"mv {here}/c{n} {here}/away")
        assert f"c{n}" in failing(node, ["cryoci", "restore", f"{here}/c5", "-d", "--bundle", subject.base])
        node.sh(f"mv {here}/away {here}/c{n}")
    assert "cryoci flatten" in failing(node, ["cryoci", "push", f"{here}/c5", "oci:/srv/inc-chain:1"])
    subject.restore(f"{here}/c5")
    assert subject.change() == told
    subject.end()
    node.run(["cryoci", "flatten", f"{here}/c5"])
    node.sh(f"rm -r {here}/c[0-4] {here}/whole")
    subject.restore(f"{here}/c5")
    assert subject.change() == told
    subject.remove()
    node.sh(f"rm -r {here}")
