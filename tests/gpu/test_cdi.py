# SPDX-License-Identifier: Apache-2.0
"""`cryoci cdi generate` on a real host: what it names is there, and a container gets a GPU by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import results
from tests.gpu.machine import BASE, STAND_IN, Node, Program
from tests.gpu.results import report

GPUS, _REASON = results.gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(90)]
if not GPUS or STAND_IN:
    pytestmark.append(pytest.mark.skip(reason=f"no NVIDIA GPU and PyTorch here: {_REASON or 'a rehearsal'}"))

MUST = ("libcuda.so.1", "libnvidia-ml.so.1")


def devices(spec: dict[str, Any]) -> dict[str, list[str]]:
    """Nodes of each device by its name."""
    return {
        one["name"]: [node["path"] for node in one["containerEdits"].get("deviceNodes", [])]
        for one in spec["devices"]
    }


def test_generated_specification() -> None:
    node = Node("runc")
    spec = json.loads(node.cryoci("cdi", "generate").stdout)
    listed = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, check=True, timeout=30
    ).stdout.decode()
    uuids = re.findall(r"GPU \d+: .*\(UUID: (GPU-[0-9a-f-]+)\)", listed)
    found = devices(spec)
    assert set(found) == {*(str(n) for n in range(len(uuids))), *uuids, "all"}
    for gpu in GPUS:
        assert found[gpu.uuid] == [f"/dev/nvidia{gpu.minor}"] == found[str(gpu.index)]
    edits = spec["containerEdits"]
    for path in (*found["all"], *(one["path"] for one in edits["deviceNodes"])):
        assert os.path.exists(path), path
    mounts = {one["containerPath"]: one["hostPath"] for one in edits["mounts"]}
    gone = [path for path in mounts.values() if not os.path.exists(path)]
    assert gone == []
    names = {os.path.basename(path) for path in mounts}
    assert set(MUST) <= names, sorted(names)
    version = Path("/sys/module/nvidia/version").read_text().strip()
    real = {os.path.basename(os.path.realpath(path)) for path in mounts.values()}
    stale = [one for one in real if re.search(r"\.so\.\d{3}\.", one) and not one.endswith(version)]
    assert stale == []
    report("cdi: devices", sorted(found))
    report("cdi: nodes of all", [one["path"] for one in edits["deviceNodes"]])
    report("cdi: files", sorted(names))


class Looker(Program):
    """Says which GPUs PyTorch sees, and ends."""

    driver_folder = False

    def argv(self) -> list[str]:
        code = (
            "import torch; print('SEES', [str(torch.cuda.get_device_properties(n).uuid) "
            "for n in range(torch.cuda.device_count())], float(torch.ones(8, device='cuda').sum()), flush=True)"
        )
        return ["python3", "-c", code]

    def give_devices(self, spec: dict[str, Any]) -> None:
        """None but what the annotation asks for."""
        spec["linux"]["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
        spec["annotations"] = {"io.cryoci.gpus": "nvidia.com/gpu=0"}


def test_a_container_gets_a_gpu_by_name() -> None:
    node = Node("runc")
    looker = Looker(node, "looker")
    try:
        looker.make_bundle()
        argv = ["run", "--bundle", looker.bundle, looker.name]
        done = node.runtime(*argv)
        said = done.stdout.decode() + done.stderr.decode()
        seen = re.search(r"SEES \['([^']*)'\] 8\.0", said)
        assert done.returncode == 0 and seen is not None, said
        assert GPUS[0].uuid.endswith(seen[1].removeprefix("GPU-"))
        report("cdi: nvidia.com/gpu=0 sees", seen[1])
    finally:
        looker.remove()
        assert not (BASE / "looker").exists()
