# SPDX-License-Identifier: Apache-2.0
"""The checks of a container, on processes that really hold what CRIU cannot dump; GPU maps are laid out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cryoci.shim.doctor import container, container_gpu
from cryoci.shim.doctor.check import Check, Facts
from cryoci.shim.doctor.container import Subject
from tests.unit.doctor_node import Given, build

READY = "print('ready', flush=True); import sys; sys.stdin.read()"


@contextmanager
def process(code: str = "pass") -> Iterator[int]:
    """A Python process that has run `code`, until the block ends; its pid."""
    argv = [sys.executable, "-c", f"{code}\n{READY}"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid
        child.stdin.close()


def real(*pids: int, **values: object) -> Subject:
    return Subject(Facts(), pids, {}, **values)  # type: ignore[arg-type]


def laid(tmp_path: Path, files: dict[str, str | None], *pids: int, mounts: tuple[str, ...] = ()) -> Subject:
    spec = {"mounts": [{"destination": m} for m in mounts]}
    return Subject(build(tmp_path, Given(files)), pids or (1,), spec)


def verdicts(subject: Subject) -> dict[str, str]:
    return {c.id: c.verdict for c in container_gpu.examine(subject)}


def test_a_plain_process_passes() -> None:
    with process("import os, select; os.pipe(); select.epoll()") as pid:
        subject = real(pid, memory=1 << 20, space=1 << 30)
        for check in (c for c in container.CHECKS if c is not container.mounts):
            assert check(subject).verdict == "ok", check(subject)


IO_URING = """
import ctypes, platform
fd = ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(256))
assert fd >= 0
"""
FAULTS: list[tuple[str, Callable[[Subject], Check], str]] = [
    ("import os; fd = os.open('/dev/kmsg', os.O_RDONLY)", container.descriptors, "device /dev/kmsg"),
    ("import os, tempfile; f = tempfile.TemporaryFile(dir='/var/tmp'); f.truncate(3 << 20)",
     container.ghosts, "3145728 bytes"),
    ("import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); "
     "a = s.accept()", container.tcp, "2 connections"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "check", "words"), FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_a_fault_is_found(code: str, check: Callable[[Subject], Check], words: str) -> None:
    with process(code) as pid:
        found = check(real(pid))
    assert found.verdict == "fail" and words in found.found and found.fix, found


def test_io_uring() -> None:
    try:
        with process(IO_URING) as pid:
            found = container.io_uring(real(pid))
    except AssertionError:
        assert Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() != "0"
        return
    assert found.verdict == "fail" and "UV_USE_IO_URING" in found.fix


def test_what_the_operator_allows_is_no_fault() -> None:
    with process(FAULTS[2][0]) as pid:
        assert container.tcp(real(pid, tcp_established=True)).verdict == "ok"
    with process(FAULTS[1][0]) as pid:
        assert container.ghosts(real(pid, ghost_limit=4 << 20)).verdict == "ok"


def test_a_traced_process() -> None:
    trace = "import ctypes, os; assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0"  # PTRACE_TRACEME
    with process(trace) as pid:
        found = container.traced(real(pid))
    assert found.verdict == "fail" and f"process {pid} is traced" in found.found


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_a_process_with_a_namespace_of_its_own() -> None:
    with (
        process() as first,
        process("import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0") as second,
    ):
        found = container.namespaces(real(first, second))
    assert found.verdict == "fail" and "user namespace" in found.found


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_a_file_of_another_mount_namespace(tmp_path: Path) -> None:
    """As stdout on a file of the node: the mount it is on is not among the container's own."""
    code = f"f = open({str(tmp_path / 'log')!r}, 'w'); import ctypes, os; os.dup2(0, 2)\n"
    with process(code + "assert ctypes.CDLL(None).unshare(0x20000) == 0") as pid:
        found = container.outside(real(pid))
    assert found.verdict == "fail" and "/log" in found.found


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")
def test_a_terminal_of_the_caller() -> None:
    code = "import ctypes, os, pty; m, s = pty.openpty(); os.dup2(s, 2)\n"
    with process(code + "assert ctypes.CDLL(None).unshare(0x20000) == 0") as pid:
        found = container.outside(real(pid))
    assert (
        found.verdict == "fail" and "terminal /dev/pts/" in found.found and "--console-socket" in found.fix
    ), found


def test_a_container_in_a_user_namespace() -> None:
    spec = {"linux": {"namespaces": [{"type": "pid"}, {"type": "user"}]}}
    assert container.user(Subject(Facts(), (1,), spec)).verdict == "fail"
    assert container.user(real(1)).verdict == "ok"


def test_mounts(tmp_path: Path) -> None:
    root = "1 0 0:1 / / rw - overlay overlay rw\n2 1 0:2 / /proc rw - proc proc rw\n3 1 0:2 / /data rw - ext4 a rw\n"
    hook = "4 2 0:5 / /proc/driver/nvidia/gpus/0000:00:04.0 rw master:5 - tmpfs tmpfs rw\n"
    quiet = "5 1 0:5 / /mnt/own rw - tmpfs tmpfs rw\n"
    cases = {"a": (root, "ok"), "b": (root + hook, "fail"), "c": (root + quiet, "warn")}
    for name, (text, verdict) in cases.items():
        subject = laid(tmp_path / name, {"/proc/1/mountinfo": text}, mounts=("/proc", "/data"))
        found = container.mounts(subject)
        assert found.verdict == verdict, found


MAPS = {
    "cupti": ("/usr/lib/libcuda.so.1\n/usr/lib/libcupti.so.12\n", "fail", "CUPTI"),
    "rdma": ("/usr/lib/libcuda.so.1\n/dev/infiniband/uverbs0\n", "fail", "RDMA"),
    "plain": ("/usr/lib/libcuda.so.1\n/dev/nvidia0\n", "ok", "process 1"),
    "none": ("/usr/bin/python3\n", "skip", "no process uses CUDA"),
}


@pytest.mark.parametrize("case", MAPS)
def test_gpu_maps(tmp_path: Path, case: str) -> None:
    text, verdict, words = MAPS[case]
    found = container_gpu.programs(laid(tmp_path, {"/proc/1/maps": text}))
    assert found.verdict == verdict and words in found.found, found


UVM = "7f0000000000-7f0000200000 rw-s 00000000 00:06 1 /dev/nvidia-uvm\n"


@pytest.mark.parametrize(
    ("maps", "verdict"), [("/usr/bin/python3\n", "skip"), (UVM, "ok"), (UVM + UVM, "fail")]
)
def test_managed_memory(tmp_path: Path, maps: str, verdict: str) -> None:
    """As seen on an H100: one mapping of a context, one more of each managed range."""
    found = container_gpu.managed(laid(tmp_path, {"/proc/1/maps": maps}))
    assert found.verdict == verdict, found


CUDA = {"/proc/1/maps": "/dev/nvidia0\n", "/proc/2/maps": "/dev/nvidia0\n"}
NCCL = {"/proc/1/task/9/comm": "NCCL Service\n", "/proc/2/task/8/comm": "NCCL Progress\n"}
TORCH = {
    **CUDA,
    "/proc/1/maps": "/dev/nvidia0\n00001000-00015000 rw-s 00000000 00:28 5  /dev/shm/torch_7_1_0 (deleted)\n",
    "/proc/1/mem": "\0" * (4096 + 64) + "\1" + "\0" * 79_999,
}


@pytest.mark.parametrize(
    ("files", "verdict", "words"),
    [
        ({"/proc/1/maps": ""}, "skip", "no process"),
        (CUDA, "ok", "no sign"),
        ({**CUDA, "/proc/1/task/9/comm": "python3\n"}, "ok", "no sign"),
        ({**CUDA, **NCCL}, "fail", "1, 2 speak NCCL"),
        ({**CUDA, **NCCL, "/sys/module/nvidia/version": "610.1"}, "warn", "speak NCCL"),
        (TORCH, "fail", "1 PyTorch tensors of process 1"),
        ({**TORCH, "/sys/module/nvidia/version": "610.1"}, "warn", "PyTorch tensors"),
        ({**TORCH, "/proc/1/mem": "\0" * 90_000}, "ok", "no sign"),
        (
            {**CUDA, "/proc/2/maps": "/dev/nvidia0\n/dev/shm/nccl-ofZRkr (deleted)\n"},
            "fail",
            "processes 2 speak NCCL",
        ),
    ],
)
def test_shared_gpu_memory(tmp_path: Path, files: dict[str, str | None], verdict: str, words: str) -> None:
    found = container_gpu.shared(laid(tmp_path, dict(files), 1, 2))
    assert (found.verdict, words in found.found) == (verdict, True), found
    assert container_gpu.programs(laid(tmp_path / "x", dict(CUDA), 1, 2)).verdict == "warn"


MANY_SOCKETS = """
import socket
kept = [socket.socket(*kind) for kind in ((2, 1), (10, 1), (2, 2), (10, 2), (1, 1), (1, 2), (1, 5), (16, 3))]
"""


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [((2, 1, 262), "MPTCP", "multipathtcp=0"), ((40, 1, 0), "AF_VSOCK", "close it")],
)
def test_a_socket_that_criu_does_not_dump(kind: tuple[int, int, int], name: str, hint: str) -> None:
    """Multipath TCP is what Go's servers listen with since 1.24."""
    with process(MANY_SOCKETS) as pid:
        assert container.sockets(real(pid)).found == "8 sockets"
    try:
        socket.socket(*kind).close()
    except OSError as e:
        pytest.skip(f"this kernel has none: {e}")
    with process(f"{MANY_SOCKETS}\nother = socket.socket{kind}") as pid:
        found = container.sockets(real(pid))
    assert found.verdict == "fail" and f"kind {name}" in found.found and hint in found.fix, found


def test_memory() -> None:
    assert container.memory(real(1, memory=2 << 30, space=1 << 30)).verdict == "fail"
    assert container.memory(real(1, memory=2 << 30)).verdict == "skip"


def test_a_process_that_is_gone_breaks_nothing() -> None:
    assert set(verdicts(real(0x3FFFFFFF)).values()) <= {"ok", "skip"}
