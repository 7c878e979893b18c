# SPDX-License-Identifier: Apache-2.0
"""A server that is baked once, and restored where it never ran: other state, store, bundle."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest

from tests.gpu import results, serving
from tests.gpu.machine import BASE, Node
from tests.gpu.results import report
from tests.gpu.serving import Server

GPUS, _REASON = results.gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
if not GPUS:
    pytestmark.append(pytest.mark.skip(reason=f"no NVIDIA GPU here: {_REASON}"))

LAYERS = int(os.environ.get("GPU_BAKE_LAYERS", "5"))  # 2.6 GB of weights
PROMPT = list(range(100, 116))
MEMORY = '[memory]\nengine = "parallel"\ndigest = "xxh3"\n'


def test_bake_and_restore_elsewhere(registry: str) -> None:
    """The restored server gives the answers of the baked one; its first comes sooner than that of a cold start."""
    here, there = Node("runc", more=MEMORY), Node("runc", "-elsewhere", more=MEMORY)
    model = serving.make_models("baked", layers=LAYERS)["baked"]
    server = Server(here, "baker", model, 9205)
    reference = f"{registry}/gpu/baked:1"
    restored = Server(there, "baked", model, 9205)
    try:
        answer, cold = server.start(PROMPT)
        truth = [serving.ask(server.port, [n, n + 1])[0]["ids"] for n in range(4)]
        report("bake: GPU memory of the server, GB", round(serving.held(server) / 1e9, 2))
        server.end()
        server.make_bundle()
        words = ["bake", "--bundle", server.bundle, "--rootfs", "none", "--name", "baker", "--json"]
        url = f"http://127.0.0.1:{server.port}/health"
        done = json.loads(here.cryoci(*words, "--ready-http", url, "-o", reference).stdout)
        report("bake: seconds", {k: round(v, 2) for k, v in done["seconds"].items()})
        report(
            "bake: GB, and in the registry", [round(done["image"][k] / 1e9, 2) for k in ("raw_size", "size")]
        )
        assert server.state == {}
        server.remove()
        for name in ("store", "run", "lib"):  # nothing of the first node is there any more
            shutil.rmtree(BASE / name, ignore_errors=True)
        report("bake: cold start to first answer", f"{cold:.2f} s")
        for place in ("cache", "unpacked"):
            began = time.monotonic()
            there.cryoci("warm", "--to", place, reference)
            report(f"bake: warm --to {place}", f"{time.monotonic() - began:.2f} s")
            restored.make_bundle()
            began = time.monotonic()
            timeline = BASE / "bake.json"
            restored.bring_back("gpu/baked:1", "--name", "baked", "--timeline", str(timeline))
            done = time.monotonic() - began
            back = serving.first(restored, restored.port, PROMPT)
            warm = time.monotonic() - began
            assert back["ids"] == answer["ids"] and back["boot"] != answer["boot"]
            assert [serving.ask(restored.port, [n, n + 1])[0]["ids"] for n in range(4)] == truth
            steps = [s for s in json.loads(timeline.read_text())["steps"] if s["seconds"] >= 0.05]
            report("bake: where its seconds are", {s["name"]: round(s["seconds"], 2) for s in steps})
            said = f"{warm:.2f} s, {warm / cold:.2f} of it; the command alone {done:.2f} s"
            report(f"bake: restore to first answer, {place}", said)
            print(restored.log()[-700:])
            restored.remove()
    finally:
        server.remove()
        restored.remove()
        shutil.rmtree(BASE / "store-elsewhere", ignore_errors=True)
