# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that fails says why and what to do, and the container runs on as if nothing had happened."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, Kind, Subject, connections, echo, failing, leftovers, runs_on
from tests.node.trouble import OLD, SHIM, argv, cable_out, running, small_disk, unharmed, without_criu
from tests.nodes import workload

pytestmark = pytest.mark.node

some_kinds = pytest.mark.parametrize("kind", [SHIM, KINDS["crun"]], ids=["podman", "bare"])


@some_kinds
@pytest.mark.parametrize(
    ("criu", "wanted"),
    [(None, "criu is not installed"), (OLD, r"criu 3\.15\.0 .*too old"),
     ("#!/bin/sh\necho Version: 4.0\n", r"criu 4\.0\.0 cannot dump a frozen container")],
    ids=["missing", "too old", "old"],
)  # fmt: skip
def test_checkpoint_without_a_criu(site: Site, kind: Kind, criu: str | None, wanted: str) -> None:
    with running(site, kind) as subject, unharmed(subject), without_criu(site.a, criu):
        said = failing(site.a, argv(subject))
        assert re.search(wanted, said), said
        assert "install criu" in said


@some_kinds
def test_checkpoint_by_nobody(site: Site, kind: Kind) -> None:
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with running(site, kind) as subject, unharmed(subject):
        said = failing(site.a, [*nobody, *argv(subject)], env={"HOME": "/tmp"})
        assert "needs root" in said and "sudo" in said


@some_kinds
@pytest.mark.parametrize("kib", [2 << 10, 7 << 10], ids=["before the dump", "in the dump"])
def test_checkpoint_on_a_full_scratch(site: Site, kind: Kind, kib: int) -> None:
    with running(site, kind) as subject, small_disk(site.a, kib) as disk:
        with unharmed(subject):
            said = failing(site.a, argv(subject), env={"TMPDIR": disk})
            assert re.search(r"MiB free|no space|is full", said), said
            assert site.a.sh(f"ls -A {disk}") == ""


@some_kinds
def test_checkpoint_into_a_full_directory(site: Site, kind: Kind) -> None:
    with running(site, kind) as subject, small_disk(site.a, 7 << 10) as disk:
        with unharmed(subject):
            said = failing(site.a, argv(subject, f"{disk}/there"))
            assert re.search(r"MiB free|no space|is full", said), said
            assert site.a.sh(f"ls -A {disk}") == ""


@some_kinds
def test_checkpoint_into_a_full_store(site: Site, kind: Kind) -> None:
    with running(site, kind) as subject, small_disk(site.a, 2 << 10) as disk:
        with unharmed(subject):
            said = failing(site.a, argv(subject), env={"CRYOCI_STORE": f"{disk}/store"})
            assert re.search(r"[Nn]o space", said), said
            assert site.a.sh(f"find {disk} -type f -size +64k") == ""


@some_kinds
def test_a_descriptor_that_criu_cannot_dump(site: Site, kind: Kind) -> None:
    with running(site, kind, "--hold=unsupported") as subject, unharmed(subject):
        said = failing(site.a, argv(subject))
        assert "could not be dumped" in said and "landlock" in said


@some_kinds
def test_containers_that_do_not_run(site: Site, kind: Kind) -> None:
    said = failing(site.a, ["cryoci", "checkpoint", "nobody-knows-me"])
    assert "no container nobody-knows-me" in said
    subject = site.subject(kind)
    if kind.podman:
        site.a.run(["podman", "create", "--quiet", f"--name={subject.name}", subject.image])
    else:
        workload.bundle(site.a, subject.bundle, network=True)
        create = [kind.runtime, "create", "--bundle", subject.bundle, subject.name]
        workload.detach(site.a, create, subject.log)
    left = leftovers(site.a)
    said = failing(site.a, argv(subject))
    assert "only a running container can be checkpointed" in said
    assert leftovers(site.a) == left
    subject.remove()


# -- the registry


@some_kinds
def test_checkpoint_to_a_registry_that_is_not_there(site: Site, kind: Kind) -> None:
    with running(site, kind) as subject, unharmed(subject):
        said = failing(site.a, argv(subject, f"{site.c.address}:5999/checkpoints/x:1"))
        assert f"{site.c.address}:5999" in said


def test_checkpoint_with_the_cable_out(site: Site) -> None:
    with running(site, SHIM) as subject, unharmed(subject):
        with cable_out(site.a):
            said = failing(site.a, argv(subject, f"{site.registry}/checkpoints/x:1"))
        assert site.registry in said


def started(site: Site, words: list[str], begun: Callable[[], bool]) -> Any:
    """A cryoci command that has come to the point that `begun` tells."""
    process = site.a.popen(words)
    end = time.monotonic() + 30
    while not begun():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.002)
    return process


def uploading(site: Site, repository: str) -> Callable[[], bool]:
    uploads = site.c.path(f"/srv/registry/docker/registry/v2/repositories/{repository}/_uploads")
    return lambda: uploads.is_dir() and any(uploads.glob("*/data"))


def registry_pid(site: Site) -> str:
    return site.c.sh("pgrep -x docker-registry").strip()


def test_the_registry_dies_during_a_push(site: Site) -> None:
    """Frozen in the middle of an upload, then killed; its connections are reset and it is not there again."""
    with running(site, SHIM, "--memory-mib=64") as subject, unharmed(subject):
        repository = f"checkpoints/{subject.name}"
        words = argv(subject, f"{site.registry}/{repository}:1")
        process = started(site, words, uploading(site, repository))
        site.c.run(["kill", "-KILL", registry_pid(site)])
        _, stderr = process.communicate(timeout=120)
        said = stderr.decode()
        assert process.returncode == 1, said
        site.cluster.registry(site.c)
    assert said.startswith("cryoci: ") and "\nhint: " in said and site.registry in said
    said = failing(site.b, ["cryoci", "inspect", f"{site.registry}/{repository}:1"])
    assert "no" in said  # nothing was tagged


def test_the_cable_comes_out_during_a_push_and_back_in(site: Site) -> None:
    """A cut of seconds is outlived: TCP and the transport try again, and the image is whole."""
    with running(site, SHIM, "--memory-mib=64") as subject:
        before = subject.ask()
        repository = f"checkpoints/{subject.name}"
        reference = f"{site.registry}/{repository}:1"
        process = started(site, argv(subject, reference, "--leave-running"), uploading(site, repository))
        site.a.cut()
        time.sleep(2)
        assert process.poll() is None
        site.a.join()
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr.decode()
        there = subject.on(site.b)
        there.restore(reference)
        runs_on(before, there.wait(before["count"] + 3))
        there.remove()


# -- cryoci itself is killed


def frozen(site: Site, subject: Subject) -> Callable[[], bool]:
    pid = subject.pid
    group = site.a.read(f"/proc/{pid}/cgroup").decode().rpartition("0::")[2].strip()
    events = site.a.path(f"/sys/fs/cgroup{group}/cgroup.events")
    return lambda: "frozen 1" in events.read_text()


@some_kinds
def test_killed_in_the_middle(site: Site, kind: Kind) -> None:
    """kill -9 leaves the container frozen at worst; the next checkpoint thaws it and works."""
    with running(site, kind, "--memory-mib=64") as subject:
        before = subject.ask()
        process = started(site, argv(subject), frozen(site, subject))
        process.kill()
        process.wait()
        time.sleep(0.5)
        subject.checkpoint(f"{subject.name}:2", "--leave-running")
        runs_on(before, subject.wait(before["count"] + 3))
        assert subject.status == "running"
        assert site.a.sh("find /var/lib/cryoci/tmp -mindepth 1") == ""
        there = subject.on(site.a, f"{subject.name}-copy")
        there.restore(f"{subject.name}:2", "--name", there.name)
        runs_on(before, there.wait(before["count"] + 3))
        there.remove()


@some_kinds
@pytest.mark.parametrize("signal", ["TERM", "INT", "HUP"])
def test_told_to_end_in_the_middle(site: Site, kind: Kind, signal: str) -> None:
    with running(site, kind, "--memory-mib=64") as subject, unharmed(subject):
        process = started(site, argv(subject), frozen(site, subject))
        pid = site.a.sh(f"pgrep -o -f 'cryoci checkpoint {subject.name} '").strip()
        site.a.run(["kill", f"-{signal}", pid])
        process.communicate(timeout=60)
        assert process.returncode == {"TERM": 143, "INT": 130, "HUP": 129}[signal]


# -- a dump that had to end the container


@some_kinds
def test_a_failed_push_restores_in_place(site: Site, kind: Kind) -> None:
    """With --tcp-established CRIU ends the processes at once; they come back, connection and all."""
    port = echo(site.c)
    with running(site, kind, f"--connect={site.c.address}:{port}", network=False) as subject:
        before = subject.ask()
        assert before["peer"] == "open"
        sockets = connections(site.c, port)
        reference = f"{site.c.address}:5999/checkpoints/x:1"
        said = failing(site.a, argv(subject, reference, "--tcp-established"))
        assert f"{site.c.address}:5999" in said
        after = subject.wait(before["count"] + 3)
        runs_on(before, after)
        assert after["peer"] == "open" and connections(site.c, port) == sockets
        assert subject.status == "running"
        assert site.a.sh("find /var/lib/cryoci/tmp -mindepth 1") == ""


# Its first thread ends and is a zombie, as that of a large process is that still gives back its memory.
_LEADERLESS = """
import ctypes, os, subprocess, sys
from cryoci.shim import cgroup
home = "/sys/fs/cgroup/leaderless"
os.mkdir(home)
code = "import ctypes, sys, threading; sys.stdin.readline(); threading.Thread(target=sys.stdin.read).start(); "
code += "ctypes.CDLL(None).syscall(60, 0)"
said = [cgroup.populated("/leaderless")]
process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
with open(home + "/cgroup.procs", "w") as f:
    f.write(str(process.pid))
said.append(cgroup.path_of(process.pid))
process.stdin.write(b"\\n")  # not before it is there: Linux moves no thread that has ended
process.stdin.flush()
while open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
    pass
said.append(cgroup.populated("/leaderless"))
process.stdin.close()
process.wait()
said.append(cgroup.populated("/leaderless"))
os.rmdir(home)
print(said, cgroup.populated(None), cgroup.populated("/leaderless"))
"""


def test_a_container_ends_with_its_last_thread(site: Site) -> None:
    """Until then its sockets are open, and a restore of it finds their addresses in use (seen with 44 GB)."""
    said = site.a.run(["/opt/cryoci/bin/python", "-c", _LEADERLESS], timeout=30).stdout.decode()
    assert said == "[False, '/leaderless', True, False] False False\n"
