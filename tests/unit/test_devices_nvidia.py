# SPDX-License-Identifier: Apache-2.0
"""A specification from a driver's tree. The tree is written after a real H200 node with driver 580.159.04
(/proc/driver/nvidia, Debian's library layout); only the sizes of files are not."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from cryoci.cli.cdi import command
from cryoci.errors import NotFoundError
from cryoci.shim.devices import cdi, nvidia
from cryoci.shim.devices.settle import settle

VERSION = "580.159.04"
UUIDS = ("GPU-6e2f2d1c-0b3a-4c5d-8e9f-0a1b2c3d4e5f", "GPU-7f3f3d2c-1b4a-5c6d-9e0f-1a2b3c4d5e6f")
INFORMATION = """Model: \t\t NVIDIA H200
IRQ:   \t\t {irq}
GPU UUID: \t {uuid}
Video BIOS: \t 96.00.bc.00.01
Bus Type: \t PCIe
DMA Size: \t 52 bits
DMA Mask: \t 0xfffffffffffff
Bus Location: \t {bus}
Device Minor: \t {minor}
GPU Firmware: \t 580.159.04
GPU Excluded:\t No
"""
MODULE = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@host)  Tue\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
)


def driver(
    root: Path, *, minors: tuple[int, ...] = (0, 1), libraries: str = "/usr/lib/x86_64-linux-gnu"
) -> None:
    """Write the tree of a host with one GPU for each of `minors` below `root`."""
    proc = root / "proc/driver/nvidia"
    for number, minor in enumerate(minors):
        bus = f"0000:{0x19 + number:02x}:00.0"
        (proc / "gpus" / bus).mkdir(parents=True)
        text = INFORMATION.format(irq=16 + number, uuid=UUIDS[number], bus=bus, minor=minor)
        (proc / "gpus" / bus / "information").write_text(text)
    (proc / "version").write_text(MODULE)
    (root / "dev").mkdir()
    for name in [f"nvidia{m}" for m in minors] + ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"]:
        (root / "dev" / name).touch()
    where = root / libraries.lstrip("/")
    where.mkdir(parents=True)
    for stem in ("libcuda", "libnvidia-ml", "libnvidia-ptxjitcompiler", "libEGL_nvidia"):
        (where / f"{stem}.so.{VERSION}").touch()
        (where / f"{stem}.so.1").symlink_to(f"{stem}.so.{VERSION}")
        (where / f"{stem}.so").symlink_to(f"{stem}.so.1")
    (where / f"libnvidia-gpucomp.so.{VERSION}").touch()
    (where / "libcuda.so.570.1").touch()  # what an upgrade has left
    firmware = root / "lib/firmware/nvidia" / VERSION
    firmware.mkdir(parents=True)
    for name in ("gsp_ga10x.bin", "gsp_tu10x.bin", "other.bin"):
        (firmware / name).touch()
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    (root / "usr/bin/nvidia-smi").touch()


def test_gpus_by_index_uuid_and_all(tmp_path: Path) -> None:
    driver(tmp_path, minors=(3, 1))
    spec = nvidia.specification(str(tmp_path))
    nodes = {d["name"]: [n["path"] for n in d["containerEdits"]["deviceNodes"]] for d in spec["devices"]}
    assert nodes == {
        "0": ["/dev/nvidia3"], UUIDS[0]: ["/dev/nvidia3"], "1": ["/dev/nvidia1"], UUIDS[1]: ["/dev/nvidia1"],
        "all": ["/dev/nvidia3", "/dev/nvidia1"],
    }  # fmt: skip
    assert [d.name for d in cdi.check(json.loads(json.dumps(spec)), "x")] == list(nodes)
    assert [n["path"] for n in spec["containerEdits"]["deviceNodes"]] == [
        "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools",
    ]  # fmt: skip
    first = nvidia.inventory(str(tmp_path))[0]
    assert first == nvidia.Gpu(0, 3, UUIDS[0], "NVIDIA H200", "0000:19:00.0")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the tree is one of x86-64")
@pytest.mark.parametrize("place", ["/usr/lib/x86_64-linux-gnu", "/usr/local/nvidia/lib64", "/usr/lib64"])
def test_no_path_in_a_container_has_the_drivers_version_but_where_it_is_asked_for(
    tmp_path: Path, place: str
) -> None:
    driver(tmp_path, libraries=place)
    edits = nvidia.specification(str(tmp_path))["containerEdits"]
    mounts = {m["containerPath"]: m["hostPath"] for m in edits["mounts"]}
    names = (
        "libcuda.so.1",
        "libnvidia-gpucomp.so." + VERSION,
        "libnvidia-ml.so.1",
        "libnvidia-ptxjitcompiler.so.1",
    )
    assert mounts == {
        **{
            f"{target}/{name}": f"{place}/{name.removesuffix('.1').removesuffix('.' + VERSION)}.{VERSION}"
            for target in ("/usr/lib/x86_64-linux-gnu", "/usr/lib64")
            for name in names
        },
        **{f"/lib/firmware/nvidia/{VERSION}/{n}": f"/lib/firmware/nvidia/{VERSION}/{n}"
           for n in ("gsp_ga10x.bin", "gsp_tu10x.bin")},
        "/usr/bin/nvidia-smi": "/usr/bin/nvidia-smi",
    }  # fmt: skip
    assert "hooks" not in edits


def test_without_a_driver_or_nodes_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no NVIDIA driver is loaded"):
        nvidia.specification(str(tmp_path))
    assert nvidia.devices(str(tmp_path)) == [] and nvidia.inventory(str(tmp_path)) == []
    driver(tmp_path)
    for path in (tmp_path / "dev").iterdir():
        path.unlink()
    with pytest.raises(NotFoundError, match="there is no GPU with its /dev/nvidiaN"):
        nvidia.specification(str(tmp_path))


def test_loader_cache_names_further_directories(tmp_path: Path) -> None:
    driver(tmp_path, libraries="/opt/nv/lib")
    (tmp_path / "etc").mkdir()
    cache = b"glibc-ld.so.cache1.1\0libcuda.so.1\0/opt/nv/lib/libcuda.so.1\0libz.so.1\0/lib/libz.so.1\0"
    (tmp_path / "etc/ld.so.cache").write_bytes(cache)
    found = nvidia.libraries(str(tmp_path), VERSION, ("/usr/lib64",))
    assert found["libcuda.so.1"] == f"/opt/nv/lib/libcuda.so.{VERSION}"


def test_cli_generates_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(tmp_path)
    target = tmp_path / "cdi" / "nvidia.json"
    done = CliRunner().invoke(command, ["generate", "--root", str(tmp_path), "-o", str(target)])
    assert done.exit_code == 0, done.output
    assert target.stat().st_mode & 0o777 == 0o644
    config = tmp_path / "config.toml"
    config.write_text(f'[devices]\ncdi-directories = ["{target.parent}"]\n')
    monkeypatch.setattr("cryoci.shim.paths.config_file", lambda: str(config))
    listed = CliRunner().invoke(command, ["list", "--quiet"])
    assert listed.output.split() == sorted(f"nvidia.com/gpu={n}" for n in ("0", "1", "all", *UUIDS))
    shown = CliRunner().invoke(command, ["list"])
    assert "/dev/nvidia1" in shown.output and str(target) in shown.output
    (target.parent / "bad.json").write_text("{")
    shown = CliRunner().invoke(command, ["list", "--json"])
    assert "bad.json" in shown.stderr and json.loads(shown.stdout)[0]["name"] == "nvidia.com/gpu=0"
    config.write_text(f'[devices]\ncdi-directories = ["{tmp_path}/none"]\n')
    monkeypatch.setattr(nvidia, "devices", list)
    shown = CliRunner().invoke(command, ["list"])
    assert shown.stdout == "" and f"no CDI specification in {tmp_path}/none" in shown.stderr
    assert CliRunner().invoke(command, ["list", "--quiet"]).output == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes need root")
def test_settling_makes_and_removes_nodes_and_follows_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "dev").mkdir(parents=True)
    outside.mkdir()
    real = os.open
    monkeypatch.setattr(
        os,
        "open",
        lambda path, *a, **k: real(str(root) if str(path).startswith("/proc/") else path, *a, **k),
    )
    node = {
        "path": "/dev/nvidia3",
        "type": "c",
        "major": 1,
        "minor": 3,
        "fileMode": 0o666,
        "uid": 5,
        "gid": 6,
    }
    deep = {"path": "/dev/dri/renderD128", "type": "c", "major": 1, "minor": 5, "fileMode": 0o660}
    os.mknod(root / "dev/nvidia0", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    (root / "dev/file").write_text("stays")
    wanted = {"nodes": [node, deep], "stale": ["/dev/nvidia0", "/dev/file", "/dev/none", "/dev/../x"]}
    assert settle(1, wanted) == ["-/dev/nvidia0", "+/dev/nvidia3", "+/dev/dri/renderD128"]
    made = (root / "dev/nvidia3").stat()
    assert (made.st_rdev, made.st_uid, made.st_gid, made.st_mode & 0o777) == (os.makedev(1, 3), 5, 6, 0o666)
    assert settle(1, wanted) == [] and (root / "dev/file").exists()
    assert settle(1, {"nodes": [{**node, "minor": 7}]}) == ["+/dev/nvidia3"]
    (root / "dev/evil").symlink_to(outside)
    with pytest.raises(Exception, match="cannot make device /dev/evil/x"):
        settle(1, {"nodes": [{**node, "path": "/dev/evil/x"}]})
    assert list(outside.iterdir()) == []
