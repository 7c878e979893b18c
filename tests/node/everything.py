# SPDX-License-Identifier: Apache-2.0
"""A podman container with a bit of everything that engines add to one, and whether all of it is still there."""

from __future__ import annotations

import json
from typing import Any

from tests.node import commands
from tests.node.subject import CONFIG, TMPFS, Kind, Subject, runs_on
from tests.nodes import tree, workload
from tests.nodes.node import Node

PORT = 18765
VOLUME = "everything"
INIT = "/usr/libexec/podman/catatonit"
PODMAN = ["podman", "--runtime=cryoci-runtime"]
OPTIONS = (
    "--tty", "--interactive", f"--publish=127.0.0.1:{PORT}:{workload.PORT}", f"--volume={VOLUME}:/data",
    "--health-cmd=test -s /data/count.log", "--health-interval=disable", "--read-only", "--hostname=box",
    "--security-opt=seccomp=/srv/seccomp.json", "--cap-drop=SYS_CHROOT", "--ulimit=nofile=999:999",
)  # fmt: skip


def give_init(node: Node) -> None:
    """Debian's catatonit, which `podman run --init` puts before the container's program; podman only suggests it."""
    package = "catatonit"
    made = tree.cached(
        f"init-{tree.digest([tree.SUITE, package])}",
        lambda path: tree.mmdebstrap(path, [package], variant="extract"),
    )
    node.write(INIT, (made / "usr/bin/catatonit").read_bytes(), mode=0o755)


class Container:
    """The counter with a terminal, a published port, a named volume, a health check, limits, seccomp and all."""

    def __init__(self, node: Node, below: str, image: str, options: tuple[str, ...] = ()) -> None:
        self.options = (*OPTIONS, *options)
        self.subject = Subject(node, Kind("podman", "cryoci-runtime", below), f"everything-{below}", image)
        self.first: dict[str, Any] = {}
        self._settle()

    @property
    def node(self) -> Node:
        return self.subject.node

    def start(self) -> None:
        self.first = self.subject.start(options=self.options)
        self.check()

    def check(self) -> None:
        """It runs on, is reached by its port, and is held as it was."""
        node, subject = self.node, self.subject
        seen = workload.wait(node, 1, port=PORT)
        after = workload.wait(node, seen["count"] + 2, port=PORT)
        if seen["count"] > self.first["count"] + 3:
            runs_on(self.first, after)
        assert after["hostname"] == "box"
        node.run([*PODMAN, "healthcheck", "run", subject.name])
        status = node.read(f"/proc/{subject.pid}/status").decode()
        assert "Seccomp:\t2\n" in status
        assert f"count {after['count']}" in node.sh(f"podman logs {subject.name}")
        result = node.run([*PODMAN, "exec", subject.name, "mkdir", f"{TMPFS}/x"], check=False)
        assert result.returncode == 1 and b"not permitted" in result.stderr  # by the seccomp profile
        result = node.run([*PODMAN, "exec", subject.name, "touch", "/x"], check=False)
        assert result.returncode == 1 and b"Read-only" in result.stderr

    def stop_and_restore_in_place(self) -> None:
        """podman's own verbs, with the images kept and statistics."""
        for verb, number in (("checkpoint", "pages_written"), ("restore", "pages_restored")):
            said = self.node.run(
                [*PODMAN, "container", verb, "--keep", "--print-stats", self.subject.name]
            ).stdout
            assert json.loads(said)["container_statistics"][0]["criu_statistics"][number] > 0
        self.check()

    def travel(self, there: Node | None = None) -> None:
        """podman's archive, restored `there`, or here as on a node that has never seen the container."""
        archive = f"/srv/{self.subject.name}.tar"
        self.node.run([*PODMAN, "container", "checkpoint", f"--export={archive}", self.subject.name])
        packed = self.node.read(archive)
        self.node.run(["rm", archive])
        self._move(there)
        self.node.write(archive, packed)
        self.node.run([*PODMAN, "container", "restore", f"--import={archive}"])
        self.node.run(["rm", archive])
        self.check()

    def recreate(self, reference: str = "", there: Node | None = None) -> None:
        """cryoci's checkpoint, and an annotated create."""
        subject, reference = self.subject, reference or f"{self.subject.name}:1"
        subject.checkpoint(reference, "--volumes")
        self._move(there)
        words = [*self.options, f"--tmpfs={TMPFS}", f"--annotation=io.cryoci.restore={reference}"]
        argv = [*PODMAN, "run", "--detach", f"--name={subject.name}", *words, subject.image, "sleep", "9"]
        self.node.run(argv, timeout=120)
        self.check()

    def remove(self) -> None:
        """Stop it, see its exit status, and leave nothing."""
        self.node.run([*PODMAN, "stop", "--time=20", self.subject.name])
        status = self.node.sh(f"podman inspect --format={{{{.State.ExitCode}}}} {self.subject.name}")
        assert status.strip() == "0"
        self._forget()
        self.node.run(["rm", "-f", CONFIG])

    def _settle(self) -> None:
        """What the node has before the container: the runtime below, and the profile that podman is told of."""
        self.node.write(CONFIG, f'[runtime]\npath = "{self.subject.kind.below}"\n')
        self.node.write("/srv/seccomp.json", commands.SECCOMP)

    def _move(self, there: Node | None) -> None:
        self._forget()
        if there is not None:
            self.node.run(["rm", "-f", CONFIG])
            self.subject = self.subject.on(there)
            self._settle()

    def _forget(self) -> None:
        self.subject.remove()
        self.node.run(["podman", "volume", "rm", VOLUME], check=False)
