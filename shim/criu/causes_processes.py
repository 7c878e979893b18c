# SPDX-License-Identifier: Apache-2.0
"""The catalogue of failures: processes, and the images of them."""

from __future__ import annotations

from cryoci.shim.criu.known import Known

PROCESSES: tuple[Known, ...] = (
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
        "process-died",
        "criu/parasite-syscall.c",
        r"process (\d+) died while CRIU was in it|si_code=\d+ si_pid=(\d+) si_status=\d+|"
        r"Can't restore registers \(pid: (\d+)\): No such process",
        "process {0} of the container ended while CRIU was in it (killed, or at a memory limit)",
        "see the kernel's log (dmesg) for who killed it, and try again: what is left of the container runs on",
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
