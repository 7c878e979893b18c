# SPDX-License-Identifier: Apache-2.0
"""PyTorch containers on a real NVIDIA GPU: the same promises as tests/node/test_gpu.py, and its numbers.

Run by `make test-gpu` as root on a machine with the driver, PyTorch, criu, runc and crun (or tests/gpu/kit.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.shim.gpu import nvml, tasks
from tests.gpu import results
from tests.gpu.machine import BASE, STAND_IN, Node, Trainer
from tests.gpu.results import report

GPUS, _REASON = results.gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
if not GPUS or STAND_IN:
    pytestmark.append(pytest.mark.skip(reason=f"no NVIDIA GPU and PyTorch here: {_REASON or 'a rehearsal'}"))

HOG = """
import torch, time
x = torch.empty(torch.cuda.mem_get_info()[0] - (1 << 30), dtype=torch.uint8, device="cuda")
print("ready", flush=True)
time.sleep(120)
"""
MANAGED = """
import ctypes, time
cuda, context, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()
cuda.cuInit(0)
cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
cuda.cuCtxSetCurrent(context)
assert cuda.cuMemAllocManaged(ctypes.byref(pointer), ctypes.c_size_t(64 << 20), 1) == 0
print("ready", flush=True)
time.sleep(60)
"""
KILL_AT = ("lock", "checkpoint", "restore", "unlock")


@pytest.fixture(scope="module", params=["runc", "crun"])
def node(request: pytest.FixtureRequest) -> Node:
    return Node(request.param)


@pytest.fixture(scope="module")
def trainer(node: Node) -> Iterator[Trainer]:
    """One training container for the tests of a runtime, which all leave it running."""
    made = Trainer(node, f"trainer-{node.below}", "--gib", "1").start()
    yield made
    made.remove()


def said_ready(code: str) -> subprocess.Popen[bytes]:
    """A Python program that has printed "ready"."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def remove(*paths: Path) -> None:
    """Remove checkpoint directories."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def test_park_and_unpark_20_times(node: Node, trainer: Trainer) -> None:
    spans = []
    for _ in range(20 if node.below == "runc" else 3):
        at = time.monotonic()
        done = json.loads(node.cryoci("park", trainer.name, "--json").stdout)
        parked = time.monotonic()
        assert (done["state"], done["changed"]) == ("parked", True) and done["vram"] > 1 << 30
        with nvml.opened() as management:
            assert trainer.pid not in management.used_by()
        node.cryoci("unpark", trainer.name)
        spans.append((round(parked - at, 2), round(time.monotonic() - parked, 2)))
        trainer.runs_on()
    report(f"park/unpark seconds under {node.below}, {done['vram'] >> 20} MiB", spans)


def test_leave_running_and_restore_of_that_moment(node: Node, trainer: Trainer) -> None:
    """The original and its checkpoint have the same history up to the dump; the restored one goes on from there."""
    where = BASE / f"leave.{node.below}"
    done = json.loads(
        node.cryoci("checkpoint", trainer.name, "-R", "--rootfs", "none", "-o", str(where), "--json").stdout
    )
    report(
        f"checkpoint --leave-running under {node.below}",
        {k: round(v, 2) for k, v in done["seconds"].items()},
    )
    trainer.runs_on()
    at_dump = len(trainer.losses())
    trainer.runs_on()
    before = trainer.losses()
    trainer.end()
    at = time.monotonic()
    trainer.restore(str(where))
    report(f"restore under {node.below}, until two steps were made", round(time.monotonic() - at, 2))
    deadline = time.monotonic() + 30
    while len(after := trainer.losses()) < at_dump + 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    common = min(len(before), len(after))
    assert after[:common] == before[:common]  # every step of its second life computes what the first one did
    remove(where)


def test_through_a_registry(node: Node, trainer: Trainer, registry: str) -> None:
    reference = f"{registry}/gpu/{trainer.name}:1"
    at = time.monotonic()
    said = node.cryoci("checkpoint", trainer.name, "--rootfs", "none", "-o", reference).stdout.decode()
    report(
        f"checkpoint to a registry under {node.below}", (round(time.monotonic() - at, 2), said.splitlines())
    )
    assert trainer.state == {}
    annotations = json.loads(node.cryoci("inspect", reference, "--json").stdout)["annotations"]
    assert json.loads(annotations["io.cryoci.gpu.uuids"]) == [gpu.uuid for gpu in GPUS]
    assert annotations["io.cryoci.gpu.driver"]
    at = time.monotonic()
    trainer.restore(reference)
    report(f"restore from a registry under {node.below}", round(time.monotonic() - at, 2))


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_straight_to_a_registry(below: str, registry: str) -> None:
    """Memory that the driver has brought out is stored with no copy; the container goes on, and comes back."""
    node = Node(below, "-straight", more='[memory]\nengine = "parallel"\n')
    trainer = Trainer(node, f"straight-{below}").start()
    try:
        reference = f"{registry}/gpu/straight:1"
        for words in (["--leave-running"], []):
            at = time.monotonic()
            node.cryoci(
                *("checkpoint", trainer.name, "--straight", "--rootfs", "none", "-o", reference), *words
            )
            seconds = time.monotonic() - at
            report(f"checkpoint --straight {' '.join(words)} under {below}", f"{seconds:.2f} s")
            if words:
                trainer.runs_on()
        assert trainer.state == {}
        trainer.restore(reference)
    finally:
        trainer.remove()


def test_the_tool_is_killed_between_every_two_steps(node: Node, trainer: Trainer) -> None:
    for step in KILL_AT:
        for when in ("before", "after"):
            prelude = (
                "import os\nfrom cryoci.shim.gpu.cuda import Driver\nfrom cryoci.shim.gpu.helper import RemoteDriver\n"
                f"real = Driver.{step}\n"
                "def die(self, *a, **k):\n"
                + (
                    "    os.kill(os.getpid(), 9)\n"
                    if when == "before"
                    else "    real(self, *a, **k); os.kill(os.getpid(), 9)\n"
                )
                + f"Driver.{step} = RemoteDriver.{step} = die\n"
            )
            words = [
                "checkpoint",
                trainer.name,
                "-R",
                "--rootfs",
                "none",
                "-o",
                str(BASE / f"killed.{step}.{when}"),
            ]
            assert node.cryoci(*words, prelude=prelude, check=False).returncode == -9
            assert "back on their GPUs" in node.cryoci("repair", trainer.name).stdout.decode()
            trainer.runs_on()
    remove(*BASE.glob("killed.*"))


def test_the_tool_is_killed_in_the_middle_of_the_driver(node: Node, trainer: Trainer) -> None:
    """After 0.2 to 1.2 s of a checkpoint: the driver goes on without its caller, and repair waits for it."""
    for tenths in (2, 5, 8, 12):
        prelude = (
            f"import os, threading\nthreading.Timer({tenths / 10}, lambda: os.kill(os.getpid(), 9)).start()"
        )
        killed = node.cryoci("park", trainer.name, prelude=prelude, check=False).returncode
        deadline = time.monotonic() + 60
        while (done := node.cryoci("repair", trainer.name, check=False)).returncode != 0:
            assert time.monotonic() < deadline, done.stderr.decode()
            time.sleep(0.5)
        if b"as it was asked for" in done.stdout:
            node.cryoci("unpark", trainer.name)
        trainer.runs_on()
        report(
            f"park killed after {tenths / 10} s under {node.below}", (killed, done.stdout.decode().strip())
        )


def test_refusals(node: Node, trainer: Trainer) -> None:
    """A map to a GPU that is not there, and too little free memory: before anything is restored."""
    where = BASE / f"refused.{node.below}"
    node.cryoci("checkpoint", trainer.name, "--rootfs", "none", "-o", str(where))
    words = ["restore", str(where), "--detach", "--bundle", trainer.bundle]
    assert "no GPU that the container gets here" in node.refused(*words, "--device-map", "0=9")
    (where / "checkpoint/gpu.dump").write_text(
        (where / "checkpoint/gpu.dump")
        .read_text()
        .replace(GPUS[0].name, "NVIDIA L4")
        .replace(GPUS[0].uuid, GPUS[0].uuid[:-4] + "0000")
    )
    said = node.refused(*words)
    assert "NVIDIA L4" in said and GPUS[0].name in said
    text = (where / "checkpoint/gpu.dump").read_text()
    (where / "checkpoint/gpu.dump").write_text(
        text.replace("NVIDIA L4", GPUS[0].name).replace(GPUS[0].uuid[:-4] + "0000", GPUS[0].uuid)
    )
    hog = said_ready(HOG)
    try:
        assert "MiB free, and the checkpoint needs" in node.refused(*words)
        assert trainer.state == {}
    finally:
        hog.kill()
        hog.wait()
    trainer.restore(str(where))
    remove(where)


def test_a_family(node: Node) -> None:
    """A parent and two CUDA children, checkpointed together and restored."""
    family = Trainer(node, f"family-{node.below}", "--gib", "0.5", children=2).start()
    where = BASE / f"family.{node.below}"
    try:
        node.cryoci("park", family.name)
        node.cryoci("unpark", family.name)
        family.runs_on()
        node.cryoci("checkpoint", family.name, "--rootfs", "none", "-o", str(where))
        assert len(json.loads((where / "checkpoint/gpu.dump").read_text())["tasks"]) == 3
        family.restore(str(where))
    finally:
        family.remove()
        remove(where)


def test_data_loader_workers() -> None:
    """Workers by forkserver travel; forked ones hold the GPU's devices, and are refused with the reason."""
    node = Node("runc")
    for context in ("forkserver", "fork"):
        made = Trainer(
            node, f"loader-{context}", "--gib", "0.5", "--workers", "2", "--context", context
        ).start()
        where = BASE / f"loader.{context}"
        try:
            words = ["checkpoint", made.name, "--rootfs", "none", "--link-remap", "-o", str(where)]
            if context == "fork":
                assert "forked" in node.refused(*words)
                made.runs_on()
            else:
                node.cryoci(*words)
                made.restore(str(where))
        finally:
            made.remove()
            remove(where)


@pytest.mark.skipif(len(GPUS) < 2, reason=f"{len(GPUS)} GPU here, and two are needed")
def test_another_gpu(node: Node) -> None:
    """Checkpointed on the first GPU and restored on the second, by the full map of both."""
    made = Trainer(node, f"mover-{node.below}", "--gib", "2").start()
    where = BASE / f"mover.{node.below}"
    try:
        first = made.runs_on()[0]["uuid"]
        node.cryoci("checkpoint", made.name, "--rootfs", "none", "-o", str(where))
        made.restore(str(where), "--device-map", "0=1,1=0")
        second = made.runs_on()[0]["uuid"]
        report(f"moved under {node.below}", (first, second))
        with nvml.opened() as management:
            used = management.used_by()[made.pid]
        assert used[GPUS[1].uuid] > 2 << 30 and used.get(GPUS[0].uuid, 0) < 1 << 30
    finally:
        made.remove()
        remove(where)


def test_managed_memory_is_seen() -> None:
    """What the driver answers with error 801 in the middle; the family test shows that other processes pass."""
    process = said_ready(MANAGED)
    try:
        assert tasks.managed(process.pid)
    finally:
        process.kill()
        process.wait()
