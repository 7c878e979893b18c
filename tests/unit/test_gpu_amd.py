# SPDX-License-Identifier: Apache-2.0
"""AMD: topologies compared field by field, the plugin and the kernel's interface checked.

The trees are written from the kernel's format (drivers/gpu/drm/amd/amdkfd/kfd_topology.c: one directory a
node with gpu_id, name, properties, mem_banks/N, io_links/N). They are not taken from hardware.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConfigError, ImageError, NotFoundError, UnsupportedError
from cryoci.shim.gpu import amd, kfd

MI300X = {
    "cpu_cores_count": 0, "simd_count": 1216, "mem_banks_count": 1, "caches_count": 1068, "io_links_count": 2,
    "p2p_links_count": 0, "cpu_core_id_base": 0, "simd_id_base": 2147487744, "max_waves_per_simd": 8,
    "lds_size_in_kb": 64, "gds_size_in_kb": 0, "num_gws": 64, "wave_front_size": 64, "array_count": 32,
    "simd_arrays_per_engine": 1, "cu_per_simd_array": 10, "simd_per_cu": 4, "max_slots_scratch_cu": 32,
    "gfx_target_version": 90402, "vendor_id": 4098, "device_id": 29857, "location_id": 1280, "domain": 0,
    "drm_render_minor": 128, "hive_id": 0, "num_sdma_engines": 2, "num_sdma_xgmi_engines": 14,
    "num_sdma_queues_per_engine": 8, "num_cp_queues": 24, "max_engine_clk_fcompute": 2100,
    "local_mem_size": 0, "fw_version": 166, "capability": 744515200, "debug_prop": 1511,
    "sdma_fw_version": 22, "unique_id": 1234567, "num_xcc": 8, "max_engine_clk_ccompute": 3700,
}  # fmt: skip
TWIN: dict[str, Any] = {"node": 1, "gpu_id": 7, "name": "", "properties": {}, "links": []}
BANK = {"heap_type": 2, "size_in_bytes": 206141652992, "flags": 0, "width": 8192, "mem_clk_max": 1300}


def entry(path: Path, values: dict[str, int]) -> None:
    path.mkdir(parents=True)
    (path / "properties").write_text("".join(f"{k} {v}\n" for k, v in values.items()))


def tree(
    root: Path,
    *gpus: dict[str, int],
    xgmi: tuple[tuple[int, int], ...] = (),
    bank: dict[str, int] | None = None,
) -> str:
    """A topology with one CPU, and GPU nodes 1, 2... that have MI300X's properties with changes."""
    entry(root / "nodes/0", {"cpu_cores_count": 96, "simd_count": 0})
    (root / "nodes/0/gpu_id").write_text("0\n")
    for number, changes in enumerate(gpus, 1):
        node = root / f"nodes/{number}"
        entry(node, {**MI300X, "drm_render_minor": 127 + number, **changes})
        (node / "gpu_id").write_text(f"{1000 * number}\n")
        (node / "name").write_text("ip discovery\n")
        entry(node / "mem_banks/0", {**BANK, **(bank or {})})
        ends = [(2, 0)] + [(11, b if a == number else a) for a, b in xgmi if number in (a, b)]
        for place, (kind, end) in enumerate(ends):
            entry(node / f"io_links/{place}", {"type": kind, "node_from": number, "node_to": end})
    return str(root)


def test_capture_takes_gpus_their_memory_and_links(tmp_path: Path) -> None:
    value = json.loads(json.dumps(kfd.capture(tree(tmp_path, {}, {}, xgmi=((1, 2),)))))
    first, second = kfd.parse(value)
    assert (first.node, first.gpu_id, first.links, second.links) == (1, 1000, (2,), (1,))
    assert first.properties["vram_size"] == 206141652992 and first.properties["vram_public"] == 0
    assert second.render == "/dev/dri/renderD129"
    with pytest.raises(NotFoundError, match="no AMD GPU driver"):
        kfd.capture(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("change", "off", "field"),
    [
        ({}, "", None),
        ({"unique_id": 9, "location_id": 7, "drm_render_minor": 130}, "", None),
        *[({name: 3}, "", name) for name in kfd._EQUAL if not name.startswith("vram")],
        ({"fw_version": 165}, "", "fw_version 166.* has 165"),
        ({"fw_version": 167}, "", None),
        ({"fw_version": 165}, "KFD_FW_VER_CHECK", None),
        ({"sdma_fw_version": 1}, "", "sdma-fw-ver-check"),
        ({"caches_count": 1}, "", "caches-count-check"),
        ({"num_gws": 1}, "KFD_NUM_GWS_CHECK", None),
        ({"capability": 1}, "", "capability"),
        ({"capability": 1}, "KFD_CAPABILITY_CHECK", None),
        ({"device_id": 1}, "KFD_CAPABILITY_CHECK", "device_id"),
    ],
)  # fmt: skip
def test_the_field_that_differs_is_named(
    tmp_path: Path, change: dict[str, int], off: str, field: str | None
) -> None:
    there = kfd.parse(kfd.capture(tree(tmp_path / "a", {})))
    here = kfd.parse(kfd.capture(tree(tmp_path / "b", change)))
    if field is None:
        assert list(kfd.match(there, here, frozenset({off}))) == [1000]
    else:
        with pytest.raises(UnsupportedError) as caught:
            kfd.match(there, here, frozenset({off}))
        assert re.search(field, str(caught.value))


@pytest.mark.parametrize(
    ("bank", "field"),
    [
        ({"size_in_bytes": 1}, "vram_size"),
        ({"heap_type": 1}, "vram_public"),
        ({"size_in_bytes": 1 << 40}, None),
    ],
)
def test_memory(tmp_path: Path, bank: dict[str, int], field: str | None) -> None:
    there = kfd.parse(kfd.capture(tree(tmp_path / "a", {})))
    here = kfd.parse(kfd.capture(tree(tmp_path / "b", {}, bank=bank)))
    found = kfd.difference(there[0], here[0])
    assert (found[0] if found else None) == field


def test_counts_links_and_a_permutation(tmp_path: Path) -> None:
    def gpus(name: str, *changes: dict[str, int], xgmi: tuple[tuple[int, int], ...] = ()) -> list[kfd.Gpu]:
        return kfd.parse(kfd.capture(tree(tmp_path / name, *changes, xgmi=xgmi)))

    other = {"device_id": 29858}
    assert {k: g.node for k, g in kfd.match(gpus("a", {}, other), gpus("b", other, {})).items()} == {
        1000: 2, 2000: 1,
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="2 AMD GPUs and this one has 1"):
        kfd.match(gpus("c", {}, {}), gpus("d", {}))
    linked = gpus("e", {}, {}, {}, xgmi=((1, 2),))
    found = kfd.match(linked, gpus("f", {}, {}, {}, xgmi=((2, 3),)))
    assert {found[1000].node, found[2000].node} == {2, 3}
    with pytest.raises(UnsupportedError, match="XGMI"):
        kfd.match(linked, gpus("g", {}, {}, {}))
    assert kfd.match(gpus("h", {}, {}, {}), gpus("i", {}, {}, {}, xgmi=((1, 2),)))  # XGMI for PCIe is fine


def test_a_checkpoint_is_compared_with_this_node(tmp_path: Path) -> None:
    images, options = tmp_path / "images", amd.AmdOptions.from_mapping({"fw-ver-check": False})
    images.mkdir()
    root = tree(tmp_path / "a", {})
    assert amd.compare(str(images), options, root) is None
    (images / amd.TOPOLOGY).write_text(json.dumps(kfd.capture(root)))
    assert amd.image_facts(str(images)) == {"gpu.amd": '["74a1"]'}
    same = amd.compare(str(images), options, tree(tmp_path / "b", {"fw_version": 1}))
    assert same == {"/dev/dri/renderD128": "/dev/dri/renderD128"}
    moved = amd.compare(str(images), options, tree(tmp_path / "c", {"drm_render_minor": 140}))
    assert moved == {"/dev/dri/renderD128": "/dev/dri/renderD140"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 2, "gpus": []}', '{"version": 1, "gpus": [3]}',
             '{"version": 1, "gpus": [{"node": "x"}]}', '{"version": 1, "gpus": %s}' % ([0] * 200),
             json.dumps({"version": 1, "gpus": [TWIN, TWIN]})],
)  # fmt: skip
def test_a_hostile_topology_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / amd.TOPOLOGY).write_text(text)
    with pytest.raises(ImageError):
        amd.compare(str(tmp_path), amd.AmdOptions(), str(tmp_path))


def test_the_plugin_must_be_there_and_of_the_same_build(tmp_path: Path) -> None:
    plugin, criu = tmp_path / amd.PLUGIN, tmp_path / "criu"
    with pytest.raises(NotFoundError, match=r"amdgpu_plugin\.so, is not in /no/such"):
        amd.find_plugin("/no/such")
    plugin.write_bytes(b"\x7fELF\0check_and_remove_inventory_plugin\0")
    criu.write_bytes(b"\x7fELF\0")
    assert amd.find_plugin(None, ("/no/such", str(tmp_path))) == str(tmp_path)
    with pytest.raises(UnsupportedError, match="built for another CRIU"):
        amd.check(str(tmp_path), str(criu))
    criu.write_bytes(b"\x7fELF\0check_and_remove_inventory_plugin\0")
    with pytest.raises(NotFoundError, match="cannot ask the AMD driver"):
        amd.check(str(tmp_path), str(criu), str(tmp_path / "kfd"))
    with pytest.raises(NotFoundError, match="cannot ask the AMD driver"):
        amd.check(str(tmp_path), str(criu), "/dev/null")  # not its ioctl


@pytest.mark.parametrize(
    ("version", "fine"), [((1, 8), True), ((1, 14), True), ((2, 0), True), ((1, 7), False)]
)
def test_kernel_interface(version: tuple[int, int], fine: bool) -> None:
    if fine:
        amd.check_version(*version)
    else:
        with pytest.raises(UnsupportedError, match=r"1\.7, and checkpoints need 1\.8"):
            amd.check_version(*version)


@pytest.mark.parametrize(
    ("values", "variables"),
    [
        ({}, {}),
        ({"numa-check": False, "max-buffer-size": "2G"},
         {"KFD_NUMA_CHECK": "0", "KFD_MAX_BUFFER_SIZE": "2147483648"}),
        ({"capability-check": True}, {"KFD_CAPABILITY_CHECK": "1"}),
        ({"numa-check": 1}, None), ({"numa": False}, None), ({"max-buffer-size": "x"}, None),
    ],
)  # fmt: skip
def test_options(values: dict[str, Any], variables: dict[str, str] | None) -> None:
    if variables is None:
        with pytest.raises(ConfigError, match=r"\[amd\]"):
            amd.AmdOptions.from_mapping(values)
    else:
        assert dict(amd.AmdOptions.from_mapping(values).variables) == variables
        assert all(isinstance(v, bytes) for v in amd.variables(amd.AmdOptions(variables)).values())


def test_which_containers_use_them() -> None:
    assert amd.uses({"nodes": [{"path": "/dev/dri/renderD128"}, {"path": "/dev/kfd"}]})
    for value in (None, {}, {"nodes": None}, {"nodes": [{"path": "/dev/nvidia0"}, 3]}):
        assert not amd.uses(value)
