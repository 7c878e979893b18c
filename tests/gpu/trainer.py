# SPDX-License-Identifier: Apache-2.0
"""A PyTorch training loop with a large resident tensor, for ever; what it says tells whether anything was lost.

    trainer.py STATUS [--gib N] [--children N] [--workers N] [--context fork|forkserver]

The model's loss and the tensor's checksum depend on every step before, so a lost or repeated step shows.
"""

import argparse
import json
import multiprocessing
import os
import time
from typing import Any

import torch


class Numbers(torch.utils.data.Dataset):  # type: ignore[misc]
    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(256, generator=generator)


def train(status: str, gib: float, workers: int, context: str | None) -> None:
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda:0")
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)).to(
        device
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ballast = torch.arange(int(gib * (1 << 27)), dtype=torch.int64, device=device)
    wanted = int(ballast.sum())
    data = torch.utils.data.DataLoader(
        Numbers(), batch_size=8, num_workers=workers, multiprocessing_context=context if workers else None
    )
    for step, batch in enumerate(data):
        loss = model(batch.to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        good = int(ballast.sum()) == wanted
        said = {
            "pid": os.getpid(),
            "step": step,
            "loss": loss.item().hex(),
            "good": good,
            "time": time.time(),
            "uuid": str(torch.cuda.get_device_properties(0).uuid),
        }
        with open(status + ".new", "w") as f:
            json.dump(said, f)
        os.replace(status + ".new", status)
        with open(status + ".losses", "a") as f:
            f.write(f"{step} {said['loss']}\n")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("status")
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--children", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--context", default="forkserver")
    asked = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    spawn = multiprocessing.get_context("spawn")
    for n in range(asked.children):
        spawn.Process(target=train, args=(f"{asked.status}.{n}", asked.gib, 0, None), daemon=True).start()
    train(asked.status, asked.gib, asked.workers, asked.context)


if __name__ == "__main__":
    main()
