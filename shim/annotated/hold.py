# SPDX-License-Identifier: Apache-2.0
"""The restored processes between `create` and `start`: not one instruction of theirs has run.

CRIU leaves them stopped (leave-stopped), the runtime freezes their cgroup, and only then are they continued:
they wake up in the freezer, and nobody, not even a parent that waits for stopped children, sees a stop.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Collection, Mapping
from typing import Any

from cryoci.errors import RestoreError
from cryoci.shim.cgroup import tree

_CLONE_NEWNET, _CLONE_NEWUTS = 0x40000000, 0x04000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
# linux/capability.h, in the order of their numbers
_CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE "
    "NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT "
    "SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE "
    "AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ "
    "PERFMON BPF CHECKPOINT_RESTORE"
).split()


def check(pid: int, spec: Mapping[str, Any]) -> None:
    """Raise RestoreError when a process may do more than the engine gives to the container.

    What a process may do comes out of the checkpoint, so that a pod could otherwise be what its cluster
    forbids. This holds against checkpoints of other containers; who forges CRIU's images is not stopped by it.
    """
    process = spec.get("process") or {}
    given = process.get("capabilities")
    allowed = None if given is None else _mask(given.get("bounding") or [])
    filtered = bool((spec.get("linux") or {}).get("seccomp"))
    for one in tree(pid):
        status = _status(one)
        who = f"process {one} ({status.get('Name', '?')}) of the checkpoint"
        more = 0
        for key in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb"):
            more |= int(status.get(key, "0"), 16)
        if allowed is not None and (more := more & ~allowed):
            raise RestoreError(
                f"{who} holds capabilities that the container does not get: {', '.join(_names(more))}",
                hint="create the container with them (--cap-add, securityContext.capabilities), if it may have them",
            )
        if filtered and status.get("Seccomp") == "0":
            raise RestoreError(
                f"{who} has no seccomp filter, and the container gets one",
                hint="create it with seccomp=unconfined, if it may be",
            )
        if process.get("noNewPrivileges") and status.get("NoNewPrivs") == "0":
            raise RestoreError(
                f"{who} may gain privileges, and the container may not (noNewPrivileges)",
                hint="create it without no-new-privileges (allowPrivilegeEscalation), if it may be",
            )


def wake(pid: int, stopped: Collection[int]) -> None:
    """Continue the processes of `pid`, children first, but for those that were `stopped` at the checkpoint."""
    for one in reversed(tree(pid)):
        inner = _status(one).get("NSpid", str(one)).split()[-1]
        if int(inner) in stopped:
            continue
        try:
            os.kill(one, signal.SIGCONT)
        except ProcessLookupError:
            continue


def settle(pid: int, spec: Mapping[str, Any]) -> None:
    """Give the container its new hostname, and raise `lo` in a network namespace that only it has.

    CRIU restores the old name; runc expects its caller to fill network namespaces. Raises RestoreError.
    """
    kinds = {one.get("type"): one.get("path") for one in (spec.get("linux") or {}).get("namespaces") or []}
    hostname = spec.get("hostname")
    named = bool(hostname) and "uts" in kinds and not kinds["uts"]
    private = "network" in kinds and not kinds["network"]
    if not named and not private:
        return
    child = os.fork()  # a process enters namespaces as a whole
    if child == 0:
        try:
            if named:
                _enter(pid, "uts", _CLONE_NEWUTS)
                socket.sethostname(str(hostname))
            if private:
                _enter(pid, "net", _CLONE_NEWNET)
                _raise_loopback()
            os._exit(0)
        except OSError as e:
            os._exit(e.errno or 1)
    _, status = os.waitpid(child, 0)
    if status != 0:
        reason = os.strerror(os.waitstatus_to_exitcode(status))
        raise RestoreError(f"cannot set hostname and loopback of the restored container: {reason}")


def _enter(pid: int, kind: str, flag: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/{kind}") as namespace:
        if libc.setns(namespace.fileno(), flag) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def _raise_loopback() -> None:
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))  # netdevice(7), ifreq


def _status(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", errors="replace") as f:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in f)}
    except OSError:
        return {}


def _mask(names: Collection[str]) -> int:
    mask = 0
    for name in names:
        short = name.removeprefix("CAP_")
        if short in _CAPABILITIES:
            mask |= 1 << _CAPABILITIES.index(short)
    return mask


def _names(mask: int) -> list[str]:
    return [
        _CAPABILITIES[bit] if bit < len(_CAPABILITIES) else f"CAP {bit}"
        for bit in range(64)
        if mask >> bit & 1
    ]
