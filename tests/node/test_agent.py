# SPDX-License-Identifier: Apache-2.0
"""`cryoci agent`: real archives in a kubelet's directory become images that restore elsewhere."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, failing, runs_on
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

DIRECTORY = "/var/lib/kubelet/checkpoints"
STATE = "/var/lib/cryoci/agent/state.json"


def named(second: int, pod: str = "web") -> str:
    """A name as the kubelet gives them."""
    return f"checkpoint-{pod}_shop-app-2026-01-02T03:04:{second:02d}Z.tar"


def until(
    node: NamespaceNode, true: Callable[[dict[str, Any]], bool], seconds: float = 40
) -> dict[str, Any]:
    """The agent's archives, once it is so."""
    end, archives = time.monotonic() + seconds, dict[str, Any]()
    while time.monotonic() < end:
        if node.run(["test", "-e", STATE], check=False).returncode == 0:
            archives = dict(json.loads(node.read(STATE))["archives"])
            if true(archives):
                return archives
        time.sleep(0.2)
    raise AssertionError(f"not so within {seconds} s: {archives}")


@contextmanager
def agent(node: NamespaceNode, to: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """An agent for the time of a with block, with the rights of its DaemonSet; it is killed."""
    confined = ["setpriv", "--no-new-privs", "--bounding-set=-all,+dac_override"]
    argv = [*confined, "cryoci", "agent", "--to", to, "--settle", "500ms", *words]
    process = node.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            print(process.stdout.read().decode())
            process.stdout.close()


def test_archives_become_images(site: Site) -> None:
    subject = site.subject(KINDS["podman+runc"])
    before = subject.start()
    site.a.run(["mkdir", "-p", DIRECTORY])
    export = ["podman", "container", "checkpoint", "--leave-running", "--compress=none"]
    site.a.run([*export, "--export=/srv/export.tar", subject.name])
    subject.remove()
    repository = f"{site.registry}/kubelet"
    with agent(site.a, repository):
        # a writer that takes its time, and a file that is no archive of the kubelet's
        site.a.sh(
            f"echo no > {DIRECTORY}/notes.txt; head -c 1000000 /srv/export.tar > {DIRECTORY}/{named(1)}"
        )
        for _ in range(4):
            site.a.sh(f"head -c 300000 /srv/export.tar >> {DIRECTORY}/{named(1)}")
            time.sleep(0.3)
        site.a.sh(f"cp /srv/export.tar {DIRECTORY}/{named(1)}")
        site.a.sh(f"head -c 3000000 /srv/export.tar > {DIRECTORY}/{named(2, 'broken')}")
        known = until(site.a, lambda a: bool(a.get(named(1), {}).get("digest")) and named(2, "broken") in a)
        broken = until(site.a, lambda a: bool(a[named(2, "broken")]["problem"]))[named(2, "broken")]
        assert broken["digest"] == "" and broken["attempts"] >= 1
    site.a.sh(
        "mkdir /srv/keys && cd /srv/keys && COSIGN_PASSWORD=pw cosign generate-key-pair && echo pw > password"
    )
    key = ("--sign-key", "/srv/keys/cosign.key", "--password-file", "/srv/keys/password")
    with agent(site.a, repository, "--keep", "1", "--node", "n1", *key):  # killed, and started again
        site.a.sh(f"cp /srv/export.tar {DIRECTORY}/{named(3)}")
        after = until(site.a, lambda a: bool(a.get(named(3), {}).get("signed")) and named(1) not in a)
    for digest in (known[named(1)]["digest"], after[named(3)]["digest"]):
        words = ["--key", "/srv/keys/cosign.pub", "--insecure-ignore-tlog=true", "--allow-http-registry"]
        site.a.run(["cosign", "verify", *words, f"{repository}@{digest}"])
    site.a.run(["rm", STATE])
    with agent(site.a, repository):  # what it has forgotten it does again, to the same digest
        again = until(site.a, lambda a: bool(a.get(named(3), {}).get("digest")))
        assert again[named(3)]["digest"] == after[named(3)]["digest"] != known[named(1)]["digest"]
    left = set(site.a.sh(f"ls {DIRECTORY}").split())
    assert left == {named(3), named(2, "broken"), "notes.txt"}  # never what is not in the registry
    site.b.run(["podman", "pull", "--quiet", site.image])  # podman's own archive names no digest of its base
    there = subject.on(site.b)
    there.restore(f"{repository}:web_shop-app-2026-01-02T03-04-01Z")
    runs_on(before, there.wait(before["count"] + 2))
    there.remove()
    listed = json.loads(site.b.run(["kubectl-cryoci", "list", "web", "--from", repository, "--json"]).stdout)
    assert [one["name"] for one in listed] == [f"web_shop-app-2026-01-02T03-04-0{n}Z" for n in (1, 3)]


def test_wrong_words(site: Site) -> None:
    assert "no repository" in failing(site.a, ["cryoci", "agent", "--to", f"{site.registry}/a:1"])
    words = ["cryoci", "agent", "--to", f"{site.registry}/a", "--directory", "/nowhere"]
    assert "no directory /nowhere" in failing(site.a, words)
