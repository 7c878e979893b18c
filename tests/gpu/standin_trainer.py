# SPDX-License-Identifier: Apache-2.0
"""trainer.py's words and files without PyTorch, by the driver's own functions: to try the suite on the fake driver.

The loss of each step is a hash over that of the step before and bytes on the GPU; the last loss is there too.
"""

import argparse
import ctypes
import hashlib
import json
import os
import random
import time

_STATE = 64  # bytes on the GPU that change


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("status")
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--children", type=int, default=0)
    asked = parser.parse_args()
    data = bytes(_STATE) + random.Random(7).randbytes(int(asked.gib * (4 << 20)))
    cuda, context, at = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_uint64()

    def check(code: int) -> None:
        if code:
            raise SystemExit(f"CUDA error {code}")

    check(cuda.cuInit(0))
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0))
    check(cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(len(data))))
    check(cuda.cuMemcpyHtoD_v2(at, data, ctypes.c_size_t(len(data))))
    time.sleep(1)  # stands for the start of PyTorch
    back = ctypes.create_string_buffer(len(data))
    step = 0
    while True:
        check(cuda.cuMemcpyDtoH_v2(back, at, ctypes.c_size_t(len(data))))
        loss = hashlib.sha256(back.raw).digest()
        check(cuda.cuMemcpyHtoD_v2(at, loss, ctypes.c_size_t(len(loss))))
        said = {
            "pid": os.getpid(),
            "step": step,
            "loss": loss.hex(),
            "good": back.raw[_STATE:] == data[_STATE:],
        }
        with open(asked.status + ".new", "w") as f:
            json.dump(said, f)
        os.replace(asked.status + ".new", asked.status)
        with open(asked.status + ".losses", "a") as f:
            f.write(f"{step} {said['loss']}\n")
        step += 1
        time.sleep(0.02)


if __name__ == "__main__":
    main()
