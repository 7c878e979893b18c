# SPDX-License-Identifier: Apache-2.0
"""Trouble for a node under test, and the proof that it did no harm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.node.conftest import Site
from tests.node.subject import KINDS, Kind, Subject, leftovers, runs_on
from tests.nodes.namespace import NamespaceNode

SHIM = KINDS["podman+cryoci-runtime"]
CRIU = "/usr/sbin/criu"


@contextmanager
def unharmed(subject: Subject) -> Iterator[None]:
    """The block makes a checkpoint fail: the container runs on as it did, and nothing new is on its node."""
    before, left = subject.ask(), leftovers(subject.node)
    yield
    after = subject.wait(before["count"] + 3)
    runs_on(before, after)
    assert after["peer"] in (None, "open")
    assert subject.status == "running"
    assert leftovers(subject.node) == left


@contextmanager
def nothing_left(node: NamespaceNode) -> Iterator[None]:
    """The block makes a restore (or pull) fail: the node is as it was before."""
    left = leftovers(node)
    yield
    assert leftovers(node) == left


@contextmanager
def cable_out(node: NamespaceNode) -> Iterator[None]:
    """Its network is cut. The kernel looks for a neighbour three times at each try to connect, not seconds apart."""
    interval = "/proc/sys/net/ipv4/neigh/eth0/retrans_time_ms"
    node.sh(f"echo 100 >{interval}")
    node.cut()
    try:
        yield
    finally:
        node.join()
        node.sh(f"echo 1000 >{interval}")


@contextmanager
def running(site: Site, kind: Kind, *args: str, **options: Any) -> Iterator[Subject]:
    subject = site.subject(kind)
    subject.start(*args, **options)
    yield subject
    subject.remove()


@contextmanager
def without_criu(node: NamespaceNode, instead: str | None = None) -> Iterator[None]:
    """No criu on the node, or a script in its place."""
    node.run(["mv", CRIU, f"{CRIU}.away"])
    try:
        if instead is not None:
            node.write(CRIU, instead, mode=0o755)
        yield
    finally:
        node.run(["mv", f"{CRIU}.away", CRIU])


@contextmanager
def small_disk(node: NamespaceNode, kib: int) -> Iterator[str]:
    """A file system of `kib` KiB."""
    node.sh(f"mkdir -p /srv/small && mount -t tmpfs -o size={kib}k small /srv/small")
    try:
        yield "/srv/small"
    finally:
        node.sh("umount /srv/small && rmdir /srv/small")


def argv(subject: Subject, target: str | None = None, *words: str) -> list[str]:
    return ["cryoci", "checkpoint", subject.name, "--output", target or f"{subject.name}:1", *words]


OLD = "#!/bin/sh\necho Version: 3.15\n"
