# SPDX-License-Identifier: Apache-2.0
"""Two PyTorch processes of which one has a CUDA tensor of the other (torch.multiprocessing); /tmp/count.N as others.

With "cpu": a tensor in shared memory instead, which no driver minds.
"""

import os
import sys
import time
from typing import Any

import torch
import torch.multiprocessing as mp


def count(number: int, tensor: torch.Tensor) -> None:
    own, steps = torch.ones(1024, device="cuda"), 0
    while True:
        assert float(own.sum()) == 1024 and float(tensor.sum()) == 4096
        steps += 1
        with open(f"/tmp/count.{number}.new", "w") as f:
            f.write(str(steps))
        os.replace(f"/tmp/count.{number}.new", f"/tmp/count.{number}")
        time.sleep(0.02)


def child(queue: Any) -> None:
    count(1, queue.get())


if __name__ == "__main__":
    context = mp.get_context("spawn")
    queue = context.Queue()
    context.Process(target=child, args=(queue,), daemon=True).start()
    tensor = torch.ones(4096, device="cpu" if sys.argv[1:] == ["cpu"] else "cuda")
    queue.put(tensor)
    count(0, tensor)
