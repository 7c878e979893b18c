# SPDX-License-Identifier: Apache-2.0
"""What the driver cannot checkpoint, in containers on a real GPU: refused by cause, and it runs on."""

from __future__ import annotations

import collections
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cryoci.shim.gpu import nvml, tasks
from tests.gpu import results
from tests.gpu.machine import STAND_IN, STARTUP, Node, Program
from tests.gpu.results import report

GPUS, _REASON = results.gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(270)]
if not GPUS or STAND_IN:
    pytestmark.append(pytest.mark.skip(reason=f"no NVIDIA GPU and PyTorch here: {_REASON or 'a rehearsal'}"))

MANAGED = """
import ctypes, os, time
cuda, context, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()
assert cuda.cuInit(0) == 0 and cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemAllocManaged(ctypes.byref(pointer), ctypes.c_size_t(64 << 20), 1) == 0
count = 0
while True:
    count += 1
    with open("/tmp/count.0.new", "w") as f:
        f.write(str(count))
    os.replace("/tmp/count.0.new", "/tmp/count.0")
    time.sleep(0.02)
"""


class Counting(Program):
    """A container whose processes count in /tmp/count.N."""

    # NVLink multicast can put a shared host's GPUs out of service; unless it is named NCCL does not take lo
    environment = (
        "NCCL_NVLS_ENABLE=0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST=1",
        "NVSHMEM_DISABLE_NVLS=1",
        "NCCL_SOCKET_IFNAME=lo",
    )

    def __init__(self, node: Node, name: str, argv: list[str], count: int) -> None:
        super().__init__(node, name)
        self._argv = argv
        self._count = count
        if argv[0].startswith("/app/"):
            self.files = (argv[0].removeprefix("/app/"),)

    def argv(self) -> list[str]:
        return ["python3", "-u", *self._argv]

    def file(self, name: str) -> Path:
        """A file of its /tmp."""
        return Path(f"/proc/{self.pid}/root/tmp/{name}")

    def counts(self, seconds: float = 30) -> None:
        """Wait until each process has counted on."""
        before = [self._read(n) for n in range(self._count)]
        end = time.monotonic() + seconds
        while any(self._read(n) < was + 2 for n, was in enumerate(before)):
            assert time.monotonic() < end and self.state.get("status") == "running", self.log()
            time.sleep(0.05)

    def _read(self, number: int) -> int:
        try:
            return int(self.file(f"count.{number}").read_text())
        except (OSError, ValueError, KeyError):
            return 0


@contextmanager
def running(name: str, argv: list[str], count: int) -> Iterator[Counting]:
    """Such a container, once all of it counts."""
    made = Counting(Node("runc"), name, argv, count)
    try:
        made.run()
        yield made
    finally:
        made.remove()


def test_managed_memory() -> None:
    with running("managed", ["-c", MANAGED], 1) as made:
        made.counts(STARTUP)
        said = made.node.refused("park", made.name)
        assert "managed (UVM) memory" in said
        made.counts()


def look(pid: int) -> collections.Counter[str]:
    """What /proc shows of a process that may tell of shared GPU memory: mappings and open files of devices and shm."""
    found: collections.Counter[str] = collections.Counter()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(("/dev/", "/memfd:", "anon_inode:")):
            found[f"map {fields[1]} {fields[5]}"] += 1
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[f"fd {re.sub(r'[0-9]{4,}', 'N', str(fd.readlink()))}"] += 1
        except OSError:
            continue
    found["threads"] = len(list(Path(f"/proc/{pid}/task").iterdir()))
    return found


def test_cuda_ipc() -> None:
    """A program's own handle: /proc shows nothing of it. Drivers before 610 take the processes out, and bring the one
    that had opened the handle never back (H200, driver 580): the error says what it is.
    """
    with running("ipc", ["/app/ipc_pair.py"], 2) as made:
        end = time.monotonic() + STARTUP
        while not made.file("child").exists():
            assert time.monotonic() < end, made.log()
            time.sleep(0.05)
        inner = int(made.file("child").read_text())
        child = next(pid for pid in tasks.members(made.pid) if tasks.look(pid).inner == inner)
        time.sleep(1)
        before = look(child)
        made.file("go").touch()
        while not made.file("opened").exists():
            assert time.monotonic() < end, made.log()
            time.sleep(0.05)
        made.counts()
        after = look(child)
        report(
            "ipc: what opening a handle changes in /proc", {"more": after - before, "less": before - after}
        )
        at = time.monotonic()
        try:
            # its locks alone may take 30 s (machine.CONFIG), and cuInit some on a host with many GPUs
            done = made.node.cryoci("park", made.name, check=False, timeout=90)
        except subprocess.TimeoutExpired:
            report("ipc: the driver's answer to a checkpoint", "none within 90 s")
            raise
        said = (done.stderr or done.stdout).decode().strip().splitlines()
        report(f"ipc: park ended with {done.returncode} after {time.monotonic() - at:.1f} s", said[:2])
        if done.returncode != 0:
            made.counts()
            return
        back = made.node.cryoci("unpark", made.name, check=False)
        report(f"ipc: unpark ended with {back.returncode}", back.stderr.decode().strip().splitlines()[:2])
        if back.returncode == 0:
            made.counts()
        else:
            assert "CUDA IPC" in back.stderr.decode()


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_tensors_of_another_process(kind: str) -> None:
    """PyTorch's are told by their counters, and refused; those in host memory are not taken for them."""
    with running("tensors", ["/app/tensor_pair.py", kind], 2) as made:
        made.counts(STARTUP)
        with nvml.opened() as management:
            driver = management.driver
        if kind == "cuda" and int(driver.split(".")[0]) < 610:
            said = made.node.refused("park", made.name)
            assert "has sent PyTorch tensors on a GPU to others" in said
        else:
            made.node.cryoci("park", made.name)
            made.node.cryoci("unpark", made.name)
        made.counts()


@pytest.mark.skipif(len(GPUS) < 2, reason=f"{len(GPUS)} GPU here, and two are needed")
def test_nccl_between_processes() -> None:
    with running("nccl", ["/app/nccl_pair.py"], 2) as made:
        made.counts(STARTUP)
        with nvml.opened() as management:
            driver = management.driver
        if int(driver.split(".")[0]) >= 610:
            pytest.skip(f"driver {driver} may be able to: it is not refused")
        said = made.node.refused("checkpoint", made.name, "--rootfs", "none", "-o", "/srv/cryoci-gpu/never")
        assert "speak NCCL with each other" in said
        made.counts()
