# SPDX-License-Identifier: Apache-2.0
"""Containers of model_server.py, and who asks them."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cryoci.shim.gpu import nvml, preflight
from tests.gpu.machine import BASE, HERE, STAND_IN, STARTUP, Node, Program

TOKENS = 8
_ROOM = 60 << 30  # bytes of host memory for two models in tmpfs and parked
HOG = """
import ctypes, time
cuda, context, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()
assert cuda.cuInit(0) == 0 and cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
if hasattr(cuda, "cuCtxSetCurrent"):
    assert cuda.cuCtxSetCurrent(context) == 0
assert cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t({size})) == 0
print("ready", flush=True)
time.sleep(600)
"""
_GROW = """
import mmap
for _ in range({pieces}):
    m = mmap.mmap(-1, 4 << 30)
    for at in range(0, 4 << 30, 4096):
        m[at] = 1
    print(end=".", flush=True)
    globals().setdefault("kept", []).append(m)
"""


class Server(Program):
    """A container `name` that serves the model in `directory` on 127.0.0.1:`port`; with app hooks it `sleeps`."""

    files = ("model_server.py",)
    environment = ("HF_HUB_OFFLINE=1",)

    def __init__(self, node: Node, name: str, directory: Path, port: int, *, sleeps: bool = False) -> None:
        super().__init__(node, name)
        self.model = directory
        self.binds = (directory,)
        self.port = port
        if sleeps:
            self.annotations = {
                "io.cryoci.pre-checkpoint": f"http: POST http://127.0.0.1:{port}/sleep",
                "io.cryoci.post-restore": f"http: POST http://127.0.0.1:{port}/wake_up",
            }

    def argv(self) -> list[str]:
        return ["python3", "-u", "/app/model_server.py", "serve", str(self.model), "--port", str(self.port)]

    def start(self, prompt: list[int]) -> tuple[Any, float]:
        """Start it; returns its first answer, and the seconds from its start to that."""
        began = time.monotonic()
        self.run()
        return first(self, self.port, prompt), time.monotonic() - began


def make_models(*names: str, layers: int) -> dict[str, Path]:
    """Directories of models with other weights each, in memory as a page cache would have them."""
    grow()
    base = BASE / "models"
    base.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names, 1):
        if not (base / name).exists():
            argv = [sys.executable, str(HERE / "model_server.py"), "make", str(base / name)]
            words = ["--seed", str(seed), "--layers", str(layers)]
            subprocess.run([*argv, *words], check=True, timeout=120)
    return {name: base / name for name in names}


def grow() -> None:
    """Some virtual machines get their memory only when it is used; cryoci looks at what is free, and would refuse."""
    free = preflight.available_memory()
    if not STAND_IN and free < _ROOM:
        pieces = (min(_ROOM, free + (40 << 30)) >> 32) + 1
        began = time.monotonic()
        # alone, so that running out of memory ends it and not the tests
        try:
            subprocess.run([sys.executable, "-c", _GROW.format(pieces=pieces)], check=False, timeout=60)
        except subprocess.TimeoutExpired:
            print("the machine's memory grows slowly")
        print(f"memory {free >> 30} -> {preflight.available_memory() >> 30} GiB", time.monotonic() - began)


def ask(port: int, prompt: list[int], timeout: float = 60) -> tuple[Any, float]:
    """What the server at `port` answers, and after how many seconds. Raises OSError, HTTPException."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", "/generate", json.dumps({"ids": prompt, "tokens": TOKENS}))
        answer = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return answer, time.monotonic() - began


def first(server: Program, port: int, prompt: list[int]) -> Any:
    """The first answer of a server that is starting."""
    end = time.monotonic() + STARTUP
    while True:
        try:
            return ask(port, prompt)[0]
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < end and server.state.get("status") != "stopped", server.log()
            time.sleep(0.02)


class Hog:
    """A process that leaves only `free` bytes of the first GPU to others."""

    def __init__(self, free: int) -> None:
        with nvml.opened() as management:
            now = management.gpus()[0].free
        context = 0 if STAND_IN else 600 << 20  # what its own context takes besides
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOG.format(size=now - free - context)], stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"

    def end(self) -> None:
        """Give it back."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def held(server: Program) -> int:
    """Bytes of GPU memory that a container holds."""
    with nvml.opened() as management:
        return sum(management.used_by()[server.pid].values())


def huge_pages(choice: str) -> str:
    """Set the machine's transparent huge pages; returns what they were, "" where that cannot be done."""
    place = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        before = place.read_text().partition("[")[2].partition("]")[0]
        place.write_text(choice)
    except OSError:
        return ""
    return before
