# SPDX-License-Identifier: Apache-2.0
"""`cryoci guard`: crashes of real containers, and what the guard makes of them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.node.conftest import Site
from tests.node.subject import CONFIG, KINDS, Subject, failing, runs_on
from tests.nodes.namespace import NamespaceNode
from tests.nodes.node import Node

pytestmark = pytest.mark.node

PODMAN, BARE = KINDS["podman+runc"], KINDS["crun"]


def state(node: Node, name: str) -> dict[str, Any]:
    """What `cryoci guard status` says of a guard."""
    found = json.loads(node.run(["cryoci", "guard", "status", name, "--json"]).stdout)[0]
    return {**found["state"], "alive": found["alive"]}


def until(
    node: Node, name: str, true: Callable[[dict[str, Any]], bool], seconds: float = 40
) -> dict[str, Any]:
    """The state of a guard once it is so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        asked = node.run(["cryoci", "guard", "status", name, "--json"], check=False)
        if asked.returncode == 0:
            found = json.loads(asked.stdout)[0]
            now = {**found["state"], "alive": found["alive"]}
            if true(now):
                return now
        time.sleep(0.2)
    raise AssertionError(f"not so within {seconds} s: {asked.stdout.decode()} {asked.stderr.decode()}")


def recovered(node: Node, name: str, crashes: int) -> dict[str, Any]:
    """The state of a guard that has made up for so many crashes."""
    return until(node, name, lambda s: len(s["recoveries"]) == crashes and s["phase"] == "watching")


@contextmanager
def guarding(node: NamespaceNode, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A guard of container `name` for the time of a with block."""
    process = node.popen(["cryoci", "guard", name, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        node.run(["cryoci", "guard", "stop", name], check=False)
        process.kill()
        process.wait()
        if process.stdout:
            print(process.stdout.read().decode())
            process.stdout.close()


def kill(subject: Subject) -> int:
    """Crash it: SIGKILL to its first process; returns the pid that it had."""
    pid = subject.pid
    subject.node.run(["kill", "-KILL", str(pid)])
    return pid


def test_a_crash_costs_seconds(site: Site) -> None:
    """podman, to disk: the newest checkpoint comes back under the same name; then a stop is obeyed."""
    subject = site.subject(PODMAN)
    before = subject.start()
    with guarding(site.a, subject.name, "--every", "2s", "--keep", "2") as process:
        first = until(site.a, subject.name, lambda s: s["taken"] >= 3)
        assert len(first["kept"]) == 2 and first["alive"] and first["phase"] == "watching"
        crashed = subject.wait(before["count"] + 5)
        line = next(
            one
            for one in json.loads(site.a.run(["cryoci", "top", "--json"]).stdout)
            if one["name"] == subject.name
        )
        assert line["guard"] == "watching" and line["host"] > 0 and line["until"] < 3
        kill(subject)
        after = recovered(site.a, subject.name, 1)
        recovery = after["recoveries"][0]
        assert 0 <= recovery["lost"] < 10 and recovery["down"] < 20
        now = subject.wait(1)
        assert now["boot"] == before["boot"] and now["memory_sha256"] == before["memory_sha256"]
        assert now["count"] < crashed["count"] + 60
        assert (
            site.a.sh(f"podman ps -a --format '{{{{.Names}}}}' | grep -c ^{subject.name}-crashed-").strip()
            == "1"
        )
        until(site.a, subject.name, lambda s: s["taken"] > first["taken"] + 1)
        site.a.run(["podman", "stop", "--time=0", subject.name])
        assert process.wait(20) == 0
    assert state(site.a, subject.name)["phase"] == "stopped" and subject.status == "exited"
    site.a.run(["cryoci", "guard", "stop", subject.name, "--remove"])
    assert site.a.sh("ls /var/lib/cryoci/guard").strip() == ""
    site.a.sh(f"podman rm -f $(podman ps -aq --filter name=^{subject.name}-crashed)")
    subject.remove()


def test_one_that_crashes_at_once_is_not_tried_again(site: Site) -> None:
    """Bare, in memory: crash after crash leads to older checkpoints, then the guard gives up with all kept."""
    subject = site.subject(BARE)
    before = subject.start()
    with guarding(site.a, subject.name, "--every", "1h", "--to", "tmpfs", "--stable", "1h") as process:
        until(site.a, subject.name, lambda s: s["taken"] == 1)
        site.a.run(["cryoci", "guard", "stop", subject.name])
        assert process.wait(20) == 128 + 15
    runs_on(before, subject.wait(before["count"] + 1))  # a guard that ends leaves it running
    with guarding(site.a, subject.name, "--every", "1s", "--to", "tmpfs", "--stable", "1h"):
        until(site.a, subject.name, lambda s: s["taken"] == 2)
    with guarding(site.a, subject.name, "--every", "1h", "--to", "tmpfs", "--stable", "1h") as process:
        subject.restored = True
        for crashes in (1, 2):
            until(site.a, subject.name, lambda s: bool(s["alive"]))
            kill(subject)
            now = recovered(site.a, subject.name, crashes)
            assert now["recoveries"][-1]["number"] == 3 - crashes
            assert subject.wait(1)["boot"] == before["boot"]
        kill(subject)
        assert process.wait(20) == 1
        assert process.stdout and b"none of its 2 checkpoints holds" in process.stdout.read()
    lost = state(site.a, subject.name)
    assert lost["phase"] == "lost" and [kept["suspect"] for kept in lost["kept"]] == [True, True]
    assert site.a.sh(f"ls /run/cryoci/guard/{subject.name}").split() == ["1", "2"]
    site.a.run(["cryoci", "guard", "stop", subject.name, "--remove"])
    subject.remove()


def test_a_killed_guard_goes_on_where_it_was(site: Site) -> None:
    """The guard and then the container are killed; the next guard brings back what a registry holds, encrypted."""
    subject = site.subject(PODMAN)
    before = subject.start()
    key = site.a.sh("cryoci keygen --seal /etc/cryoci/guard.txt").strip()
    words = ("--every", "1h", "--to", f"{site.registry}/guarded", "--encrypt-to", key)
    assert "nothing could be restored" in failing(site.a, ["cryoci", "guard", subject.name, *words])
    site.a.sh("mkdir -m 0700 -p /etc/cryoci/decrypt && mv /etc/cryoci/guard.txt /etc/cryoci/decrypt/guard")
    with guarding(site.a, subject.name, *words):
        taken = until(site.a, subject.name, lambda s: s["taken"] == 1)
        shown = json.loads(site.a.run(["cryoci", "inspect", "--json", taken["kept"][0]["where"]]).stdout)
        assert all(layer["media_type"].endswith("+encrypted") for layer in shown["layers"])
        said = failing(site.a, ["cryoci", "guard", subject.name, *words])
        assert "is guarded already" in said
        site.a.run(["kill", "-KILL", str(state(site.a, subject.name)["pid"])])
    assert not state(site.a, subject.name)["alive"]
    kill(subject)
    while subject.status == "running":
        time.sleep(0.1)
    with guarding(site.a, subject.name, *words):
        recovered(site.a, subject.name, 1)
        assert subject.wait(1)["boot"] == before["boot"]
        # moved away by a checkpoint that ends it: that is no crash
        subject.checkpoint("moved:1")
        until(site.a, subject.name, lambda s: s["phase"] == "moved")
    site.a.sh("rm /etc/cryoci/decrypt/guard")
    subject.remove()
    site.a.sh(f"podman rm -f $(podman ps -aq --filter name=^{subject.name}-crashed)")


def test_what_would_fight_with_a_guard_is_refused(site: Site) -> None:
    subject = site.subject(PODMAN)
    subject.start()
    assert "--to nowhere is no place" in failing(
        site.a, ["cryoci", "guard", subject.name, "--to", "nowhere"]
    )
    assert "for bare containers" in failing(site.a, ["cryoci", "guard", subject.name, "--rootfs", "none"])
    subject.remove()
    assert "no container" in failing(site.a, ["cryoci", "guard", subject.name])
    assert "never guarded" in failing(site.a, ["cryoci", "guard", "status", "nobody"])


def test_beside_podmans_restart_policy(site: Site) -> None:
    """One of the two brings it back: podman from scratch, the guard only taking checkpoints; or the guard."""
    node, subject = site.a, site.subject(PODMAN)
    before = subject.start(options=("--restart=always",))
    assert "podman update --restart=no" in failing(node, ["cryoci", "guard", subject.name])
    with guarding(node, subject.name, "--every", "1s", "--on-failure", "none") as process:
        until(node, subject.name, lambda s: s["taken"] >= 1)
        kill(subject)
        taken = state(node, subject.name)["taken"]
        until(node, subject.name, lambda s: s["taken"] > taken + 1)  # of the new one
        assert subject.wait(1)["boot"] != before["boot"]
        node.run(["cryoci", "guard", "stop", subject.name, "--remove"])
        assert process.stdout and b"was restarted by somebody else" in process.stdout.read()
    fresh = subject.wait(1)
    node.run(["podman", "update", "--restart=no", subject.name])
    with guarding(node, subject.name, "--every", "1s"):
        until(node, subject.name, lambda s: s["taken"] >= 1)
        kill(subject)
        recovered(node, subject.name, 1)
        assert subject.wait(1)["boot"] == fresh["boot"]
    node.run(["cryoci", "guard", "stop", subject.name, "--remove"])
    subject.remove()
    node.sh(f"podman rm -f $(podman ps -aq --filter name=^{subject.name}-crashed)")


@pytest.mark.parametrize("place", ["disk", "registry"])
def test_incremental_checkpoints_write_little_and_come_back(site: Site, place: str) -> None:
    """podman by cryoci-runtime: memory that does not change is there once; a crash comes back from shared files."""
    site.a.write(CONFIG, '[memory]\nengine = "parallel"\nthreshold = "1M"\nchunk = "8M"\n')
    subject = site.subject(KINDS["podman+cryoci-runtime"])
    before = subject.start("--memory-mib=40")
    to = "disk" if place == "disk" else f"{site.registry}/guarded-{subject.name}"
    words = ("--every", "2s", "--keep", "2", "--to", to, "--incremental")
    with guarding(site.a, subject.name, *words):
        first = until(site.a, subject.name, lambda s: s["taken"] >= 3)
        assert all(kept["shared"] > 30 << 20 for kept in first["kept"][-2:]), first
        kill(subject)
        after = recovered(site.a, subject.name, 1)
        runs_on(before, subject.wait(before["count"] + 1))
        later = until(site.a, subject.name, lambda s: s["taken"] > after["taken"])
        assert later["kept"][-1]["shared"] > 30 << 20  # with what it was restored from
    runs_on(before, subject.wait(before["count"] + 3))
    site.a.run(["cryoci", "guard", "stop", subject.name, "--remove"])
    subject.remove()
    site.a.sh(f"podman rm -f -t 0 $(podman ps -aq --filter name={subject.name}-crashed) && rm {CONFIG}")


def test_incremental_needs_memory_out_of_band(site: Site) -> None:
    subject = site.subject(BARE)
    subject.start()
    site.a.sh(f"rm -f {CONFIG}")
    with guarding(site.a, subject.name, "--every", "1s", "--incremental"):
        told = until(site.a, subject.name, lambda s: s["failed"] >= 1)
        assert "memory out of band" in told["message"]
    subject.remove()
