# SPDX-License-Identifier: Apache-2.0
"""An image against a node: each check fails on the wrong node and passes on the right one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cryoci.cli.doctor import command as doctor
from cryoci.errors import CryociError
from cryoci.shim.criu import cpuinfo
from cryoci.shim.doctor import image
from cryoci.shim.doctor.check import Verdict
from tests.unit import kubelet_archives
from tests.unit.criu_images import message
from tests.unit.doctor_node import Given, build
from tests.unit.images import make_checkpoint

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
        ({"gpu.memory": str(2000 << 20)}, "image.gpu-memory", "fail", "2000 MiB are needed"),
        ({"gpu.names": '["NVIDIA H200", "NVIDIA H200"]'}, "image.gpu-chip", "fail", "here: NVIDIA H200"),
        ({"image.digest": "sha256:bb"}, "image.base", "warn", "pulls it"),
    ],
)
def test_another_node(
    tmp_path: Path, changed: dict[str, str], check: str, verdict: Verdict, words: str
) -> None:
    found = {c.id: c for c in image.examine(build(tmp_path, NODE), {**GOOD, **changed})}
    assert found[check].verdict == verdict and words in found[check].found and found[check].fix
    assert all(c.verdict in ("ok", "skip") for name, c in found.items() if name != check)


def test_a_restore_goes_on_as_many_gpus_as_it_came_from(tmp_path: Path) -> None:
    """Two half empty GPUs are not room for what was on one."""
    given = Given({}, {"nvidia-smi": "echo 'NVIDIA H200, 800'; echo 'NVIDIA H200, 700'"})
    found = image.vram(build(tmp_path, given), {**GOOD, "gpu.memory": str(900 << 20)})
    assert found.verdict == "fail" and "800 MiB are free on 1" in found.found


def images(at: Path, *words: int) -> str:
    """A directory with a cpuinfo.img of these capability words."""
    at.mkdir()
    cpu = message(f1=1, f2=6, f3=143, f4=8, f5=2, f6=[*words, *[0] * (19 - len(words))], f7="Test CPU")
    entry = message(f1=cpu)
    head = (0x54564319).to_bytes(4, "little") + (0x39512029).to_bytes(4, "little")
    (at / cpuinfo.NAME).write_bytes(head + len(entry).to_bytes(4, "little") + entry)
    return str(at)


FPU, AVX = 1, 1 << 28  # word 0, word 4
SAYS = 'echo "Error (criu/arch/x86/cpu.c:274): cpu: CPU xsave size mismatch (1/2)"; exit 1'


@pytest.mark.parametrize(
    ("criu", "words", "verdict", "found"),
    [
        ("exit 0", (FPU, 0, 0, 0, AVX), "ok", "CRIU agrees, made on Test CPU"),
        (SAYS, (FPU, 0, 0, 0, AVX, 0, 1 << 16), "fail", "missing: fma4, made on Test CPU"),
        (SAYS, (FPU,), "warn", "xsave size mismatch"),
        (None, (FPU, 0, 0, 0, AVX), "ok", "all 2"),
        (None, (FPU, 0, 0, 0, AVX, 0, 1 << 16), "fail", "missing: fma4"),
    ],
)
def test_cpuinfo(
    tmp_path: Path, criu: str | None, words: tuple[int, ...], verdict: Verdict, found: str
) -> None:
    given = Given(NODE.files, {} if criu is None else {"criu": criu})
    check = image.cpu(build(tmp_path / "n", given), {"images": images(tmp_path / "i", *words)})
    assert (check.verdict, found in check.found) == (verdict, True), check


def test_a_damaged_cpuinfo_says_nothing(tmp_path: Path) -> None:
    whole = cpuinfo.read(images(tmp_path / "i", FPU, 0, 0, 0, AVX))
    assert cpuinfo.flags(whole) == {"fpu", "avx"} and cpuinfo.model(whole) == "Test CPU"
    for end in range(len(whole)):
        assert cpuinfo.flags(whole[:end]) <= {"fpu", "avx"}
    assert cpuinfo.read(tmp_path) == b"" and cpuinfo.model(b"") == ""


def test_a_checkpoint_directory(tmp_path: Path) -> None:
    """As an image of it: what it says of itself, and what gpu.dump says of GPUs."""
    made = make_checkpoint(tmp_path / "ck", pages=1 << 20)
    (made / "checkpoint/gpu.dump").write_bytes(kubelet_archives.gpu_dump("NVIDIA H100 80GB HBM3"))
    said = CliRunner().invoke(doctor, [str(made), "--json"])
    checks = {one["id"]: one for one in json.loads(said.stdout)["checks"]}
    assert checks["image.gpu-driver"]["verdict"] != "skip"
    assert "image.gpu-chip" in checks and checks["image.criu"]["verdict"] != "ok"
    bare = make_checkpoint(tmp_path / "bare", pages=1 << 20)
    said = CliRunner().invoke(doctor, [str(bare), "--json"])
    checks = {one["id"]: one for one in json.loads(said.stdout)["checks"]}
    assert checks["image.gpu-driver"]["verdict"] == "skip"
    said = CliRunner().invoke(doctor, [str(tmp_path)])
    assert said.exit_code != 0 and isinstance(said.exception, CryociError)
