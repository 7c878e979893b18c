# SPDX-License-Identifier: Apache-2.0
"""Two processes, a GPU each, that add numbers by NCCL for ever; /tmp/count.N gets the steps of each."""

import os
import sys
import time

import torch
import torch.distributed as dist


def work(rank: int) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method="file:///tmp/meet", rank=rank, world_size=2)
    count = 0
    while True:
        one = torch.ones(1024, device="cuda")
        dist.all_reduce(one)
        assert float(one.sum()) == 2048
        count += 1
        with open(f"/tmp/count.{rank}.new", "w") as f:
            f.write(str(count))
        os.replace(f"/tmp/count.{rank}.new", f"/tmp/count.{rank}")
        time.sleep(0.02)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        torch.multiprocessing.get_context("spawn").Process(target=work, args=(1,), daemon=True).start()
        work(0)
