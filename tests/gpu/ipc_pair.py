# SPDX-License-Identifier: Apache-2.0
"""Two CUDA processes of which one opens the other's memory (cuIpcOpenMemHandle), once /tmp/go is there.

/tmp/count.0 and /tmp/count.1 get the steps of each, for ever; /tmp/opened is there when the memory is.
"""

import ctypes
import os
import subprocess
import sys
import time
from typing import Any

SIZE = 64 << 20


class Handle(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_char * 64)]


def check(code: int) -> None:
    if code:
        raise SystemExit(f"CUDA error {code}")


def context() -> Any:
    cuda, made = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    check(cuda.cuInit(0))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(made), 0))
    check(cuda.cuCtxSetCurrent(made))
    return cuda


def write(name: str, text: str) -> None:
    """A file of /tmp that is there with all of its text or not at all."""
    with open(f"/tmp/{name}.new", "w") as f:
        f.write(text)
    os.replace(f"/tmp/{name}.new", f"/tmp/{name}")


def work(cuda: Any, at: ctypes.c_uint64, number: int) -> None:
    back, count = ctypes.create_string_buffer(8), 0
    while True:
        check(cuda.cuMemcpyDtoH_v2(back, at, ctypes.c_size_t(8)))
        count += 1
        write(f"count.{number}", str(count))
        time.sleep(0.02)


def main() -> None:
    cuda = context()
    at, handle = ctypes.c_uint64(), Handle()
    if len(sys.argv) > 1:
        ctypes.memmove(ctypes.byref(handle), bytes.fromhex(sys.argv[1]), 64)
        write("child", str(os.getpid()))
        while not os.path.exists("/tmp/go"):
            time.sleep(0.05)
        cuda.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), Handle, ctypes.c_uint]
        check(cuda.cuIpcOpenMemHandle_v2(ctypes.byref(at), handle, 1))
        write("opened", "")
        work(cuda, at, 1)
    check(cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(SIZE)))
    check(cuda.cuIpcGetMemHandle(ctypes.byref(handle), at))
    subprocess.Popen([sys.executable, os.path.abspath(__file__), bytes(handle).hex()])
    work(cuda, at, 0)


if __name__ == "__main__":
    main()
