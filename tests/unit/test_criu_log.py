# SPDX-License-Identifier: Apache-2.0
"""CRIU's logs and the sentence that each must give.

The fixtures are excerpts of logs of criu 4.2.1 under runc 1.1 and podman, made by provoking each failure; the
table rows hold texts that CRIU's source prints (4.2) for what could not be provoked without GPUs or old kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.shim.criu import log
from cryoci.shim.criu.log import Verb

LOGS = Path(__file__).parents[1] / "fixtures" / "criu-logs"

REAL = {
    "af-vsock.dump": "a socket of the container is of a kind that CRIU cannot dump",
    "bad-mode.restore": "the file data/x is not the one of the checkpoint",
    "bad-size.restore": "the file data/x has 10 bytes here but had 5 at the checkpoint",
    "buildid.restore": "the file usr/bin/python3.13 is not the one of the checkpoint",
    "core-garbage.restore": "a CRIU image file is truncated or damaged (core-1.img)",
    "core-magic.restore": "a CRIU image file is truncated or damaged (core-1.img)",
    "core-missing.restore": "a CRIU image file is missing or damaged",
    "core-truncated.restore": "a CRIU image file is truncated or damaged (core-1.img)",
    "file-locks.dump": "processes of the container hold file locks",
    "ghost-limit.dump": "the deleted but open file /data/g (3145728 bytes) is larger than CRIU's ghost limit",
    "in-flight.dump": "a TCP connection to a listening socket is not accepted yet",
    "inventory-truncated.restore": "a CRIU image file is truncated or damaged (inventory.img)",
    "io-uring.dump": "a process of the container uses io_uring, which CRIU cannot dump",
    "landlock.dump": "file descriptor 3 (anon anon_inode:[landlock-ruleset]) is of a kind that CRIU cannot dump",
    "link-remap.dump": "the file /data/a is open in the container and was unlinked, but still has other names",
    "missing-file.restore": "the file data/x, open in the container, cannot be opened on this node: "
    "No such file or directory",
    "mm-missing.restore": "CRIU crashed while it made process 1117: most often an image file is missing",
    "mount-missing.restore": "the container made for the restore lacks a mount of the checkpoint (number 251:(null))",
    "mount-root.dump": "the mount of ./root comes from a file system outside of the container",
    "mount-unreachable.dump": "a mount of the container (./root) shares propagation with the host",
    "nested-pidns.dump": "process 4400 is in a pid namespace of its own inside the container, which CRIU cannot dump",
    "no-iptables.dump": "CRIU could not lock the container's network (iptables is missing or refused)",
    "no-space.dump": "the file system that holds the images is full",
    "no-space.restore": "a file system that the restore writes to is full",
    "perf.dump": "file descriptor 3 (anon anon_inode:[perf_event]) is of a kind that CRIU cannot dump",
    "process-died.dump": "process 78 of the container ended while CRIU was in it (killed, or at a memory limit)",
    "process-died-seen.dump": "process 298 of the container ended while CRIU was in it (killed, or at a memory limit)",
    "pid-taken.restore": "the process id 1885, which the container needs, is taken on this node",
    "podman-init.restore": "podman's init (--init, run/podman-init in the container) is another build here than at "
    "the checkpoint",
    "port-taken.restore": "a TCP or UDP port of the container is taken on this node",
    "ramfs.dump": "the mount ./root is of a file system that CRIU cannot dump",
    "stdout-host-file.dump": "file descriptor 1 points to /srv/stdout-host-file.log, which is on a file system "
    "outside of the container",
    "tcp-established.dump": "the container has established TCP connections",
    "tcp-established.restore": "the checkpoint holds established TCP connections",
    "terminal.dump": "the container uses a terminal that belongs to the caller's session",
    "traced.dump": "CRIU cannot stop process 2408 (python3): it is traced (a debugger, strace), or it just ended",
    "unix-outside.dump": "a unix socket of the container is connected to a process outside of it",
    # no row: the first error that is not noise and not a consequence
    "corked-udp.dump": "CRIU: inet: Can't dump corked dgram socket 5d4b0",
    "success.dump": None,
    "success.restore": None,
    "success-podman.dump": None,
    "success-podman.restore": None,
}

AT = "(00.104512) Error (criu/x.c:1): "
SOURCE: list[tuple[Verb, str, str]] = [
    ("dump", "vdso: Unexpected rt vDSO area bounds", "too old for the running kernel"),
    ("dump", "sockets: Can't get 1:34 opt: Operation not supported", "kernel 6.16"),
    ("restore", "Missing required plugin: cuda_plugin", "made with the CRIU plugin cuda_plugin,"),
    (
        "dump",
        "Unable to load /usr/lib/criu/cuda_plugin.so: undefined symbol: check_and_remove_inventory_plugin",
        "plugin was built for another CRIU version",
    ),
    ("dump", "suspending seccomp failed: Operation not permitted", "seccomp filter"),
    ("dump", "Can't write img file: Disk quota exceeded", "disk quota"),
    ("restore", "Can't map shmem: Cannot allocate memory", "too little free memory"),
    ("dump", "handle_device_vma plugin failed: No such file or directory", "usually a GPU"),
    ("dump", "Can't handle non-regular mapping on 231's map 7f2", "usually a GPU"),
    (
        "dump",
        "Can't dump file 9 of that type [20666] (chr 226:128)",
        "descriptor 9 is an open character device 226:128",
    ),
    (
        "dump",
        'cuda_plugin: CHECKPOINT_DEVICES failed with Could not checkpoint on process ID 7: "unknown error"',
        'checkpoint the GPU: Could not checkpoint on process ID 7: "unknown error"',
    ),
    ("dump", "cuda_plugin: PAUSE_DEVICES failed with timeout", "checkpoint the GPU: timeout"),
    (
        "dump",
        "cuda_plugin: Failed to launch cuda-checkpoint to retrieve restore tid: Error initializing CUDA",
        "checkpoint the GPU: Error initializing CUDA",
    ),
    ("restore", "cuda_plugin: RESUME_DEVICES RESTORE failed with 304", "restore the GPU: 304"),
    (
        "restore",
        "amdgpu_plugin: Number of devices mismatch (checkpointed:2 local:1)",
        "AMD GPUs are not arranged",
    ),
    ("restore", "amdgpu_plugin: Failed to match remaining nodes", "AMD GPUs are not arranged"),
    (
        "dump",
        "amdgpu_plugin: CR not supported on current kernel (current:01.01 min:01.08)",
        "amdgpu driver is",
    ),
    ("restore", "Need to set the --tcp-close options.", "established TCP connections"),
    ("dump", "Can't link remap to /dev/shm/sem.x: File exists", "/dev/shm/sem.x could not be given a name"),
    ("dump", "unix: Can't dump half of stream unix connection. name: (null); peer name: /s", "cut in two"),
    ("dump", "tty: Found dangling tty with sid 1 pgid 1 (pts) on peer fd 0.", "terminal"),
    ("dump", "tty: Found slave peer index 1 without correspond master peer", "terminal"),
    ("dump", "Can't dump file 4 of that type [600] (anon anon_inode:[io_uring])", "io_uring"),
    ("dump", "inet: Unsupported proto 262 for socket 1f", "multipath TCP"),
    ("dump", "inet: Unsupported proto 132 for socket 1f", "socket of the container is of a kind"),
    ("dump", "inet: Unsupported socket family: 40", "socket of the container is of a kind"),
    (
        "dump",
        "mnt-v2: Sharing group (7, 9) has unreachable sharing. Try --enable-external-masters.",
        "(7, 9)",
    ),
    (
        "restore",
        "mnt-v2: Can't stat mountpoint /data: No such file or directory",
        "no place for the mount /data",
    ),
    (
        "restore",
        "mnt-v2: Failed to copy sharing from 12:<none> to 13: Invalid argument",
        "bind mounts again",
    ),
    ("restore", "cg: Failed writing 9 to pids.max: Invalid argument", "setting pids.max: Invalid argument"),
    ("dump", "Iptables configuration failed", "lock the container's network"),
    ("dump", "Locking network failed using nftables", "lock the container's network"),
    ("dump", "Locking connection failed using nftables", "lock the container's network"),
    ("dump", "tcp: Failed to lock TCP connection 1f", "lock the container's network"),
    ("dump", "CRIU was built without libnftables support", "lock the container's network"),
    ("restore", "Pid 12 do not match expected 7", "process id 7,"),
    ("restore", "can't write lsm profile -2", "security profile"),
    ("restore", "apparmor LSM specified but apparmor not supported by kernel", "security profile"),
    ("restore", "cpu: CPU instruction capabilities do not match run time", "CPU lacks features"),
    ("restore", "cpu: FPU feature required by image is not supported on host (fpu:1)", "CPU lacks features"),
    ("restore", "cpu: CPU xfeatures has unsupported bits (0x40000)", "CPU lacks features"),
    ("restore", "cpu: CPU xsave size mismatch (2696/832)", "CPU lacks features"),
    ("dump", "Timeout reached. Try to interrupt: 0", "did not stop within"),
    ("dump", "Zombie thread not supported", "threads of it have not"),
    ("restore", "Unexpected EOF on /img/files.img", "truncated or damaged (files.img)"),
    ("restore", "Reached EOF unexpectedly while reading page from image", "truncated or damaged"),
    ("restore", "Img trimmed 3/8", "truncated or damaged (Img trimmed)"),
]


@pytest.mark.parametrize("name", REAL)
def test_real_log(name: str) -> None:
    verb: Verb = "dump" if name.endswith(".dump") else "restore"
    path = LOGS / f"{name}.log"
    cause = log.explain(str(path), verb)
    assert (cause and cause.summary) == REAL[name]
    if cause is not None:
        assert cause.hint
        assert cause.line in path.read_text().replace("\t", "?")


def test_every_fixture_is_in_the_table() -> None:
    assert {path.name.removesuffix(".log") for path in LOGS.iterdir()} == set(REAL)


@pytest.mark.parametrize(("verb", "text", "says"), SOURCE)
def test_text_of_criu(verb: Verb, text: str, says: str) -> None:
    cause = log.explain_text(f"(00.000000) Parsing config file\n{AT}{text}\n{AT}Dumping FAILED.\n", verb)
    assert cause is not None
    assert says in cause.summary
    assert "?" not in cause.summary
    assert cause.line == AT + text


def test_noise_alone_is_no_cause() -> None:
    text = "(00.0) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
    assert log.explain_text(text + "Error: ipv4: Address already assigned.\n", "restore") is None


def test_a_consequence_is_the_cause_only_when_alone() -> None:
    failed = f"{AT}Dumping FAILED.\n"
    alone = log.explain_text(failed, "dump")
    assert alone is not None and alone.summary == "CRIU: Dumping FAILED."
    both = log.explain_text(f"{AT}exited, status=1\n{AT}something new\n{failed}", "dump")
    assert both is not None and both.summary == "CRIU: something new"


def test_a_row_of_the_other_verb_does_not_count() -> None:
    text = f"{AT}Timeout reached. Try to interrupt: 0\n"
    cause = log.explain_text(text, "restore")
    assert cause is not None and cause.summary.startswith("CRIU: ")


def test_a_name_cannot_draw_on_the_terminal() -> None:
    cause = log.explain_text(f"{AT}Can't dump ghost file /a\x1b[2J\x85b of 9 size, increase limit\n", "dump")
    assert cause is not None
    assert "/a?[2J?b" in cause.summary
    assert cause.line.isprintable()


def test_only_the_end_of_a_large_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "dump.log"
    with path.open("wb") as f:
        f.write(f"{AT}External socket is used. \n".encode())
        f.seek(log.TAIL + 1000)
        f.write(f"\n{AT}Some file locks are hold by dumping tasks! \n".encode())
    cause = log.explain(str(path), "dump")
    assert cause is not None and cause.summary == "processes of the container hold file locks"


def test_no_log_no_cause(tmp_path: Path) -> None:
    assert log.explain(str(tmp_path / "dump.log"), "dump") is None
    (tmp_path / "dump.log").write_bytes(b"\xff\xfe(00.1) fine\n")
    assert log.explain(str(tmp_path / "dump.log"), "dump") is None


@given(st.text(), st.sampled_from(["dump", "restore"]))
def test_any_text_is_taken(text: str, verb: Verb) -> None:
    cause = log.explain_text(f"Error {text}", verb)
    assert cause is None or cause.summary
