# SPDX-License-Identifier: Apache-2.0
"""[gpu] engine = "plugin" on a real GPU: CRIU's cuda_plugin.so with our cuda-checkpoint, beside the driver engine.

tests/node/test_gpu_plugin.py does the same, and its failures, on the fake driver.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.shim.gpu import plugin
from tests.gpu import results
from tests.gpu.machine import BASE, STAND_IN, Node, Trainer
from tests.gpu.results import report

GPUS, _REASON = results.gpus()
_CRIU = shutil.which("criu") or "/"
_PLACES = (*plugin.DIRECTORIES, f"{Path(_CRIU).resolve().parent.parent}/lib/criu")  # of the kit
LIBDIR = next((one for one in _PLACES if os.path.isfile(f"{one}/{plugin.LIBRARY}")), "")
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
if not GPUS or STAND_IN:
    pytestmark.append(pytest.mark.skip(reason=f"no NVIDIA GPU and PyTorch here: {_REASON or 'a rehearsal'}"))
elif not LIBDIR:
    pytestmark.append(pytest.mark.skip(reason=f"no {plugin.LIBRARY} in {', '.join(_PLACES)}"))


@pytest.fixture(scope="module", params=["runc", "crun"])
def below(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["plugin", "driver"])
def trainer(below: str, request: pytest.FixtureRequest) -> Iterator[Trainer]:
    """A parent and a child that both have CUDA, on a node with this engine."""
    engine = str(request.param)
    node = Node(below, engine=engine, libdir=LIBDIR)
    made = Trainer(node, f"{engine}-{below}", "--gib", "1", children=1).start()
    yield made
    made.remove()


def test_leave_running_then_through_a_registry(trainer: Trainer, registry: str) -> None:
    """With the plugin, CRIU itself has the container's GPU back after a dump that leaves it running."""
    node, where = trainer.node, BASE / trainer.name / "left"
    engine = trainer.name.split("-")[0]
    seconds = {}
    at = time.monotonic()
    node.cryoci("checkpoint", trainer.name, "-R", "--rootfs", "none", "-o", str(where))
    seconds["checkpoint -R"] = time.monotonic() - at
    trainer.runs_on()
    dump = json.loads((where / "checkpoint/gpu.dump").read_text())
    assert (dump["engine"], len(dump["tasks"])) == (engine, 2)
    assert ("cuda_plugin" in dump["plugins"]) == (engine == "plugin")
    reference = f"{registry}/engine/{trainer.name}:1"
    at = time.monotonic()
    node.cryoci("checkpoint", trainer.name, "--rootfs", "none", "-o", reference)
    seconds["checkpoint to a registry"] = time.monotonic() - at
    assert trainer.state == {}
    at = time.monotonic()
    trainer.restore(reference)
    seconds["restore from it, to two steps"] = time.monotonic() - at
    report(f"engine {engine} under {node.below}", {name: round(one, 2) for name, one in seconds.items()})


def test_a_restore_on_no_gpu_is_refused(trainer: Trainer) -> None:
    """A map to a GPU that is not there is refused before CRIU runs; the same directory restores afterwards."""
    node, where = trainer.node, BASE / trainer.name / "refused"
    node.cryoci("checkpoint", trainer.name, "--rootfs", "none", "-o", str(where))
    words = ["restore", str(where), "--detach", "--bundle", trainer.bundle, "--device-map", "0=9"]
    assert "no GPU that the container gets here" in node.refused(*words)
    assert trainer.state == {}
    trainer.restore(str(where))
