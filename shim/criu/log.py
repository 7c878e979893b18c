# SPDX-License-Identifier: Apache-2.0
"""From a CRIU log to one sentence: the cause of a failed dump or restore, and the fix.

CRIU prints several `Error` lines for one failure, the real cause usually first and its callers
after it. `explain` looks for the known causes in the whole log, most specific first, and falls back
to the first error that is not noise. Each row of `CAUSES` names where its text was seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# The end of a log is enough: errors are written last, and verbose logs reach hundreds of MB.
TAIL = 4 << 20

Verb = Literal["dump", "restore"]


@dataclass(frozen=True)
class Cause:
    """Why CRIU failed: `summary` in one sentence, `hint` what to do, `line` the log line it stands on."""

    summary: str
    hint: str
    line: str


@dataclass(frozen=True)
class _Known:
    pattern: re.Pattern[str]
    summary: str
    hint: str
    verb: Verb | None = None


def _known(pattern: str, summary: str, hint: str, verb: Verb | None = None) -> _Known:
    return _Known(re.compile(pattern), summary, hint, verb)


# Error lines that also stand in the logs of successful runs: CRIU without CAP_SYS_RESOURCE, and what ip(8) says.
_NOISE = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE|[Aa]ddress already assigned")
# What follows from an error and says nothing itself; the cause only when there is no other.
_FOLLOWS = re.compile(
    r"(?:Pre-dumping|Dumping|Restoring) FAILED|killed by signal|exited, status=|files \(pid: \d+\) failed with"
)

# summary and hint may use the groups of the pattern as {0}, {1}...
CAUSES: tuple[_Known, ...] = (
    # -- tool and kernel
    _known(
        r"vdso: Unexpected rt vDSO area bounds",
        "this CRIU is too old for the running kernel (it does not know the kernel's vDSO layout)",
        "install CRIU 4.1 or newer (Debian trixie has 4.1.1)",
    ),
    _known(
        r"sockets: Can't get 1:(?:16|34) opt: Operation not supported",
        "this CRIU cannot dump TCP or UDP sockets on kernel 6.16 or newer "
        "(SO_PASSCRED/SO_PASSSEC are refused there)",
        "install CRIU 4.2 or newer",
        "dump",
    ),
    _known(
        r"Missing required plugin: (\S+)",
        "the checkpoint was made with the CRIU plugin {0}, which this node's CRIU does not load",
        "install the plugin in CRIU's library directory, or set criu.libdir in /etc/cryoci/config.toml",
        "restore",
    ),
    _known(
        r"undefined symbol: \S+",
        "a CRIU plugin was built for another CRIU version",
        "install the plugin of the same build as criu, or point criu.libdir to an empty directory",
    ),
    _known(
        r"suspending seccomp failed: Operation not permitted",
        "CRIU may not suspend the container's seccomp filter",
        "run as root with CAP_SYS_ADMIN in the initial user namespace",
    ),
    _known(
        r"No space left on device",
        "the file system that holds the images is full",
        "free space there or choose another one; the image needs about the container's resident memory",
        "dump",
    ),
    _known(
        r"No space left on device",
        "a file system that the restore writes to is full",
        "free space where the container's root file system and CRIU's work directory are",
        "restore",
    ),
    _known(
        r"Disk quota exceeded", "the disk quota is used up", "raise the quota or choose another directory"
    ),
    _known(
        r"Can't allocate|Unable to allocate memory|Cannot allocate memory|Out of memory",
        "the node has too little free memory",
        "free memory on this node, or restore on a larger one",
    ),
    # -- GPU (plugins/cuda/cuda_plugin.c, plugins/amdgpu)
    _known(
        r"handle_device_vma plugin failed|Can't handle non-regular mapping on (\d+)'s map",
        "a device (usually a GPU) is still mapped in a process of the container",
        "the GPU was not checkpointed first: see `gpu` in /etc/cryoci/config.toml and the driver's version",
        "dump",
    ),
    _known(
        r"(?:CHECKPOINT|PAUSE)_DEVICES failed with (.+)|Failed to launch cuda-checkpoint to retrieve \w+ ?\w*: (.+)",
        "the CUDA driver did not checkpoint the GPU: {0}",
        "see the driver's version, and raise criu.timeout where several processes use the GPU",
        "dump",
    ),
    _known(
        r"RESUME_DEVICES (?:RESTORE|UNLOCK) failed with (.+)",
        "the CUDA driver did not restore the GPU: {0}",
        "restore on a node with as much free GPU memory, the same kind of GPU and at least the same driver",
    ),
    _known(
        r"(Number of (?:devices|xgmi groups) mismatch|Failed to match (?:remaining nodes|all GPU groups))",
        "this node's AMD GPUs are not arranged as those of the checkpoint ({0})",
        "restore on a node with the same GPUs",
        "restore",
    ),
    _known(
        r"CR not supported on current kernel",
        "the kernel's amdgpu driver is too old for checkpoints",
        "install a newer kernel or amdgpu-dkms",
    ),
    _known(
        r"Can't dump file (\d+) of that type \[(\w+)\] \(chr (\d+):(\d+)\)",
        "file descriptor {0} is an open character device {2}:{3}, which CRIU cannot dump",
        "close the device in the application before the checkpoint, or checkpoint its driver's state first",
        "dump",
    ),
    # -- files and sockets
    _known(
        r"Connected TCP socket, consider using --tcp-established",
        "the container has established TCP connections",
        "add --tcp-established to keep them (the peers must stay reachable at the same addresses), "
        "or close them first",
        "dump",
    ),
    _known(
        r"Connected TCP socket in image|Need to set the --tcp-close options",
        "the checkpoint holds established TCP connections",
        "add --tcp-established to restore them, or --tcp-close to restore them as closed",
        "restore",
    ),
    _known(
        r"In-flight connection \(l\)",
        "a TCP connection to a listening socket is not accepted yet",
        "checkpoint again, or leave such connections out: --skip-in-flight",
        "dump",
    ),
    _known(
        r"Can't dump ghost file (.+) of (\d+) size, increase limit",
        "the deleted but open file {0} ({1} bytes) is larger than CRIU's ghost limit",
        "raise it: --ghost-limit {1}, or criu.ghost-limit in /etc/cryoci/config.toml",
        "dump",
    ),
    _known(
        r"Can't create link remap for (.+)\. Use",
        "the file {0} is open in the container and was unlinked, but still has other names",
        "add --link-remap",
        "dump",
    ),
    _known(
        r"Can't link remap to (.+): (.+)",
        "the unlinked file {0} could not be given a name for the checkpoint: {1}",
        "remove link_remap.* files that an earlier checkpoint left beside it",
        "dump",
    ),
    _known(
        r"Some file locks are hold by dumping tasks",
        "processes of the container hold file locks",
        "add --file-locks",
        "dump",
    ),
    _known(
        r"External socket is used",
        "a unix socket of the container is connected to a process outside of it",
        "add --ext-unix-sk if it is a datagram socket and the peer can live with that; else close it first",
        "dump",
    ),
    _known(
        r"Can't dump half of stream unix connection",
        "a stream between the container and a process outside of it cannot be cut in two",
        "close the unix connection in the application before the checkpoint",
        "dump",
    ),
    _known(
        r"tty: Found (?:dangling tty|slave peer)|Can't lookup mount=.* path=/dev/pts/",
        "the container uses a terminal that belongs to the caller's session",
        "run the container without an inherited terminal (runc: --console-socket, or terminal = false)",
        "dump",
    ),
    _known(
        r"anon_inode:\[io_uring\]|parasite\.c:\d+\): send_fds failed \(-22\)",  # EINVAL: none may be sent (6.7)
        "a process of the container uses io_uring, which CRIU cannot dump",
        "turn io_uring off in the application (libuv: UV_USE_IO_URING=0) or by kernel.io_uring_disabled=2",
        "dump",
    ),
    _known(
        r"Can't dump file (\d+) of that type \[(\w+)\] \((\S+) (.+)\)",
        "file descriptor {0} ({2} {3}) is of a kind that CRIU cannot dump",
        "close it in the application before the checkpoint",
        "dump",
    ),
    _known(
        r"Unsupported proto 262 for socket",
        "the container uses multipath TCP, which CRIU cannot dump",
        "turn it off in the application (Go: GODEBUG=multipathtcp=0) or by net.mptcp.enabled=0",
        "dump",
    ),
    _known(
        r"Unsupported proto \d+ for socket|Unsupported socket (?:family|type)|unix: Unsupported type|"
        r"Unknown socket collected",
        "a socket of the container is of a kind that CRIU cannot dump",
        "close it in the application before the checkpoint",
        "dump",
    ),
    _known(
        r"Can't lookup mount=(-?\d+) for fd=(-?\d+) path=(.+)",
        "file descriptor {1} points to {2}, which is on a file system outside of the container",
        "start the container with its stdin, stdout and stderr on pipes or /dev/null (engines do), "
        "not on files of the host",
        "dump",
    ),
    _known(
        r"Can't open file (.+) on restore: (.+)",
        "the file {0}, open in the container, cannot be opened on this node: {1}",
        "restore on the same base image, and take the volume along: `cryoci checkpoint --volumes`",
        "restore",
    ),
    _known(
        r"File (.+) has bad size (\d+) \(expect (\d+)\)",
        "the file {0} has {1} bytes here but had {2} at the checkpoint",
        "restore with the file system of the checkpoint; the base image or a mounted volume differs",
        "restore",
    ),
    _known(
        r"File (.+) has bad (?:mode|build-ID)",
        "the file {0} is not the one of the checkpoint",
        "use the same base image (by digest) as at the checkpoint",
        "restore",
    ),
    # -- mounts
    _known(
        r"Mount \d+ (\S+) \([^)]*\) has unreachable sharing|(Sharing group \(.*?\)) has unreachable sharing",
        "a mount of the container ({0}) shares propagation with the host",
        "mount it as private or read-only bind; GPU mounts belong into a CDI specification, not into hooks",
    ),
    _known(
        r"\d+:(\S+) doesn't have a proper root mount",
        "the mount of {0} comes from a file system outside of the container",
        "declare it as a bind mount in the container's specification",
        "dump",
    ),
    _known(
        r"No mapping for (\S+) mountpoint",
        "the container made for the restore lacks a mount of the checkpoint (number {0})",
        "give the container the same mounts as the original",
        "restore",
    ),
    _known(
        r"mnt-v2: Failed to copy sharing|mnt-v2: Can't stat mountpoint (\S+)",
        "CRIU could not make the container's mounts again on this node",
        "see that all devices and host paths of the checkpoint exist here; for GPUs use a CDI specification",
        "restore",
    ),
    _known(
        r"FS mnt (\S+) dev (\S+) root (\S+) unsupported",
        "the mount {0} is of a file system that CRIU cannot dump",
        "mount it from outside (bind mount) instead of inside the container",
        "dump",
    ),
    # -- cgroups, network, ids
    _known(
        r"cg: Failed writing .* to (\S+): (.+)",
        "CRIU could not write the cgroup setting {0}: {1}",
        'make the checkpoint with criu.manage-cgroups = "ignore", so that the runtime alone sets cgroups',
        "restore",
    ),
    _known(
        r'execvp\("(?:iptables|ip6tables)[\w-]*", \.\.\.\) failed|Iptables configuration failed|'
        r"Locking (?:network|connection) failed|Failed to lock TCP connection|built without libnftables",
        "CRIU could not lock the container's network (iptables is missing or refused)",
        'install iptables, or set criu.network-lock = "nftables" (or "skip") in /etc/cryoci/config.toml',
    ),
    _known(
        r"Can't bind inet socket.*Address already in use",
        "a TCP or UDP port of the container is taken on this node",
        "stop the other user of the port, or restore into a network namespace of its own",
        "restore",
    ),
    _known(
        r"Can't fork for (\d+): File exists|Pid \d+ do not match expected (\d+)",
        "the process id {0}, which the container needs, is taken on this node",
        "restore with a PID namespace of the container's own",
        "restore",
    ),
    _known(
        r"can't write lsm profile|(?:apparmor|selinux) LSM specified but|Unable to set the .* socket SELinux context",
        "the security profile (AppArmor or SELinux) of the checkpoint is not usable on this node",
        "load the same profile here, or restore with another one (--lsm-profile)",
        "restore",
    ),
    _known(
        r"cpu: [CF]PU .*(?:do not match|not supported|unsupported bits|mismatch)",
        "this node's CPU lacks features that the checkpointed processes may use",
        "restore on a CPU of the same or a newer generation",
        "restore",
    ),
    # -- processes
    _known(
        r"zombie (\d+) \(comm (.+?)\) found while seizing",
        "CRIU cannot stop process {0} ({1}): it is traced (a debugger, strace), or it just ended",
        "detach the debugger and try again",
        "dump",
    ),
    _known(
        r"Timeout reached",
        "the container's processes did not stop within CRIU's time limit",
        "raise criu.timeout in /etc/cryoci/config.toml (GPU containers need minutes)",
        "dump",
    ),
    _known(
        r"Zombie thread not supported|Zombies with threads are not supported|Zombie with children",
        "a process of the container has ended but threads of it have not",
        "end the whole process in the container and try again",
        "dump",
    ),
    _known(
        r"Can't dump nested (\w+) namespace for (\d+)",
        "process {1} is in a {0} namespace of its own inside the container, which CRIU cannot dump",
        "do not make namespaces inside the container (nested containers, sandboxing browsers)",
        "dump",
    ),
    # -- images
    _known(
        r"Read \d+ bytes while \d+ expected (?:from|on) (?:\S*/)?(\S+?):|Unexpected EOF on (?!\(empty)(?:\S*/)?(\S+)|"
        r"agic doesn't match for (\S+)|Failed unpacking object \S+ from (?:\S*/)?(\S+)|"
        r"(Img trimmed)|(Reached EOF unexpectedly) while reading page",
        "a CRIU image file is truncated or damaged ({0})",
        "the checkpoint is not usable: use another one (`cryoci list`)",
        "restore",
    ),
    _known(
        r"Unexpected EOF on \(empty-image\)|Can't open core data for",
        "a CRIU image file is missing or damaged",
        "the checkpoint is incomplete: use another one (`cryoci list`)",
        "restore",
    ),
    _known(
        r"(\d+) stopped by signal 11",
        "CRIU crashed while it made process {0}: most often an image file is missing",
        "the checkpoint is not usable: use another one (`cryoci list`)",
        "restore",
    ),
)


def explain(path: str, verb: Verb) -> Cause | None:
    """The cause that a CRIU log gives, or None when there is no log or no error in it."""
    try:
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - TAIL))
            text = f.read().decode(errors="replace")
    except OSError:
        return None
    return explain_text(text, verb)


def explain_text(text: str, verb: Verb) -> Cause | None:
    """`explain` for a log already in memory."""
    # names of the container's files stand in it, and this goes to a terminal
    lines = [
        "".join(c if c.isprintable() else "?" for c in line) for line in text.split("\n") if "Error" in line
    ]
    lines = [line for line in lines if not _NOISE.search(line)]
    for known in CAUSES:
        if known.verb is not None and known.verb != verb:
            continue
        for line in lines:
            match = known.pattern.search(line)
            if match:
                groups = [g for g in match.groups() if g is not None] + ["?"] * 4
                return Cause(known.summary.format(*groups), known.hint.format(*groups), line.strip())
    if not lines:
        return None
    line = next((line for line in lines if not _FOLLOWS.search(line)), lines[0]).strip()
    said = re.sub(r"^(?:\([\d.]+\)\s*)?(?:(?:pie: )?\d+:\s*)?Error \([^)]*\):\s*", "", line)
    return Cause(f"CRIU: {said}", "read the log; the lines before this error say what CRIU was doing", line)
