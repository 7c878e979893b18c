# SPDX-License-Identifier: Apache-2.0
"""The network of a cluster: a bridge in a namespace that lives as long as one file descriptor does."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from cryoci.command import run, which
from cryoci.errors import UnsupportedError
from tests.nodes import defaults, host


class Switch:
    """A bridge that nodes are plugged into, at SUBNET.1; no way leads from it to the host or beyond."""

    def __init__(self) -> None:
        self._netns = _new_netns()
        try:
            gateway = f"{defaults.SUBNET}.1/16"
            self.ip("link set lo up", "link add bridge0 type bridge", f"addr add {gateway} dev bridge0")
            self.ip("link set bridge0 up")
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> str:
        """A path to the namespace, good while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._netns}"

    def ip(self, *commands: str) -> None:
        """Run `ip` commands in the switch's namespace. Raises ToolError."""
        _ip(self.path, commands)

    def plug(self, port: str, pid: int, address: str) -> None:
        """A veth pair from `port` to eth0 in the network namespace of `pid`."""
        self.ip(
            f"link add {port} type veth peer name eth0 netns {pid}", f"link set {port} master bridge0 up"
        )
        inside = ["link set lo up", f"addr add {address}/16 dev eth0", "link set eth0 up"]
        _ip(f"/proc/{pid}/ns/net", [*inside, f"route add default via {defaults.SUBNET}.1"])

    def tap(self, port: str) -> None:
        """A tap device `port` for a virtual machine that is started in this namespace."""
        self.ip(f"tuntap add {port} mode tap", f"link set {port} master bridge0 up")

    def close(self) -> None:
        """Let go of the namespace; the kernel removes it and every interface in it."""
        os.close(self._netns)


def _ip(netns: str, commands: Sequence[str]) -> None:
    enter = [which("nsenter", package="util-linux"), f"--net={netns}"]
    text = "".join(f"{c}\n" for c in commands).encode()
    run([*enter, which("ip", package="iproute2"), "-batch", "-"], input=text)


def _new_netns() -> int:
    """A descriptor of a new network namespace, made in a thread so that this process stays in its own."""
    made: list[int | OSError] = []

    def make() -> None:
        try:
            host.unshare_network()
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as e:
            made.append(e)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        hint = "run as root, with CAP_SYS_ADMIN"
        raise UnsupportedError(f"cannot make a network namespace: {made[0]}", hint=hint)
    return made[0]
