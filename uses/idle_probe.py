# SPDX-License-Identifier: Apache-2.0
"""Is a container used? Its GPUs, its connections, its Jupyter kernels and its CPU time say so.

Each look tells what has happened since the one before. A connection between two processes of the container (a notebook
server and its kernels) is no use of it.
"""

from __future__ import annotations

import calendar
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryoci.errors import ConfigError, CryociError, UnsupportedError
from cryoci.shim import netns
from cryoci.shim.gpu import nvml, tasks
from cryoci.shim.gpu.nvml import Busy

SIGNALS = ("gpu", "traffic", "jupyter", "cpu")
_SECONDS = 5.0  # that Jupyter has for an answer
_LARGEST = 1 << 20  # bytes of an answer
_TICKS = os.sysconf("SC_CLK_TCK")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(?:Z|\+00:00)", re.ASCII)
_ESTABLISHED, _INFO = 1 << 1, 1 << 1  # TCP_ESTABLISHED; INET_DIAG_INFO - 1 (linux/inet_diag.h)
Address = tuple[str, int]


@dataclass(frozen=True)
class Connection:
    """An established TCP connection: what it is called by the kernel, its two ends, and bytes in both directions."""

    cookie: int
    inode: int
    here: Address
    there: Address
    carried: int


@dataclass(frozen=True)
class Jupyter:
    """A Jupyter server on `port` of the container's loopback; `token_file` holds its token (None: it has none)."""

    port: int
    token_file: Path | None = None


@dataclass(frozen=True)
class Gpus:
    """What NVML says of all GPUs of this node at one moment: how busy they were, and who has a context on them."""

    busy: dict[str, Busy] = field(default_factory=dict)
    used_by: dict[int, dict[str, int]] = field(default_factory=dict)


def gpus(since: float) -> Gpus:
    """One look at all GPUs, at their work after `since` (Unix time); empty without NVIDIA's driver."""
    try:
        with nvml.opened() as management:
            return Gpus(management.busy(since), management.used_by())
    except CryociError:
        return Gpus()


@dataclass
class Watch:
    """Looks at one container. It is used when a GPU or a CPU works for it for at least so many percent of the time.

    CPU time counts only without CUDA: a process that waits for its GPU spins.
    """

    gpu_percent: float = 5.0
    cpu_percent: float = 5.0
    ignored: frozenset[str] = frozenset()
    jupyter: Jupyter | None = None
    _of: int = 0
    _carried: dict[int, int] = field(default_factory=dict)
    _opened: int = 0
    _cpu: tuple[float, float] = (0.0, 0.0)
    _asked: int = 0
    _kernel_time: float = field(default_factory=time.time)

    def look(self, pid: int, seen: Gpus) -> str:
        """Why the container whose first process is `pid` counts as used since the last look, "" when it does not.

        Blocks for some milliseconds. Raises CryociError, OSError when it cannot be told.
        """
        first, self._of = self._of != pid, pid
        members = tasks.members(pid)
        cuda = any(one in seen.used_by for one in members)
        found = [self._gpu(members, seen)] if cuda and "gpu" not in self.ignored else []
        if "traffic" not in self.ignored:
            found.append(self._traffic(pid, members, first))
        if not cuda and "cpu" not in self.ignored:
            found.append(self._cpu_time(members, first))
        if self.jupyter is not None and "jupyter" not in self.ignored:
            found.append(self._kernels(pid, self.jupyter))
        return next((why for why in found if why), "")

    def _gpu(self, members: Sequence[int], seen: Gpus) -> str:
        uuids = {uuid for one in members for uuid in seen.used_by.get(one, {})}
        most = 0
        for uuid in uuids & set(seen.busy):
            busy = seen.busy[uuid]
            if busy.by is not None:
                most = max(most, *(busy.by.get(one, 0) for one in members))
            elif busy.whole is not None:  # it may be somebody else's work: then this container waits too
                most = max(most, busy.whole)
            else:
                raise UnsupportedError(
                    f"{uuid} does not say how busy it is, as GPUs in MIG mode do not",
                    hint="watch the other signals: --ignore gpu",
                )
        return f"GPU {most} %" if most >= self.gpu_percent else ""

    def _traffic(self, pid: int, members: Sequence[int], first: bool) -> str:
        here, opened = outer(connections(pid), sockets(members)), passive_opens(pid)
        carried = {one.cookie: one.carried for one in here}
        moved = sum(amount - self._carried.get(cookie, 0) for cookie, amount in carried.items())
        fresh = max(0, opened - self._opened - self._asked)  # those that have come and gone, too
        self._carried, self._opened, self._asked = carried, opened, 0
        if first or not (moved > 0 or fresh):
            return ""
        if moved > 0:
            return f"{moved} bytes in {len(carried)} connection{'' if len(carried) == 1 else 's'}"
        return f"{fresh} new connection{'' if fresh == 1 else 's'}"

    def _cpu_time(self, members: Sequence[int], first: bool) -> str:
        before, self._cpu = self._cpu, (time.monotonic(), cpu_seconds(members))
        passed = self._cpu[0] - before[0]
        percent = (self._cpu[1] - before[1]) / passed * 100 if passed > 0 else 0.0
        return f"CPU {percent:.0f} %" if not first and percent >= self.cpu_percent else ""

    def _kernels(self, pid: int, server: Jupyter) -> str:
        self._asked += 1  # its own question is no use
        for kernel in kernels(pid, server):
            if kernel.busy:
                return f"kernel {kernel.id[:8]} is busy"
            if kernel.last > self._kernel_time:
                self._kernel_time = kernel.last
                return f"kernel {kernel.id[:8]} was used"
        return ""


@dataclass(frozen=True)
class Kernel:
    """A kernel of a Jupyter server; `last` is when it was used (Unix time)."""

    id: str
    busy: bool
    last: float


def kernels(pid: int, server: Jupyter) -> list[Kernel]:
    """The kernels of the Jupyter server in the container of `pid`. Raises UnsupportedError, ConfigError, OSError."""
    headers = {"Connection": "close"}
    if server.token_file is not None:
        headers["Authorization"] = f"token {read_token(server.token_file)}"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_SECONDS)
    made = netns.within(pid, lambda: socket.create_connection(("127.0.0.1", server.port), _SECONDS))
    connection.sock = made
    late = threading.Timer(_SECONDS, made.shutdown, [socket.SHUT_RDWR])  # one that drips would hold up all
    late.start()
    try:
        connection.request("GET", "/api/kernels?no_track_activity=1", headers=headers)
        answer = connection.getresponse()
        body = answer.read(_LARGEST + 1)
    except http.client.HTTPException as e:
        raise UnsupportedError(
            f"what answers on port {server.port} is no HTTP server: {type(e).__name__}"
        ) from e
    finally:
        late.cancel()
        connection.close()
    if answer.status != 200:
        raise UnsupportedError(
            f"Jupyter on port {server.port} answers {answer.status} to /api/kernels",
            hint="give its token: --jupyter-token NAME=FILE" if answer.status in (401, 403) else None,
        )
    return parse_kernels(body)


def parse_kernels(body: bytes) -> list[Kernel]:
    """The answer of /api/kernels. Raises UnsupportedError."""
    try:
        if len(body) > _LARGEST:
            raise ValueError("it is too long")
        found = []
        for one in json.loads(body):
            stamp = _STAMP.fullmatch(one["last_activity"])
            if stamp is None:
                raise ValueError("last_activity is no time")
            last = calendar.timegm(time.strptime(stamp[1], "%Y-%m-%dT%H:%M:%S"))
            found.append(Kernel(str(one["id"])[:64], one["execution_state"] == "busy", float(last)))
        return found
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UnsupportedError(
            f"that is no answer of a Jupyter server: {e}", hint="see the port after --jupyter"
        ) from e


def read_token(file: Path) -> str:
    """What a file of --jupyter-token holds. Raises ConfigError."""
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise ConfigError(
            f"the token of Jupyter cannot be read: {file}: {why}", hint="write it into that file"
        ) from e
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{file} holds no token", hint="one line of printable characters")
    return token


def connections(pid: int) -> list[Connection]:
    """The established TCP connections in the network namespace of `pid` (sock_diag(7)). Raises OSError."""
    from pyroute2 import DiagSocket

    def ask() -> list[Connection]:
        found = []
        with DiagSocket() as diag:
            diag.bind()
            for family in (socket.AF_INET, socket.AF_INET6):
                for one in diag.get_sock_stats(family=family, states=_ESTABLISHED, extensions=_INFO):
                    info = one.get_attr("INET_DIAG_INFO")
                    carried = info["tcpi_bytes_acked"] + info["tcpi_bytes_received"] if info else 0
                    found.append(
                        Connection(
                            one["idiag_cookie"],
                            one["idiag_inode"],
                            (_plain(one["idiag_src"]), one["idiag_sport"]),
                            (_plain(one["idiag_dst"]), one["idiag_dport"]),
                            carried,
                        )
                    )
        return found

    return netns.within(pid, ask)


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")  # IPv4 on a socket for both


def outer(found: Sequence[Connection], inodes: set[int]) -> list[Connection]:
    """Those of the sockets `inodes` that lead out of the container."""
    own = [one for one in found if one.inode in inodes]
    ends = {(one.here, one.there) for one in own}
    return [one for one in own if (one.there, one.here) not in ends]


def sockets(members: Sequence[int]) -> set[int]:
    """Inodes of the sockets that these processes hold open."""
    found = set()
    for pid in members:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for name in names:
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found


def passive_opens(pid: int) -> int:
    """How many TCP connections the network of `pid` has accepted; 0 when that is this node's own."""
    if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
        return 0
    names, values = (
        line.split()
        for line in Path(f"/proc/{pid}/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    )
    return int(dict(zip(names, values, strict=True))["PassiveOpens"])


def cpu_seconds(members: Sequence[int]) -> float:
    """CPU time that these processes have used, in seconds (proc_pid_stat(5))."""
    total = 0
    for pid in members:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS
