# SPDX-License-Identifier: Apache-2.0
"""Annotated create: an engine that knows nothing of checkpoints creates and starts a container, and it runs on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node import everything
from tests.node.conftest import Site
from tests.node.subject import CONFIG, SMALL, TMPFS, Kind, Subject, leftovers, records, runs_on
from tests.nodes import workload
from tests.nodes.node import Node

pytestmark = pytest.mark.node

ANNOTATION = "io.cryoci.restore"
SHIM = "/usr/local/bin/cryoci-runtime"
belows = pytest.mark.parametrize("below", ["runc", "crun"])
Made = tuple[Subject, str, dict[str, Any]]
PODMAN = ["podman", "--runtime=cryoci-runtime"]


def prefer(node: Node, below: str) -> None:
    node.write(CONFIG, f'[runtime]\npath = "{below}"\n')


@pytest.fixture(scope="module", params=["runc", "crun"])
def made(request: pytest.FixtureRequest, site: Site) -> Iterator[Made]:
    """A checkpoint in the registry: the subject on node b that it is to become, its reference, its last words."""
    below = request.param
    prefer(site.a, below)
    subject = site.subject(Kind("podman", "cryoci-runtime", below))
    subject.start()
    for path in ("/root/new", f"{TMPFS}/mark", "/dev/shm/mark"):
        subject.ask(f"/write?path={path}&text=here")
    before = subject.ask()
    reference = f"{site.registry}/annotated/{subject.name}:1"
    subject.checkpoint(reference)
    subject.remove()
    site.b.run(["podman", "pull", "--quiet", site.image])
    site.b.run(["rm", "-f", CONFIG])
    yield subject.on(site.b), reference, before
    site.a.run(["rm", "-f", CONFIG])


def create(subject: Subject, reference: str, *options: str, key: str = ANNOTATION) -> None:
    argv = [*PODMAN, "create", f"--name={subject.name}", f"--annotation={key}={reference}", *options]
    subject.node.run([*argv, subject.image, "sleep", "1000"])


def state(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(subject.node.run(["cryoci-runtime", "state", subject.id]).stdout)
    return found


def test_podman_creates_and_starts(made: Made) -> None:
    """Created means created: nothing of it runs until start, then it runs on where it was."""
    subject, reference, before = made
    node = subject.node
    clean = leftovers(node)
    create(subject, reference, f"--tmpfs={TMPFS}")
    node.run([*PODMAN, "init", subject.name])
    assert subject.status == "initialized" and state(subject)["status"] == "created"
    pid = state(subject)["pid"]
    assert pid == subject.pid  # the one that podman has recorded
    size = node.sh(f"stat -c %s /proc/{pid}/root/data/count.log")
    time.sleep(0.3)
    assert node.sh(f"stat -c %s /proc/{pid}/root/data/count.log") == size
    subject.node.run([*PODMAN, "start", subject.name])
    after = subject.wait(before["count"] + 3)
    runs_on(before, after)
    log = node.sh(f"cat /proc/{pid}/root/data/count.log").splitlines()
    assert [int(line.split()[0]) for line in log] == list(range(1, len(log) + 1))  # none twice, none lost
    assert after["hostname"] == subject.id[:12] != before["hostname"]
    assert state(subject)["pid"] == pid and state(subject)["status"] == "running"
    for path in ("/root/new", f"{TMPFS}/mark", "/dev/shm/mark"):
        assert subject.ask(f"/read?path={path}") == {"text": "here"}
    assert f"count {after['count']}\n" in node.sh(f"podman logs {subject.name}")
    assert len(subject.cgroups) == 1 and subject.id in subject.cgroups.pop()
    said = node.run([*PODMAN, "exec", subject.name, "cat", "/proc/1/comm"]).stdout
    assert said == b"python3\n"
    node.run([*PODMAN, "pause", subject.name])
    assert state(subject)["status"] == "paused"
    node.run([*PODMAN, "unpause", subject.name])
    node.run([*PODMAN, "stop", "--time=5", subject.name])  # SIGTERM ends it with status 0
    assert node.sh(f"podman inspect --format={{{{.State.ExitCode}}}} {subject.name}").strip() == "0"
    node.run([*PODMAN, "start", subject.name])  # every start is a create: it goes back to the checkpoint
    again = subject.wait(before["count"] + 1)
    assert again["boot"] == before["boot"] and again["count"] < before["count"] + 400
    subject.remove()
    assert leftovers(node) == clean


def test_before_the_start_it_can_be_killed_and_deleted(made: Made) -> None:
    subject, reference, _ = made
    node = subject.node
    clean = leftovers(node)
    for words in (["delete"], ["kill"]):
        create(subject, reference, f"--tmpfs={TMPFS}")
        node.run([*PODMAN, "init", subject.name])
        for verb in ("pause", "resume"):
            result = node.run(["cryoci-runtime", verb, subject.id], check=False)
            assert result.returncode == 1 and b"not started" in result.stderr
        if words == ["kill"]:
            node.run(["cryoci-runtime", "kill", subject.id, "TERM"])
            assert state(subject)["status"] == "created"  # it gets the signal when it runs
            node.run(["cryoci-runtime", "kill", subject.id, "KILL"])
            end = time.monotonic() + 5
            while state(subject)["status"] != "stopped" and time.monotonic() < end:
                time.sleep(0.05)
            assert state(subject)["status"] == "stopped"
        else:
            node.run(["cryoci-runtime", *words, subject.id])
        subject.remove()
        assert leftovers(node) == clean


@pytest.mark.parametrize("made", ["runc"], indirect=True)
def test_what_does_not_fit_is_refused(made: Made) -> None:
    """By comparing specifications, the first four; by what the restored processes hold, the others."""
    subject, reference, _ = made
    clean = leftovers(subject.node)
    scratch = f"--tmpfs={TMPFS}"
    cases: tuple[tuple[list[str], str], ...] = (
        ([], f"mounts that the container does not get: {TMPFS}"),
        ([scratch, "--tmpfs=/more"], "mounts that its restored processes cannot see: /more"),
        ([scratch, "--tty"], "no terminal"),
        ([scratch, "--network=host"], "network namespace"),
        ([scratch, "--cap-drop=CHOWN"], "capabilities that the container does not get: CHOWN"),
        ([scratch, "--security-opt=no-new-privileges"], "noNewPrivileges"),
    )
    for options, said in cases:
        create(subject, reference, *options)
        result = subject.node.run([*PODMAN, "start", subject.name], check=False)
        assert result.returncode in (125, 126) and said in result.stderr.decode(), result.stderr.decode()
        assert subject.status == "created" and "runtime" not in records(subject.node)
        subject.remove()
    assert leftovers(subject.node) == clean


def test_what_cannot_be_fetched_or_restored(site: Site, made: Made) -> None:
    """The engine says why; neither runtime nor cgroup keeps a trace of it."""
    subject, reference, _ = made
    node = subject.node
    clean = leftovers(node)
    broken = "/srv/broken"
    node.run(["cryoci", "pull", reference, broken])
    node.run(["rm", f"{broken}/rootfs-diff.tar"])  # so a file that is open is not there
    other = f"{site.registry}/counter-other:1"
    node.sh(f"printf 'FROM {site.image}\\nLABEL a=b\\n' | podman build --quiet --tag {other} -")
    cases = (
        (f"{site.registry}/annotated/none:1", site.image, "answered 404"),
        (broken, site.image, "open in the container, cannot be opened on this node"),
        (reference, other, "create it from the same image"),
        ("./here", site.image, "names no checkpoint"),
    )
    for asked, image, said in cases:
        subject.image = image
        create(subject, asked, f"--tmpfs={TMPFS}")
        result = node.run([*PODMAN, "start", subject.name], check=False)
        assert result.returncode != 0 and said in result.stderr.decode(), result.stderr.decode()
        subject.remove()
        assert leftovers(node) == clean
    assert "libpod-" not in node.sh("find /sys/fs/cgroup -type d")
    node.run(["podman", "rmi", other])
    node.run(["rm", "-rf", broken])
    subject.image = site.image


@belows
@pytest.mark.parametrize("flag", ["--interactive", "--tty"])
def test_a_pipe_or_terminal_leads_to_the_new_engine(site: Site, below: str, flag: str) -> None:
    """What is typed reaches the restored shell, what it says is seen, and its status is the container's."""
    prefer(site.a, below)
    name = f"io-{below}{flag}"
    base = [*PODMAN, "run", "--detach", "--interactive", flag, f"--name={name}"]
    site.a.run([*base, site.image, "sh", "-c", 'read -r l; echo "got $l"; exit 7'])
    reference = f"{site.registry}/annotated/{name}:1"
    site.a.run(["cryoci", "checkpoint", name, "--output", reference])
    site.a.run(["podman", "rm", "--force", name])
    site.b.run([*base, f"--annotation={ANNOTATION}={reference}", site.image, "sh"])
    said = site.b.sh(f"(echo two; sleep 1) | podman attach {name} || true")
    assert "got two" in said
    assert site.b.sh(f"podman wait {name}").strip() == "7"
    site.b.run(["podman", "rm", "--force", name])
    site.a.run(["rm", "-f", CONFIG])


@belows
def test_a_container_with_everything(site: Site, below: str) -> None:
    """podman's own checkpoint and restore, in place and elsewhere, and annotated create: all of it is kept."""
    container = everything.Container(site.b, below, site.image)
    container.start()
    container.stop_and_restore_in_place()
    container.travel()
    container.recreate()
    container.remove()


# That crun restores such a container too is test_main_job.py's.
@pytest.mark.parametrize("below", ["runc", pytest.param("crun", marks=pytest.mark.more)])
def test_a_container_with_an_init(site: Site, below: str) -> None:
    """`podman run --init`: process 1 is catatonit, and reaps, and passes on signals, wherever it goes on."""
    everything.give_init(site.b)
    container = everything.Container(site.b, below, site.image, ("--init",))
    container.start()
    container.stop_and_restore_in_place()
    container.recreate()
    node, subject = site.b, container.subject
    comm = node.run([*PODMAN, "exec", subject.name, "sh", "-c", "cat /proc/1/comm; (true &)"]).stdout
    assert comm == b"podman-init\n"
    zombies = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null || true"
    assert node.run([*PODMAN, "exec", subject.name, "sh", "-c", zombies]).stdout == b""
    container.remove()


@pytest.fixture(scope="module")
def containerd(site: Site) -> Node:
    """Node c with containerd and the counter in it."""
    node = site.c
    node.sh("setsid containerd >/var/log/containerd.log 2>&1 </dev/null &")
    node.sh("for i in $(seq 100); do ctr version >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1")
    node.run(["ctr", "image", "import", workload.ARCHIVE])
    return node


@belows
def test_containerd_creates_and_starts(site: Site, containerd: Node, below: str) -> None:
    node = containerd
    prefer(node, below)
    run = ["ctr", "run", "--detach", "--cpu-shares=0", "--runc-binary", SHIM]
    name, copy = f"ctr-{below}", f"ctr-{below}-copy"
    node.run([*run, workload.IMAGE, name, *workload.COMMAND, *SMALL])

    def pid(task: str) -> int:
        return int(node.sh(f"ctr task ls | grep '^{task} ' | tr -s ' ' | cut -d' ' -f2"))

    before = workload.wait(node, 3, pid=pid(name))
    reference = f"{site.registry}/annotated/{name}:1"
    node.run(
        [
            "cryoci",
            "checkpoint",
            name,
            "--runtime-root=/run/containerd/runc/default",
            f"--output={reference}",
        ]
    )
    node.sh(f"while ctr task ls | grep '^{name} ' | grep -q RUNNING; do sleep 0.05; done")
    for argv in (["task", "rm", name], ["container", "rm", name]):
        node.run(["ctr", *argv], check=False)
    assert name not in node.sh("ctr container ls --quiet").split()
    node.run([*run, f"--annotation={ANNOTATION}={reference}", workload.IMAGE, copy, "sleep", "1000"])
    after = workload.wait(node, before["count"] + 3, pid=pid(copy))
    runs_on(before, after)
    assert len(node.sh(f"ctr task ps {copy} | tail -n +2").splitlines()) == 2
    said = node.run(["ctr", "task", "exec", "--exec-id=x", copy, "cat", "/proc/1/comm"]).stdout
    assert said == b"python3\n"
    node.run(["ctr", "task", "kill", "--signal=TERM", copy])
    node.sh(f"while ctr task ls | grep '^{copy} ' | grep -q RUNNING; do sleep 0.05; done")
    node.run(["ctr", "task", "rm", copy])  # its status is 0, as the counter's at SIGTERM
    node.run(["ctr", "container", "rm", copy])
    bad = [f"--annotation={ANNOTATION}={site.registry}/annotated/none:1", workload.IMAGE, copy, "sleep", "1"]
    result = node.run([*run, *bad], check=False)
    assert result.returncode != 0 and "answered 404" in result.stderr.decode()
    node.run(["ctr", "container", "rm", copy], check=False)
    node.run(["rm", "-f", CONFIG])
    assert "runtime" not in records(node) and not node.sh(
        f"{below} --root /run/containerd/runc/default list -q"
    )
