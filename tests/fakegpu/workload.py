# SPDX-License-Identifier: Apache-2.0
"""A program that computes on a (fake) GPU for ever, and says at each step whether its GPU memory is what it was.

    workload.py STATUS [--mib N] [--device N] [--children N] [--library PATH] [--pause-ms N]

STATUS is a file that gets {"pid", "count", "good", "uuid", "children": [...]} at each step, atomically. Each child is
a process with GPU memory of its own, whose status is in STATUS.N. It uses ctypes alone.
"""

import argparse
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import time


def check(code: int) -> None:
    if code:
        sys.exit(f"CUDA error {code}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("status")
    parser.add_argument("--mib", type=int, default=4)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--children", type=int, default=0)
    parser.add_argument("--library", default="libcuda.so.1")
    parser.add_argument("--kernel-ms", type=int, default=0)
    parser.add_argument("--pause-ms", type=int, default=10)
    asked = parser.parse_args()
    for n in range(asked.children):
        words = [
            sys.executable,
            os.path.abspath(__file__),
            f"{asked.status}.{n}",
            "--library",
            asked.library,
        ]
        words += ["--mib", str(asked.mib), "--device", str(asked.device), "--pause-ms", str(asked.pause_ms)]
        subprocess.Popen(words)
    cuda = ctypes.CDLL(asked.library)
    check(cuda.cuInit(0))
    context = ctypes.c_void_p()
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), asked.device))
    size = asked.mib << 20
    data = bytearray(os.urandom(1 << 20) * asked.mib)
    pointer = ctypes.c_uint64()
    check(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)))
    there = ctypes.c_uint64(pointer.value)
    data[:8] = bytes(8)
    raw = (ctypes.c_char * size).from_buffer(data)
    check(cuda.cuMemcpyHtoD_v2(there, raw, ctypes.c_size_t(size)))
    wanted = hashlib.sha256(memoryview(data)[8:]).hexdigest()
    back = (ctypes.c_char * size)()
    uuid = (ctypes.c_ubyte * 16)()
    good = True
    while True:
        check(cuda.cuMemcpyDtoH_v2(back, there, ctypes.c_size_t(size)))
        seen = memoryview(back).cast("B")
        count = int.from_bytes(seen[:8], "little") + 1  # the step counter itself lives on the GPU
        good = good and hashlib.sha256(seen[8:]).hexdigest() == wanted
        check(cuda.cuMemcpyHtoD_v2(there, count.to_bytes(8, "little"), ctypes.c_size_t(8)))
        check(cuda.cuDeviceGetUuid_v2(uuid, asked.device))
        if asked.kernel_ms:
            check(cuda.fakeKernel(asked.kernel_ms))
        status = {"pid": os.getpid(), "count": count, "good": good, "uuid": bytes(uuid).hex()}
        with open(asked.status + ".new", "w") as f:
            json.dump(status, f)
        os.replace(asked.status + ".new", asked.status)
        time.sleep(asked.pause_ms / 1000)


if __name__ == "__main__":
    main()
