# SPDX-License-Identifier: Apache-2.0
"""The catalogue of failures: the node's tools and kernel, its cgroups, network and ids."""

from __future__ import annotations

from cryoci.shim.criu.known import Known

NODE: tuple[Known, ...] = (
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
)
