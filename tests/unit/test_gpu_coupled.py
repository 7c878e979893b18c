# SPDX-License-Identifier: Apache-2.0
"""Processes that share GPU memory, told by what real ones had: PyTorch 2.11 with NCCL 2.28 on two H200s."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cryoci.shim.gpu import coupled

_BEGIN = """
import mmap, os, socket, sys
kept = []
def shared(name, size):
    with open(f"/dev/shm/{name}", "w+b") as f:
        f.truncate(size)
        kept.append(mmap.mmap(f.fileno(), size))
    os.unlink(f"/dev/shm/{name}")
"""


@contextmanager
def process(code: str) -> Iterator[int]:
    """Another process that has done `code`; its pid."""
    made = subprocess.Popen(
        [sys.executable, "-c", f"{_BEGIN}\n{code}\nprint(flush=True)\nsys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert made.stdout is not None and made.stdout.readline() == b"\n"
        yield made.pid
    finally:
        made.communicate()


def name(text: str) -> str:
    return f"{text}{os.getpid()}"


def test_by_its_socket() -> None:
    """The default: NCCL hands memory over by file descriptors. Its name has NULs up to the end."""
    address = f"\0tmp/nccl-socket-0-{name('d11a')}".ljust(108, "\0")
    with process(
        f"kept.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)); kept[0].bind({address!r})"
    ) as pid:
        assert coupled.nccl(pid)
        with process("") as other:  # the same table of sockets, and none of them its own
            assert not coupled.nccl(other)


def test_by_its_files() -> None:
    """With NCCL_CUMEM_ENABLE=0."""
    with process(f"shared({name('nccl-')!r}, 1 << 20)") as pid:
        assert coupled.nccl(pid)


def test_by_its_threads() -> None:
    with process("import ctypes; ctypes.CDLL(None).prctl(15, b'NCCL Progress 0')") as pid:
        assert coupled.nccl(pid)


def test_not_by_its_library() -> None:
    """PyTorch maps libnccl, and starts watchers of process groups, whoever speaks."""
    with process("import ctypes; ctypes.CDLL(None).prctl(15, b'pt_nccl_watchdg')") as pid:
        assert not coupled.nccl(pid)


@pytest.mark.parametrize(
    ("size", "counts", "wanted"),
    [
        (80064, {0: 1, 9999: 2}, 2),
        (80064, {}, 0),  # all given back
        (80064 + mmap.PAGESIZE, {0: 1}, 0),  # a tensor in shared memory, of another size
    ],
)
def test_tensors_that_others_use(size: int, counts: dict[int, int], wanted: int) -> None:
    code = [f"shared({name('torch_')!r}, {size})", "kept[0][0] = 1"]  # the header's own count
    code += [f"kept[0][{64 + 8 * n}] = {count}" for n, count in counts.items()]
    with process("\n".join(code)) as pid:
        assert coupled.tensors(pid) == wanted


def test_a_process_that_is_gone() -> None:
    with process("") as pid:
        pass
    assert not Path(f"/proc/{pid}").exists()
    assert not coupled.nccl(pid) and coupled.tensors(pid) == 0
