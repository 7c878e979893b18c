# SPDX-License-Identifier: Apache-2.0
"""A running container: what in it CRIU or the GPU driver cannot dump, found in /proc before it is frozen."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cryoci.shim.doctor.check import Check, Facts

GHOST_LIMIT = 1 << 20  # bytes; CRIU's default
# character devices that CRIU dumps by itself (criu/files.c): memory and terminals
_PLAIN = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)}
_TERMINALS = range(136, 144)
_ANON = {
    "[eventfd]",
    "[eventpoll]",
    "[signalfd]",
    "[timerfd]",
    "[pidfd]",
    "inotify",
    "[fanotify]",
}  # CRIU dumps them
# what the kernel calls the sockets that CRIU dumps (struct proto, name; criu/sockets.c)
_SOCKETS = frozenset(
    "TCP TCPv6 UDP UDPv6 UDP-Lite UDPLITEv6 RAW RAWv6 UNIX UNIX-STREAM NETLINK PACKET".split()
)
_PSEUDO = ("/proc", "/sys", "/dev")  # runtimes make mounts below them that the specification does not name


@dataclass(frozen=True)
class Fd:
    """One open file of process `pid`; `target` is what the link in /proc says."""

    pid: int
    number: int
    target: str


@dataclass(frozen=True)
class Subject:
    """A container: its processes (the first one first) on the node of `facts`, and its specification."""

    facts: Facts
    pids: tuple[int, ...]
    spec: dict[str, Any]
    ghost_limit: int = GHOST_LIMIT
    memory: int = 0  # bytes that a dump writes
    space: int | None = None  # bytes free where it writes them
    tcp_established: bool = False

    @cached_property
    def fds(self) -> tuple[Fd, ...]:
        found = []
        for pid in self.pids:
            for name in self.facts.names(f"/proc/{pid}/fd"):
                target = self.facts.link(f"/proc/{pid}/fd/{name}")
                if target:
                    found.append(Fd(pid, int(name), target))
        return tuple(found)

    @cached_property
    def maps(self) -> dict[int, str]:
        return {pid: self.facts.read(f"/proc/{pid}/maps", 64 << 20) or "" for pid in self.pids}

    def mapping(self, *words: str) -> list[int]:
        """The processes that map a file with one of these words in its path."""
        return [pid for pid, text in self.maps.items() if any(word in text for word in words)]

    def stat(self, fd: Fd) -> os.stat_result | None:
        try:
            return os.stat(self.facts.at(f"/proc/{fd.pid}/fd/{fd.number}"))
        except OSError:
            return None


def io_uring(subject: Subject) -> Check:
    name, tested = "container.io-uring", "no process uses io_uring"
    for fd in subject.fds:
        if "[io_uring]" in fd.target:
            fix = "forbid it by seccomp or kernel.io_uring_disabled=2 (libuv 1.50 does not obey UV_USE_IO_URING=0)"
            return Check(name, tested, "fail", f"process {fd.pid}, descriptor {fd.number}", fix)
    return Check(name, tested, "ok", "none")


def descriptors(subject: Subject) -> Check:
    name, tested = "container.fds", "every open file is of a kind that CRIU dumps"
    for fd in subject.fds:
        what = _strange(subject, fd)
        if what:
            fix = "close it in the application before the checkpoint"
            return Check(name, tested, "fail", f"process {fd.pid}, descriptor {fd.number}: {what}", fix)
    return Check(name, tested, "ok", f"{len(subject.fds)} descriptors")


def _strange(subject: Subject, fd: Fd) -> str:
    if fd.target.startswith("anon_inode:"):
        kind = fd.target.removeprefix("anon_inode:")
        return "" if kind in _ANON or kind == "[io_uring]" else fd.target
    if not fd.target.startswith("/dev/"):
        return ""
    found = subject.stat(fd)
    if found is None or not stat.S_ISCHR(found.st_mode):
        return ""
    number = (os.major(found.st_rdev), os.minor(found.st_rdev))
    gpu = "nvidia" in fd.target or fd.target.startswith(("/dev/kfd", "/dev/dri/"))  # the driver's part
    return "" if gpu or number in _PLAIN or number[0] in _TERMINALS else f"device {fd.target}"


def ghosts(subject: Subject) -> Check:
    """Deleted but open files: their content goes into the image, up to a limit."""
    name, tested = "container.ghost-files", f"deleted but open files are at most {subject.ghost_limit} bytes"
    count = 0
    for fd in subject.fds:
        if (
            not fd.target.endswith(" (deleted)")
            or not fd.target.startswith("/")
            or fd.target.startswith("/memfd:")
        ):
            continue
        count += 1
        found = subject.stat(fd)
        if found is not None and stat.S_ISREG(found.st_mode) and found.st_size > subject.ghost_limit:
            fix = f"--ghost-limit {found.st_size}, or criu.ghost-limit in /etc/cryoci/config.toml"
            return Check(
                name, tested, "fail", f"{fd.target.removesuffix(' (deleted)')}: {found.st_size} bytes", fix
            )
    return Check(name, tested, "ok", f"{count} such files")


def tcp(subject: Subject) -> Check:
    name, tested = "container.tcp", "no TCP connection is established"
    inodes = {fd.target[8:-1] for fd in subject.fds if fd.target.startswith("socket:[")}
    peers = []
    for family in ("tcp", "tcp6"):
        for line in (subject.facts.read(f"/proc/{subject.pids[0]}/net/{family}") or "").splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == "01" and fields[9] in inodes:  # TCP_ESTABLISHED
                peers.append(fields[2])
    if peers and not subject.tcp_established:
        fix = (
            "cryoci checkpoint --tcp-established, or criu.tcp-established = true in /etc/cryoci/config.toml"
        )
        return Check(name, tested, "fail", f"{len(peers)} connections", fix)
    return Check(name, tested, "ok", f"{len(peers)} connections" + (", to be kept" if peers else ""))


def sockets(subject: Subject) -> Check:
    """Kinds that CRIU knows nothing of. A socket tells its own; no table in /proc lists multipath TCP."""
    name, tested = "container.sockets", "sockets are of kinds that CRIU dumps"
    found = [fd for fd in subject.fds if fd.target.startswith("socket:[")]
    for fd in found:
        kind = subject.facts.socket(f"/proc/{fd.pid}/fd/{fd.number}")
        if kind and kind not in _SOCKETS:
            fix = "close it before the checkpoint"
            if kind.startswith("MPTCP"):
                fix = "turn it off in the application (Go: GODEBUG=multipathtcp=0) or by net.mptcp.enabled=0"
            said = f"process {fd.pid}, descriptor {fd.number}: a socket of kind {kind}"
            return Check(name, tested, "fail", said, fix)
    return Check(name, tested, "ok", f"{len(found)} sockets")


def outside(subject: Subject) -> Check:
    """Files whose mount is not the container's: stdio of the caller, a terminal of the session."""
    name, tested = "container.external-files", "open files are on the container's own mounts"
    for pid in subject.pids:
        own = {
            line.split(" ", 1)[0]
            for line in (subject.facts.read(f"/proc/{pid}/mountinfo") or "").splitlines()
        }
        for fd in subject.fds:
            if fd.pid != pid or not fd.target.startswith("/") or fd.target.startswith("/memfd:") or not own:
                continue
            info = subject.facts.read(f"/proc/{pid}/fdinfo/{fd.number}") or ""
            match = re.search(r"^mnt_id:\s*(\d+)", info, re.MULTILINE)
            if match is None or match[1] in own:
                continue
            if fd.target.startswith("/dev/pts/"):
                why = f"process {pid}, descriptor {fd.number}: terminal {fd.target} of the caller's session"
                fix = "start it without an inherited terminal (engines do; runc: --console-socket)"
            else:
                why = f"process {pid}, descriptor {fd.number}: {fd.target}"
                fix = "start it with its stdio on pipes or /dev/null, not on files of the node"
            return Check(name, tested, "fail", why, fix)
    return Check(name, tested, "ok", "all of them")


def mounts(subject: Subject) -> Check:
    """Mounts that the runtime did not make: hooks put them there, and CRIU cannot take them."""
    name, tested = "container.mounts", "every mount stands in the container's specification"
    declared = {
        os.path.normpath(str(m.get("destination", ""))) for m in subject.spec.get("mounts") or []
    } | {"/"}
    declared = {d.replace("/var/run/", "/run/", 1) if d.startswith("/var/run/") else d for d in declared}
    worst: Check | None = None
    for where, fields in _mountinfo(subject):
        if where in declared:
            continue
        nvidia = "nvidia" in where
        if where.startswith(tuple(p + "/" for p in _PSEUDO)) and not nvidia:
            continue
        shared = any(f.startswith("master:") for f in fields)
        fix = "declare it as a mount; GPU mounts belong into a CDI specification, not into hooks"
        if shared or nvidia:
            return Check(name, tested, "fail", f"{where} was mounted behind the runtime's back", fix)
        worst = worst or Check(name, tested, "warn", f"{where} was mounted in the container", fix)
    return worst or Check(name, tested, "ok", f"{len(declared)} destinations")


def _mountinfo(subject: Subject) -> Iterator[tuple[str, list[str]]]:
    """Mount point and optional fields of the container's mounts (proc_pid_mountinfo(5))."""
    for line in (subject.facts.read(f"/proc/{subject.pids[0]}/mountinfo") or "").splitlines():
        fields = line.split(" ")
        if "-" in fields[6:]:
            yield fields[4].replace("\\040", " "), fields[6 : fields.index("-", 6)]


def namespaces(subject: Subject) -> Check:
    name, tested = "container.namespaces", "no process has a PID or user namespace of its own"
    first = subject.pids[0]
    for kind in ("pid", "user"):
        base = subject.facts.link(f"/proc/{first}/ns/{kind}")
        for pid in subject.pids[1:]:
            own = subject.facts.link(f"/proc/{pid}/ns/{kind}")
            if own and base and own != base:
                fix = "do not make namespaces inside the container (nested containers, sandboxing browsers)"
                return Check(name, tested, "fail", f"process {pid} has a {kind} namespace of its own", fix)
    return Check(name, tested, "ok", f"{len(subject.pids)} processes")


def user(subject: Subject) -> Check:
    """CRIU cannot read its images from inside of one when it restores it."""
    name, tested = "container.user-namespace", "the container has no user namespace"
    spaces = (subject.spec.get("linux") or {}).get("namespaces") or ()
    if any(one.get("type") == "user" for one in spaces):
        why = "it has one, and CRIU cannot restore such a container"
        return Check(name, tested, "fail", why, "start it without (no --userns, --uidmap)")
    return Check(name, tested, "ok", "none")


def traced(subject: Subject) -> Check:
    name, tested = "container.traced", "no process is traced"
    for pid in subject.pids:
        match = re.search(
            r"^TracerPid:\s*(\d+)", subject.facts.read(f"/proc/{pid}/status") or "", re.MULTILINE
        )
        if match and match[1] != "0":
            return Check(
                name, tested, "fail", f"process {pid} is traced by {match[1]}", "detach the debugger"
            )
    return Check(name, tested, "ok", "none")


def memory(subject: Subject) -> Check:
    name, tested = "container.memory", "there is room for the images of its memory"
    need = f"{subject.memory >> 20} MiB"
    if subject.space is None:
        return Check(name, tested, "skip", f"{need} are needed; where they go is not known")
    if subject.space < subject.memory:
        fix = "free space there, or set TMPDIR to a directory on a larger file system"
        return Check(name, tested, "fail", f"{need} are needed, {subject.space >> 20} MiB are free", fix)
    return Check(name, tested, "ok", f"{need} are needed, {subject.space >> 20} MiB are free")


CHECKS = (
    io_uring, descriptors, ghosts, tcp, sockets, outside, mounts, namespaces, user, traced, memory,
)  # fmt: skip
