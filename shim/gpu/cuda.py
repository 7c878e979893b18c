# SPDX-License-Identifier: Apache-2.0
"""The checkpoint functions of the CUDA driver, called on other processes from outside.

    RUNNING -lock-> LOCKED -checkpoint-> CHECKPOINTED -restore-> LOCKED -unlock-> RUNNING

After a checkpoint all GPU memory of the process is anonymous memory of its own, and nothing of it is open on a
GPU. The functions and their 64-byte arguments are those of CUDA's driver API reference, group CUDA_CHECKPOINT
(r570, CUDA 12.8; GPU pairs since r580, CUDA 13.0). A call blocks its thread without Python's lock. None of
them needs cuInit in the caller but restore, and that only where persistence mode is off.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Mapping

from cryoci.errors import CryociError, NotFoundError, UnsupportedError
from cryoci.shim.gpu import halted

LIBRARY = "libcuda.so.1"
MINIMUM = 12080  # cuDriverGetVersion of r570
PAIRS = 13000  # r580: restore takes a map of GPUs
CUSTOM = 13040  # r615: a caller may move the bytes


class State(enum.IntEnum):
    """CUprocessState. The last two exist since CUDA 13.4, while its caller moves the bytes itself."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    RESTORING = 5

    def __str__(self) -> str:
        return self.name.lower()


class Code(enum.IntEnum):
    """CUresult, as far as the checkpoint functions are known to return it."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    DEINITIALIZED = 4
    NO_DEVICE = 100
    ILLEGAL_STATE = 401
    NOT_READY = 600
    LAUNCH_FAILED = 719
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801
    SYSTEM_NOT_READY = 802
    OPERATING_SYSTEM = 304
    UNKNOWN = 999


# What NVIDIA's documents and the threads of NVIDIA/cuda-checkpoint give as causes.
_HINTS = {
    Code.OUT_OF_MEMORY: "the GPU that it goes to has too little free memory, or MIG is enabled",
    Code.NOT_READY: "its GPU work did not end in time: give the lock longer ([gpu] lock-timeout), or look for a "
    "kernel or a collective that waits for a process outside of the container",
    Code.NOT_SUPPORTED: "managed (UVM) memory, CUDA IPC, MIG or MPS is in use, or the driver is too old for it",
    Code.NOT_PERMITTED: "run it as root, on the host",
    Code.OPERATING_SYSTEM: "the driver could not reach the process: it needs root, /dev/nvidia* and /proc of the "
    "process; after a restore that failed for want of memory this process cannot be restored any more",
    Code.INVALID_VALUE: "the device map must name every GPU that the process saw, and others of the same chip; or the "
    "process had opened GPU memory of another one (CUDA IPC), which drivers before 610 take out and never bring back",
    Code.ILLEGAL_STATE: "something else operates on the process, such as CRIU's CUDA plugin or cuda-checkpoint",
}


class CudaError(CryociError):
    """A function of the driver failed on a process."""

    advice = "see the driver's Xid messages (`dmesg | grep -i nvrm`); `cryoci doctor` looks for known causes"

    def __init__(self, verb: str, pid: int, code: int, text: str) -> None:
        name = Code(code) if code in Code._value2member_map_ else None
        super().__init__(
            f"the CUDA driver could not {verb} process {pid}: {text} (error {code})",
            hint=_HINTS.get(name) if name is not None else None,
        )
        self.verb = verb
        self.pid = pid
        self.code = code
        self.text = text


class _LockArgs(ctypes.Structure):
    _fields_ = [
        ("timeout_ms", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    ]


class _GpuPair(ctypes.Structure):
    _fields_ = [("old", ctypes.c_ubyte * 16), ("new", ctypes.c_ubyte * 16)]


class _RestoreArgs(ctypes.Structure):
    _fields_ = [
        ("pairs", ctypes.POINTER(_GpuPair)),
        ("count", ctypes.c_uint),
        ("reserved", ctypes.c_ubyte * 44),
        ("reserved1", ctypes.c_uint64),
    ]


class _Args(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_uint64 * 8)]


class Driver:
    """The driver's library. Raises NotFoundError without one, UnsupportedError when it is too old."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as e:
            raise NotFoundError(
                f"the CUDA driver's library cannot be loaded: {e}",
                hint="install the NVIDIA driver on this node, and run `ldconfig`",
            ) from e
        version = ctypes.c_int()
        if self._library.cuDriverGetVersion(ctypes.byref(version)) != 0:
            raise UnsupportedError("the CUDA driver does not say its version", hint="reinstall the driver")
        self.version = version.value  # 13000 is CUDA 13.0
        if self.version < MINIMUM or not hasattr(self._library, "cuCheckpointProcessLock"):
            raise UnsupportedError(
                f"the CUDA driver (CUDA {self.version // 1000}.{self.version % 1000 // 10}) cannot checkpoint",
                hint="install driver 570 (CUDA 12.8) or newer; 580 to restore on another GPU",
            )

    @property
    def custom_storage(self) -> bool:
        """Can a caller move the bytes itself (r615, CUDA 13.4)?"""
        found = ctypes.c_void_p()
        get = getattr(self._library, "cuGetProcAddress_v2", None)
        if get is None or self.version < CUSTOM:
            return False
        get.argtypes = [
            ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p,
        ]  # fmt: skip
        name = b"cuCheckpointOperationComplete"
        return get(name, ctypes.byref(found), CUSTOM, 0, None) == 0 and found.value is not None

    def init(self) -> None:
        """cuInit: costs up to 0.3 s a GPU, and keeps the driver's state alive for this process' time."""
        code = self._library.cuInit(0)
        if code != 0:
            raise CudaError("initialize for", 0, code, self._text(code))

    def restore_thread(self, pid: int) -> int | None:
        """Thread id by which CUDA lives in `pid`; None when it is no CUDA process. Raises CudaError."""
        tid = ctypes.c_int()
        code = self._library.cuCheckpointProcessGetRestoreThreadId(pid, ctypes.byref(tid))
        if code in (Code.INVALID_VALUE, Code.NOT_INITIALIZED):
            return None
        self._check("find the restore thread of", pid, code)
        return tid.value

    def state(self, pid: int) -> State:
        """The state of `pid`. Raises CudaError, with INVALID_VALUE for what is no CUDA process.

        This and all below raise ConflictError for a process that stands still (halted.py).
        """
        value = ctypes.c_int()
        self._operate("query", "GetState", pid, ctypes.byref(value))
        return State(value.value)

    def lock(self, pid: int, timeout_ms: int = 0) -> None:
        """Wait for its GPU work, and hold its CUDA calls. 0 waits for ever; it runs on after a timeout."""
        args = _LockArgs(timeout_ms=timeout_ms)
        self._operate("lock", "Lock", pid, ctypes.byref(args))

    def checkpoint(self, pid: int) -> None:
        """Bring its GPU memory into its own memory, and let go of its GPUs."""
        args = _Args()
        self._operate("checkpoint", "Checkpoint", pid, ctypes.byref(args))

    def restore(self, pid: int, pairs: Mapping[bytes, bytes] | None = None) -> None:
        """The way back; it is locked then. `pairs` maps UUIDs (16 bytes), every GPU that it saw in it."""
        args = _RestoreArgs()
        if pairs:
            made = (_GpuPair * len(pairs))()
            for one, (old, new) in zip(made, pairs.items(), strict=True):
                one.old[:] = old
                one.new[:] = new
            args.pairs = made
            args.count = len(pairs)
        self._operate("restore", "Restore", pid, ctypes.byref(args))

    def unlock(self, pid: int) -> None:
        """Let its CUDA calls go on."""
        args = _Args()
        self._operate("unlock", "Unlock", pid, ctypes.byref(args))

    def _operate(self, verb: str, name: str, pid: int, args: object) -> None:
        """A call that `pid` itself has a part in."""
        halted.refuse(pid)
        self._check(verb, pid, getattr(self._library, f"cuCheckpointProcess{name}")(pid, args))

    def _check(self, verb: str, pid: int, code: int) -> None:
        if code != 0:
            raise CudaError(verb, pid, code, self._text(code))

    def _text(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value:
            return text.value.decode(errors="replace")
        return "unknown error"
