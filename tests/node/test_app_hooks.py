# SPDX-License-Identifier: Apache-2.0
"""App hooks of real containers: over HTTP in their network, by a program, by a signal."""

from __future__ import annotations

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, Subject, failing, runs_on
from tests.nodes.workload import PORT

pytestmark = pytest.mark.node

SLEEP = f"http: GET http://127.0.0.1:{PORT}/write?path=/data/asleep&text=yes"
WAKE = "exec: sh -c 'mv /data/asleep /data/awake'"


def noted(**more: str) -> tuple[str, ...]:
    """podman's flags for a container with hooks."""
    hooks = {"pre-checkpoint": SLEEP, "post-restore": WAKE, **more}
    return tuple(f"--annotation=io.cryoci.{key}={text}" for key, text in hooks.items())


def test_annotations_travel(site: Site) -> None:
    """The first checkpoint and the restored container's own: the image brings the hooks along."""
    subject = site.subject(KINDS["podman+crun"])
    before = subject.start(options=noted())
    image = f"{site.registry}/checkpoints/{subject.name}:1"
    report = subject.checkpoint(image)
    assert "pre-checkpoint hooks" in report["seconds"] and report["warnings"] == []
    subject.remove()
    there = subject.on(site.b)
    there.restore(image)
    runs_on(before, there.wait(before["count"] + 2))
    assert there.has("/data/awake") and not there.has("/data/asleep")
    there.checkpoint("again:1", "--leave-running")
    assert there.has("/data/awake") and there.status == "running"
    there.remove()


@pytest.mark.parametrize("name", ["runc", "crun"])
def test_flags_for_a_bare_container(site: Site, name: str) -> None:
    subject = site.subject(KINDS[name])
    before = subject.start()
    subject.checkpoint(f"./{subject.name}", "--pre-checkpoint", SLEEP, "--pre-checkpoint", "wait: 10ms")
    subject.restore(f"./{subject.name}", "--post-restore", WAKE)
    runs_on(before, subject.wait(before["count"] + 2))
    assert subject.has("/data/awake") and not subject.has("/data/asleep")
    subject.remove()


def test_a_failing_hook_leaves_no_trace(site: Site) -> None:
    subject = site.subject(KINDS["podman+runc"])
    before = subject.start(
        options=noted(**{"pre-checkpoint": "exec: sh -c 'echo model is busy >&2; exit 3'"})
    )
    said = failing(subject.node, ["cryoci", "checkpoint", subject.name, "-o", "./never"])
    assert "model is busy" in said
    slow = ["--pre-checkpoint", "exec: sleep 60", "--hook-timeout", "300ms"]
    said = failing(subject.node, ["cryoci", "checkpoint", subject.name, "-o", "./never", *slow])
    assert "it did not end within 0.3 s" in said
    assert subject.node.sh("pgrep -fx 'sleep 60' || true") == ""
    runs_on(before, subject.wait(before["count"] + 1))
    # a restored container whose application does not wake up is no container
    subject.checkpoint("./kept", "--no-hooks")
    subject.remove()
    said = failing(
        subject.node, ["cryoci", "restore", "./kept", "--detach", "--post-restore", "exec: false"]
    )
    assert "post-restore hook" in said and subject.status == "gone"
    subject.node.run(["cryoci", "restore", "./kept", "-d", "--post-restore", "signal: WINCH"], timeout=120)
    restored: Subject = subject
    runs_on(before, restored.wait(before["count"] + 2))
    restored.remove()
