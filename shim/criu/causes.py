# SPDX-License-Identifier: Apache-2.0
"""The catalogue of failures: text in a log, its cause, and the fix. This half is CRIU itself; GPUs are next door.

`source` is the issue (OWNER/REPO#N) or CRIU's source file (4.2) that prints the text; docs/doctor.md is the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Verb = Literal["dump", "restore"]


@dataclass(frozen=True)
class Known:
    """One symptom. `summary` and `hint` may use the groups of `pattern` as {0}, {1}...

    `anywhere`: other programs print it (drivers' tools, runtimes, engines), so the line need not be CRIU's `Error`.
    """

    id: str
    source: str
    text: str
    summary: str
    hint: str
    verb: Verb | None = None
    anywhere: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(self.text)  # re keeps what it has compiled


CORE: tuple[Known, ...] = (
    # -- tool and kernel
    Known(
        "criu-too-old-vdso",
        "criu/vdso.c",
        r"vdso: Unexpected rt vDSO area bounds",
        "this CRIU is too old for the running kernel (it does not know the kernel's vDSO layout)",
        "install CRIU 4.1 or newer (Debian trixie has 4.1.1)",
    ),
    Known(
        "criu-too-old-616",
        "criu/sockets.c; Linux 6.16",
        r"sockets: Can't get 1:(?:16|34) opt: Operation not supported",
        "this CRIU cannot dump TCP or UDP sockets on kernel 6.16 or newer "
        "(SO_PASSCRED/SO_PASSSEC are refused there)",
        "install CRIU 4.2 or newer",
        "dump",
    ),
    Known(
        "plugin-missing",
        "criu/image.c",
        r"Missing required plugin: (\S+)",
        "the checkpoint was made with the CRIU plugin {0}, which this node's CRIU does not load",
        "install the plugin in CRIU's library directory, or set criu.libdir in /etc/cryoci/config.toml",
        "restore",
    ),
    Known(
        "plugin-other-build",
        "checkpoint-restore/criu#2521",
        r"undefined symbol: \S+",
        "a CRIU plugin was built for another CRIU version",
        "install the plugin of the same build as criu, or point criu.libdir to an empty directory",
    ),
    Known(
        "seccomp-suspend",
        "checkpoint-restore/criu#3089",
        r"suspending seccomp failed: Operation not permitted",
        "CRIU may not suspend the container's seccomp filter",
        "run as root with CAP_SYS_ADMIN in the initial user namespace",
    ),
    Known(
        "images-full",
        "criu/image.c",
        r"No space left on device",
        "the file system that holds the images is full",
        "free space there or choose another one; the image needs about the container's resident memory",
        "dump",
    ),
    Known(
        "restore-full",
        "criu/files-reg.c",
        r"No space left on device",
        "a file system that the restore writes to is full",
        "free space where the container's root file system and CRIU's work directory are",
        "restore",
    ),
    Known(
        "quota",
        "criu/image.c",
        r"Disk quota exceeded",
        "the disk quota is used up",
        "raise the quota or choose another directory",
    ),
    Known(
        "memory",
        "criu/cr-restore.c",
        r"Can't allocate|Unable to allocate memory|Cannot allocate memory|Out of memory",
        "the node has too little free memory",
        "free memory on this node, or restore on a larger one",
    ),
    # -- files and sockets
    Known(
        "tcp-established",
        "checkpoint-restore/criu#2535",
        r"Connected TCP socket, consider using --tcp-established",
        "the container has established TCP connections",
        "add --tcp-established to keep them (the peers must stay reachable at the same addresses), "
        "or close them first",
        "dump",
    ),
    Known(
        "tcp-in-image",
        "criu/sk-inet.c",
        r"Connected TCP socket in image|Need to set the --tcp-close options",
        "the checkpoint holds established TCP connections",
        "add --tcp-established to restore them, or --tcp-close to restore them as closed",
        "restore",
    ),
    Known(
        "tcp-in-flight",
        "criu/sk-tcp.c",
        r"In-flight connection \(l\)",
        "a TCP connection to a listening socket is not accepted yet",
        "checkpoint again, or leave such connections out: --skip-in-flight",
        "dump",
    ),
    Known(
        "ghost-limit",
        "checkpoint-restore/criu#537",
        r"Can't dump ghost file (.+) of (\d+) size, increase limit",
        "the deleted but open file {0} ({1} bytes) is larger than CRIU's ghost limit",
        "raise it: --ghost-limit {1}, or criu.ghost-limit in /etc/cryoci/config.toml",
        "dump",
    ),
    Known(
        "link-remap",
        "criu/files-reg.c",
        r"Can't create link remap for (.+)\. Use",
        "the file {0} is open in the container and was unlinked, but still has other names",
        "add --link-remap",
        "dump",
    ),
    Known(
        "link-remap-taken",
        "checkpoint-restore/criu#3040",
        r"Can't link remap to (.+): (.+)",
        "the unlinked file {0} could not be given a name for the checkpoint: {1}",
        "remove link_remap.* files that an earlier checkpoint left beside it",
        "dump",
    ),
    Known(
        "file-locks",
        "criu/file-lock.c",
        r"Some file locks are hold by dumping tasks",
        "processes of the container hold file locks",
        "add --file-locks",
        "dump",
    ),
    Known(
        "unix-external",
        "criu/sk-unix.c",
        r"External socket is used",
        "a unix socket of the container is connected to a process outside of it",
        "add --ext-unix-sk if it is a datagram socket and the peer can live with that; else close it first",
        "dump",
    ),
    Known(
        "unix-stream",
        "criu/sk-unix.c",
        r"Can't dump half of stream unix connection",
        "a stream between the container and a process outside of it cannot be cut in two",
        "close the unix connection in the application before the checkpoint",
        "dump",
    ),
    Known(
        "terminal",
        "criu/tty.c",
        r"tty: Found (?:dangling tty|slave peer)|Can't lookup mount=.* path=/dev/pts/",
        "the container uses a terminal that belongs to the caller's session",
        "run the container without an inherited terminal (runc: --console-socket, or terminal = false)",
        "dump",
    ),
    Known(
        "io-uring",
        "NVIDIA/nvcf#225",
        r"anon_inode:\[io_uring\]|parasite\.c:\d+\): send_fds failed \(-22\)",  # EINVAL: none may be sent (6.7)
        "a process of the container uses io_uring, which CRIU cannot dump",
        "forbid it by seccomp or kernel.io_uring_disabled=2 (libuv 1.50 does not obey UV_USE_IO_URING=0)",
        "dump",
    ),
    Known(
        "file-kind",
        "criu/files.c",
        r"Can't dump file (\d+) of that type \[(\w+)\] \((\S+) (.+)\)",
        "file descriptor {0} ({2} {3}) is of a kind that CRIU cannot dump",
        "close it in the application before the checkpoint",
        "dump",
    ),
    Known(
        "mptcp",
        "criu/sk-inet.c",
        r"Unsupported proto 262 for socket",
        "the container uses multipath TCP, which CRIU cannot dump",
        "turn it off in the application (Go: GODEBUG=multipathtcp=0) or by net.mptcp.enabled=0",
        "dump",
    ),
    Known(
        "socket-kind",
        "criu/sockets.c",
        r"Unsupported proto \d+ for socket|Unsupported socket (?:family|type)|unix: Unsupported type|"
        r"Unknown socket collected",
        "a socket of the container is of a kind that CRIU cannot dump",
        "close it in the application before the checkpoint",
        "dump",
    ),
    Known(
        "fd-outside",
        "criu/files-reg.c",
        r"Can't lookup mount=(-?\d+) for fd=(-?\d+) path=(.+)",
        "file descriptor {1} points to {2}, which is on a file system outside of the container",
        "start the container with its stdin, stdout and stderr on pipes or /dev/null (engines do), "
        "not on files of the host",
        "dump",
    ),
    Known(
        "file-missing",
        "criu/files-reg.c",
        r"Can't open file (.+) on restore: (.+)",
        "the file {0}, open in the container, cannot be opened on this node: {1}",
        "restore on the same base image, and take the volume along: `cryoci checkpoint --volumes`",
        "restore",
    ),
    Known(
        "podman-init",
        "criu/files-reg.c",
        r"File (\S*run/podman-init|\S*dev/init) has bad (?:size|mode|build-ID)",
        "podman's init (--init, {0} in the container) is another build here than at the checkpoint",
        "install the same version of catatonit as on the first node",
        "restore",
    ),
    Known(
        "file-size",
        "criu/files-reg.c",
        r"File (.+) has bad size (\d+) \(expect (\d+)\)",
        "the file {0} has {1} bytes here but had {2} at the checkpoint",
        "restore with the file system of the checkpoint; the base image or a mounted volume differs",
        "restore",
    ),
    Known(
        "file-other",
        "criu/files-reg.c",
        r"File (.+) has bad (?:mode|build-ID)",
        "the file {0} is not the one of the checkpoint",
        "use the same base image (by digest) as at the checkpoint",
        "restore",
    ),
    # -- mounts
    Known(
        "mount-sharing",
        "opencontainers/runc#4522",
        r"Mount \d+ (\S+) \([^)]*\) has unreachable sharing|(Sharing group \(.*?\)) has unreachable sharing",
        "a mount of the container ({0}) shares propagation with the host",
        "mount it as private or read-only bind; GPU mounts belong into a CDI specification, not into hooks",
    ),
    Known(
        "mount-root",
        "NVIDIA/cuda-checkpoint#19",
        r"\d+:(\S+) doesn't have a proper root mount",
        "the mount of {0} comes from a file system outside of the container",
        "declare it as a bind mount in the container's specification",
        "dump",
    ),
    Known(
        "mount-no-mapping",
        "checkpoint-restore/criu#2672",
        r"No mapping for (\S+) mountpoint",
        "the container made for the restore lacks a mount of the checkpoint (number {0})",
        "give the container the same mounts as the original",
        "restore",
    ),
    Known(
        "mount-v2",
        "ai-dynamo/snapshot#37",
        r"mnt-v2: Failed to copy sharing|mnt-v2: Can't stat mountpoint (\S+)",
        "CRIU could not make the container's mounts again on this node",
        "see that all devices and host paths of the checkpoint exist here; for GPUs use a CDI specification",
        "restore",
    ),
    Known(
        "mount-kind",
        "criu/mount.c",
        r"FS mnt (\S+) dev (\S+) root (\S+) unsupported",
        "the mount {0} is of a file system that CRIU cannot dump",
        "mount it from outside (bind mount) instead of inside the container",
        "dump",
    ),
    # -- cgroups, network, ids
    Known(
        "cgroup-write",
        "checkpoint-restore/criu#2000",
        r"cg: Failed writing .* to (\S+): (.+)",
        "CRIU could not write the cgroup setting {0}: {1}",
        'make the checkpoint with criu.manage-cgroups = "ignore", so that the runtime alone sets cgroups',
        "restore",
    ),
    Known(
        "network-lock",
        "criu/netfilter.c",
        r'execvp\("(?:iptables|ip6tables)[\w-]*", \.\.\.\) failed|Iptables configuration failed|'
        r"Locking (?:network|connection) failed|Failed to lock TCP connection|built without libnftables",
        "CRIU could not lock the container's network (iptables is missing or refused)",
        'install iptables, or set criu.network-lock = "nftables" (or "skip") in /etc/cryoci/config.toml',
    ),
    Known(
        "port-taken",
        "criu/sk-inet.c",
        r"Can't bind inet socket.*Address already in use",
        "a TCP or UDP port of the container is taken on this node",
        "stop the other user of the port, or restore into a network namespace of its own",
        "restore",
    ),
    Known(
        "pid-taken",
        "criu/cr-restore.c",
        r"Can't fork for (\d+): File exists|Pid \d+ do not match expected (\d+)",
        "the process id {0}, which the container needs, is taken on this node",
        "restore with a PID namespace of the container's own",
        "restore",
    ),
    Known(
        "lsm-profile",
        "containers/podman#12437",
        r"can't write lsm profile|(?:apparmor|selinux) LSM specified but|Unable to set the .* socket SELinux context",
        "the security profile (AppArmor or SELinux) of the checkpoint is not usable on this node",
        "load the same profile here, or restore with another one (--lsm-profile)",
        "restore",
    ),
    Known(
        "cpu-features",
        "criu/arch/x86/cpu.c",
        r"cpu: [CF]PU .*(?:do not match|not supported|unsupported bits|mismatch)",
        "this node's CPU lacks features that the checkpointed processes may use",
        "restore on a CPU of the same or a newer generation",
        "restore",
    ),
    # -- processes
    Known(
        "traced",
        "criu/seize.c",
        r"zombie (\d+) \(comm (.+?)\) found while seizing",
        "CRIU cannot stop process {0} ({1}): it is traced (a debugger, strace), or it just ended",
        "detach the debugger and try again",
        "dump",
    ),
    Known(
        "freeze-timeout",
        "criu/cr-dump.c",
        r"Timeout reached",
        "the container's processes did not stop within CRIU's time limit",
        "raise criu.timeout in /etc/cryoci/config.toml (GPU containers need minutes)",
        "dump",
    ),
    Known(
        "zombie-thread",
        "criu/seize.c",
        r"Zombie thread not supported|Zombies with threads are not supported|Zombie with children",
        "a process of the container has ended but threads of it have not",
        "end the whole process in the container and try again",
        "dump",
    ),
    Known(
        "nested-namespace",
        "criu/namespaces.c",
        r"Can't dump nested (\w+) namespace for (\d+)",
        "process {1} is in a {0} namespace of its own inside the container, which CRIU cannot dump",
        "do not make namespaces inside the container (nested containers, sandboxing browsers)",
        "dump",
    ),
    # -- images
    Known(
        "image-damaged",
        "criu/protobuf.c",
        r"Read \d+ bytes while \d+ expected (?:from|on) (?:\S*/)?(\S+?):|Unexpected EOF on (?!\(empty)(?:\S*/)?(\S+)|"
        r"agic doesn't match for (\S+)|Failed unpacking object \S+ from (?:\S*/)?(\S+)|"
        r"(Img trimmed)|(Reached EOF unexpectedly) while reading page",
        "a CRIU image file is truncated or damaged ({0})",
        "the checkpoint is not usable: use another one (`cryoci list`)",
        "restore",
    ),
    Known(
        "image-missing",
        "criu/cr-restore.c",
        r"Unexpected EOF on \(empty-image\)|Can't open core data for",
        "a CRIU image file is missing or damaged",
        "the checkpoint is incomplete: use another one (`cryoci list`)",
        "restore",
    ),
    Known(
        "criu-crashed",
        "criu/cr-restore.c",
        r"(\d+) stopped by signal 11",
        "CRIU crashed while it made process {0}: most often an image file is missing",
        "the checkpoint is not usable: use another one (`cryoci list`)",
        "restore",
    ),
    Known(
        "criu-segfault",
        "checkpoint-restore/criu#3018",
        r"(\d+) killed by signal 11: Segmentation fault",
        "CRIU's restorer crashed in process {0}: a fault of this CRIU build, or of an image",
        "use a released CRIU (4.2); a build of its development branch of May 2026 does this to many threads",
        "restore",
    ),
)
