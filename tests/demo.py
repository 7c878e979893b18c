# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a container is checkpointed on one machine and runs on, at the next count, on another.

Two machines and a registry are test nodes of this host. Every step is probed; the first probe that fails
ends the demo with a nonzero status.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import Any

from cryoci.errors import CryociError
from tests.nodes import host, workload
from tests.nodes.cluster import Cluster
from tests.nodes.node import Node, NodeError

NAME = "counter"


class ProbeError(Exception):
    """A step reported success, but what it should have done is not there."""


def say(text: str) -> None:
    print(text, flush=True)


def step(node: Node, *words: str) -> str:
    """Run and show one command as a user would type it; returns its stdout."""
    say(f"\n[{node.name}] $ {' '.join(words)}")
    started = time.monotonic()
    result = node.run(list(words), timeout=120)
    said = result.stdout.decode().rstrip()
    for line in said.splitlines():
        say(f"    {line}")
    say(f"    ({time.monotonic() - started:.2f} s)")
    return said


def probe(what: str, holds: bool, seen: object) -> None:
    """Show one observation. Raises ProbeError when it is not as it must be."""
    say(f"    {'ok' if holds else 'FAILED'}: {what} ({seen})")
    if not holds:
        raise ProbeError(f"{what}: {seen}")


def ask(node: Node) -> dict[str, Any]:
    """The counter's own word, over the network of its container."""
    pid = int(json.loads(node.run(["podman", "container", "inspect", NAME]).stdout)[0]["State"]["Pid"])
    return workload.ask(node, pid=pid)


def same_process(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Probe that `after` is a later moment of the process that said `before`."""
    probe(
        "it runs on from its count",
        after["count"] >= before["count"],
        f"{before['count']} -> {after['count']}",
    )
    probe("it never started anew", after["boot"] == before["boot"], f"token {after['boot']}")
    probe("its child counts on", after["child"] >= before["child"], f"{before['child']} -> {after['child']}")
    probe(
        "its memory is the same",
        after["memory_sha256"] == before["memory_sha256"],
        after["memory_sha256"][:12],
    )
    file = after["open_file"]
    probe(
        "its open file goes on",
        file["position"] == file["size"] > 0,
        f"{file['path']} at {file['position']}",
    )


def why_nodes() -> str:
    """One line: does this host's own CRIU work, and where the demo runs."""
    criu = shutil.which("criu", path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin")
    if criu is None:
        return "this host has no CRIU; the demo runs in its node tree (Debian trixie, own CRIU)"
    checked = subprocess.run([criu, "check"], capture_output=True, text=True)
    if checked.returncode == 0:
        return "this host's CRIU works; the demo still needs two machines, so it runs in its node tree"
    reason = (checked.stderr.strip().splitlines() or ["criu check failed"])[0]
    return f"this host's CRIU does not work ({reason}); the demo runs in its node tree (Debian trixie)"


def demo() -> None:
    say(why_nodes())
    with Cluster(tag="demo") as cluster:
        one, two = cluster.start("one"), cluster.start("two")
        registry = cluster.registry(cluster.start("registry"))
        say(f"two machines, one ({one.address}) and two ({two.address}), and a registry at {registry}")
        image, checkpoint = f"{registry}/{NAME}:1", f"{registry}/checkpoints/{NAME}:1"
        workload.push(one, image)

        say("\n-- a container with a counter, an open file, a child process and a TCP listener")
        step(
            one, "podman", "run", "--detach", "--quiet", "--runtime=cryoci-runtime", f"--name={NAME}", image
        )
        time.sleep(1.5)
        before = ask(one)
        say(f"    it counts: {before['count']}")

        say("\n-- checkpoint it, package it, push it; it ends once the registry has every byte")
        step(one, "cryoci", "checkpoint", NAME, "--output", checkpoint)
        state = (
            one.run(["podman", "ps", "--all", "--format={{.Names}}: {{.Status}}"]).stdout.decode().strip()
        )
        probe("it has ended on machine one", "Exited" in state, state)
        step(two, "cryoci", "inspect", checkpoint)

        say("\n-- machine two has never seen it, nor its base image")
        held = (
            two.run(["podman", "ps", "--all", "--quiet"]).stdout + two.run(["podman", "images", "-q"]).stdout
        )
        probe("nothing is there", not held, held.decode().strip() or "no container, no image")
        step(two, "cryoci", "restore", checkpoint, "--detach")
        same_process(before, ask(two))
        later = workload.wait(two, before["count"] + 20, pid=_pid(two))
        probe("and it goes on counting", later["count"] >= before["count"] + 20, later["count"])
        step(two, "podman", "ps")
        known = cluster.id
    left = host.leftovers(known)
    say("")
    probe(
        "nothing is left of the machines",
        not left,
        "; ".join(left) or "no process, mount, namespace, cgroup",
    )
    say(
        f"\nThe container that started on machine one runs on machine two: {before['count']} -> {later['count']}."
    )


def _pid(node: Node) -> int:
    return int(json.loads(node.run(["podman", "container", "inspect", NAME]).stdout)[0]["State"]["Pid"])


def main() -> int:
    started = time.monotonic()
    try:
        demo()
    except (ProbeError, NodeError, CryociError) as e:
        say(f"\nThe demo failed: {e}")
        return 1
    say(f"All of it took {time.monotonic() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
