# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's management library: which GPUs this node has, and how much of their memory is whose.

Unlike cuInit it makes no context and takes no memory of a GPU. A GPU is known by its UUID; its index here, its
ordinal in CUDA and its /dev/nvidiaN are three other numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cryoci.errors import NotFoundError, UnsupportedError

LIBRARY = "libnvidia-ml.so.1"
_INSUFFICIENT_SIZE = 7
_NOT_SUPPORTED = 3
_NOT_FOUND = 6


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory is in bytes; `minor` is N of /dev/nvidiaN; `capability` is "9.0"."""

    uuid: str
    name: str
    index: int
    minor: int
    capability: str
    memory: int
    free: int
    mig: bool = False
    persistence: bool = True

    @property
    def key(self) -> bytes:
        """The UUID as the driver's 16 bytes."""
        return uuid_bytes(self.uuid)


def uuid_bytes(uuid: str) -> bytes:
    """ "GPU-xxxxxxxx-xxxx-..." as 16 bytes. Raises ValueError."""
    raw = bytes.fromhex(uuid.removeprefix("GPU-").replace("-", ""))
    if len(raw) != 16:
        raise ValueError(f"{uuid!r} is not the UUID of a GPU")
    return raw


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class _Sample(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("at", ctypes.c_ulonglong),
        ("sm", ctypes.c_uint),
        ("memory", ctypes.c_uint),
        ("encoder", ctypes.c_uint),
        ("decoder", ctypes.c_uint),
    ]


class _Rates(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


@dataclass(frozen=True)
class Busy:
    """How busy a GPU was, in percent of its time: by process; None and `whole` where the driver does not say whose.

    `whole` is None where it says nothing at all, as for a GPU in MIG mode.
    """

    by: dict[int, int] | None
    whole: int | None


class Nvml:
    """The library, initialized. Used by `with opened() as nvml`."""

    def __init__(self, library: Any) -> None:
        self._library = library

    @property
    def driver(self) -> str:
        """Version of the kernel driver, such as "580.159.04"."""
        text = ctypes.create_string_buffer(96)
        self._call("nvmlSystemGetDriverVersion", text, len(text))
        return text.value.decode()

    def gpus(self) -> list[Gpu]:
        """The GPUs of this node, by index. Raises UnsupportedError."""
        return [self._gpu(index, handle) for index, handle in self._handles()]

    def used_by(self, *, mps: bool = False) -> dict[int, dict[str, int]]:
        """{pid: {UUID: bytes}} of processes with a context; with `mps`, of clients of an MPS server."""
        kind = "MPSCompute" if mps else "Compute"
        found: dict[int, dict[str, int]] = {}
        for _, handle in self._handles():
            uuid = self._string("nvmlDeviceGetUUID", handle)
            for process in self._processes(f"nvmlDeviceGet{kind}RunningProcesses_v3", handle):
                used = process.used if process.used != (1 << 64) - 1 else 0  # not told, as in some guests
                found.setdefault(process.pid, {})[uuid] = used
        return found

    def busy(self, since: float) -> dict[str, Busy]:
        """{UUID: how busy} after `since` (Unix time; the driver remembers some seconds). Raises UnsupportedError."""
        found = {}
        for _, handle in self._handles():
            by = self._samples(handle, int(since * 1e6))
            whole = None
            if by is None:
                rates = _Rates()
                code = self._library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates))
                if code != _NOT_SUPPORTED:
                    self._check("nvmlDeviceGetUtilizationRates", code)
                    whole = rates.gpu
            found[self._string("nvmlDeviceGetUUID", handle)] = Busy(by, whole)
        return found

    def _samples(self, handle: ctypes.c_void_p, since: int) -> dict[int, int] | None:
        """{pid: the most percent in one sample}; None when this GPU does not say."""
        name, room = "nvmlDeviceGetProcessUtilization", ctypes.c_uint(64)
        function = getattr(self._library, name, None)
        while function is not None:
            made = (_Sample * room.value)()
            code = function(handle, made, ctypes.byref(room), ctypes.c_ulonglong(since))
            if code == _NOT_SUPPORTED:
                break
            if code == _NOT_FOUND:
                return {}
            if code != _INSUFFICIENT_SIZE:
                self._check(name, code)
                busy: dict[int, int] = {}
                for sample in made[: room.value]:
                    if sample.at > since:
                        busy[sample.pid] = max(busy.get(sample.pid, 0), sample.sm)
                return busy
            room.value += 16
        return None

    def _processes(self, name: str, handle: ctypes.c_void_p) -> list[_Process]:
        function = getattr(self._library, name, None)
        if function is None:
            return []
        room = ctypes.c_uint(64)
        while True:
            made = (_Process * room.value)()
            code = function(handle, ctypes.byref(room), made)
            if code == _NOT_SUPPORTED:
                return []
            if code != _INSUFFICIENT_SIZE:
                self._check(name, code)
                return list(made[: room.value])
            room.value += 16  # it says how many there are, and more may come

    def _handles(self) -> Iterator[tuple[int, ctypes.c_void_p]]:
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        for index in range(count.value):
            handle = ctypes.c_void_p()
            self._call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
            yield index, handle

    def _gpu(self, index: int, handle: ctypes.c_void_p) -> Gpu:
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        minor, major = ctypes.c_int(), ctypes.c_int()
        self._call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
        node = ctypes.c_uint()
        self._call("nvmlDeviceGetMinorNumber", handle, ctypes.byref(node))
        mig, pending = ctypes.c_uint(), ctypes.c_uint()
        mig_code = self._library.nvmlDeviceGetMigMode(handle, ctypes.byref(mig), ctypes.byref(pending))
        mode = ctypes.c_uint()
        mode_code = self._library.nvmlDeviceGetPersistenceMode(handle, ctypes.byref(mode))
        return Gpu(
            uuid=self._string("nvmlDeviceGetUUID", handle),
            name=self._string("nvmlDeviceGetName", handle),
            index=index,
            minor=node.value,
            capability=f"{major.value}.{minor.value}",
            memory=memory.total,
            free=memory.free,
            mig=mig_code == 0 and mig.value == 1,
            persistence=mode_code != 0 or mode.value == 1,
        )

    def _string(self, name: str, handle: ctypes.c_void_p) -> str:
        text = ctypes.create_string_buffer(96)
        self._call(name, handle, text, len(text))
        return text.value.decode()

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code != 0:
            self._library.nvmlErrorString.restype = ctypes.c_char_p
            text = self._library.nvmlErrorString(code)
            said = text.decode() if text else "unknown error"
            raise UnsupportedError(f"{name} failed: {said} ({code})", hint="see what nvidia-smi says")


@contextmanager
def opened(library: str = LIBRARY) -> Iterator[Nvml]:
    """NVML for a with block. Raises NotFoundError without the library, UnsupportedError when it fails."""
    try:
        loaded = ctypes.CDLL(library)
    except OSError as e:
        raise NotFoundError(
            f"NVIDIA's management library cannot be loaded: {e}",
            hint="install the NVIDIA driver on this node",
        ) from e
    nvml = Nvml(loaded)
    nvml._call("nvmlInit_v2")
    try:
        yield nvml
    finally:
        loaded.nvmlShutdown()
