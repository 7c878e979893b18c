# SPDX-License-Identifier: Apache-2.0
"""An image against a node: each check fails on the wrong node and passes on the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryoci.shim.doctor import image
from cryoci.shim.doctor.check import Verdict
from tests.unit.doctor_node import Given, build

NODE = Given(
    {
        "/proc/sys/kernel/osrelease": "6.12.1\n",
        "/proc/cpuinfo": "processor: 0\nflags\t: fpu avx avx2\n",
        "/sys/module/nvidia/version": "580.159.04\n",
    },
    {
        "criu": "echo Version: 4.1.1",
        "runc": "",
        "nvidia-smi": "echo 'NVIDIA H200, 1000'",
        "podman": "echo sha256:aa",
    },
)
GOOD = {
    "host.arch": "amd64",
    "cpu.flags": "fpu avx",
    "host.kernel": "6.12.0-amd64",
    "criu.version": "4.1",
    "runtime.name": "runc",
    "gpu.driver": "580.95.05",
    "gpu.names": '["NVIDIA H200"]',
    "gpu.memory": str(900 << 20),
    "engine.name": "podman",
    "image.digest": "sha256:aa",
    "image.name": "registry/x:1",
}


def test_the_node_it_was_made_for(tmp_path: Path) -> None:
    assert {c.verdict for c in image.examine(build(tmp_path, NODE), GOOD)} == {"ok"}


def test_an_image_that_says_nothing(tmp_path: Path) -> None:
    assert {c.verdict for c in image.examine(build(tmp_path, NODE), {})} == {"skip"}


@pytest.mark.parametrize(
    ("changed", "check", "verdict", "words"),
    [
        ({"host.arch": "arm64"}, "image.architecture", "fail", "it is aarch64"),
        ({"cpu.flags": "avx512f fpu"}, "image.cpu", "fail", "avx512f"),
        ({"host.kernel": "6.18.1"}, "image.kernel", "warn", "6.18"),
        ({"criu.version": "4.2.1"}, "image.criu", "warn", "4.2.1"),
        ({"runtime.name": "crun"}, "image.runtime", "fail", "crun"),
        ({"gpu.driver": "590.1"}, "image.gpu-driver", "fail", "590.1"),
        ({"gpu.names": '["NVIDIA L4"]'}, "image.gpu-chip", "fail", "NVIDIA H200"),
        ({"gpu.memory": str(2000 << 20)}, "image.gpu-chip", "fail", "2000 MiB are needed"),
        ({"image.digest": "sha256:bb"}, "image.base", "warn", "pulls it"),
    ],
)
def test_another_node(
    tmp_path: Path, changed: dict[str, str], check: str, verdict: Verdict, words: str
) -> None:
    found = {c.id: c for c in image.examine(build(tmp_path, NODE), {**GOOD, **changed})}
    assert found[check].verdict == verdict and words in found[check].found and found[check].fix
    assert all(c.verdict == "ok" for name, c in found.items() if name != check)
