# SPDX-License-Identifier: Apache-2.0
"""A test node of either kind: run commands in it, read and write its files, cut its network, kill it."""

from __future__ import annotations

import abc
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}
Result = subprocess.CompletedProcess[bytes]
Words = Sequence[str | os.PathLike[str]]


class NodeError(AssertionError):
    """A command in a node failed, or gave no answer; the message has its output and a line to paste."""


class Node(abc.ABC):
    """What both kinds of node can do. `address` is how the cluster's other nodes reach it (IPv4)."""

    name: str
    address: str

    def run(
        self,
        argv: Words,
        *,
        check: bool = True,
        input: bytes | None = None,
        timeout: float | None = 60,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a command as root in the node and wait; `env` is added to a clean environment.

        `timeout` is in seconds. Raises NodeError on a nonzero status (with `check`) or a timeout.
        """
        words = [os.fspath(a) for a in argv]
        try:
            result = self._execute(words, input, timeout, {**ENVIRONMENT, **(env or {})})
        except subprocess.TimeoutExpired as e:
            said = b"\n".join(x for x in (e.stderr, e.stdout) if x)
            raise NodeError(self._describe(words, f"gave no answer within {timeout:g} s", said)) from None
        if check and result.returncode != 0:
            what = f"ended with status {result.returncode}"
            raise NodeError(self._describe(words, what, result.stderr + result.stdout))
        return result

    def sh(self, script: str, *args: str, check: bool = True, timeout: float | None = 60) -> str:
        """Run a shell script (`set -eu`; `args` are $1...) and return its stdout as text."""
        argv = ["/bin/sh", "-euc", script, "sh", *args]
        return self.run(argv, check=check, timeout=timeout).stdout.decode()

    def read(self, path: str) -> bytes:
        """The bytes of a file in the node. Raises NodeError when it is not there."""
        return self.run(["cat", "--", path]).stdout

    def write(self, path: str, data: bytes | str, *, mode: int = 0o644) -> None:
        """Write a file in the node, with its parent directories."""
        raw = data.encode() if isinstance(data, str) else data
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"'
        self.run(["/bin/sh", "-c", script, "sh", path, f"{mode:o}"], input=raw)

    @property
    @abc.abstractmethod
    def alive(self) -> bool:
        """Whether the node runs."""

    @abc.abstractmethod
    def cut(self) -> None:
        """Cut the node's network: its cable is out, its addresses stay."""

    @abc.abstractmethod
    def join(self) -> None:
        """Undo `cut`."""

    @abc.abstractmethod
    def kill(self) -> None:
        """Kill the node dead, as a power cut does; a second time does nothing."""

    @abc.abstractmethod
    def _execute(
        self, argv: list[str], input: bytes | None, timeout: float | None, env: Mapping[str, str]
    ) -> Result:
        """Run and wait. Raises subprocess.TimeoutExpired, the command then being dead."""

    @abc.abstractmethod
    def _by_hand(self) -> str:
        """The words before a command line that run it in this node from a shell of the host."""

    def _describe(self, argv: Sequence[str], what: str, said: bytes) -> str:
        line = shlex.join(argv)
        text = said.decode(errors="replace").strip()[-4000:]
        return f"node {self.name}: {line}\n{what}\n{text}\n  by hand: {self._by_hand()} {line}"
