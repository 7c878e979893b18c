# SPDX-License-Identifier: Apache-2.0
"""The topology that the AMD kernel driver (KFD) shows, and whether one node's GPUs can stand in for another's.

The rules are those of CRIU's amdgpu plugin (plugins/amdgpu/amdgpu_plugin_topology.c, CRIU 4.2), which says
only "Failed to match remaining nodes" when they do not hold.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from cryoci.errors import ImageError, NotFoundError, UnsupportedError

SYSFS = "/sys/class/kfd/kfd/topology"
VERSION = 1
_XGMI = 11
_PUBLIC, _PRIVATE = 1, 2  # heap_type of a memory bank
_EQUAL = (
    "simd_count", "mem_banks_count", "io_links_count", "max_waves_per_simd", "lds_size_in_kb", "wave_front_size",
    "array_count", "simd_arrays_per_engine", "cu_per_simd_array", "simd_per_cu", "max_slots_scratch_cu",
    "vendor_id", "device_id", "num_sdma_engines", "num_sdma_xgmi_engines", "num_sdma_queues_per_engine",
    "num_cp_queues", "vram_public",
)  # fmt: skip
# Field -> variable of the plugin that turns its check off; this node must have at least as much.
_AT_LEAST = {
    "fw_version": "KFD_FW_VER_CHECK",
    "sdma_fw_version": "KFD_SDMA_FW_VER_CHECK",
    "caches_count": "KFD_CACHES_COUNT_CHECK",
    "num_gws": "KFD_NUM_GWS_CHECK",
    "vram_size": "KFD_VRAM_SIZE_CHECK",
}
_CAPABILITY = "KFD_CAPABILITY_CHECK"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU. `node` is its number in the topology, `links` the nodes that XGMI leads to."""

    node: int
    gpu_id: int
    name: str
    properties: Mapping[str, int]
    links: tuple[int, ...] = ()

    @property
    def render(self) -> str:
        """Its device node."""
        return f"/dev/dri/renderD{self.properties.get('drm_render_minor', 0)}"


def capture(root: str = SYSFS) -> dict[str, Any]:
    """The topology as JSON. Raises NotFoundError when there is no KFD."""
    top = f"{root}/nodes"
    try:
        numbers = sorted(int(name) for name in os.listdir(top) if name.isdigit())
    except OSError as e:
        raise NotFoundError(
            f"no AMD GPU driver here: {top}: {e.strerror}", hint="load it: modprobe amdgpu"
        ) from e
    gpus = []
    for number in numbers:
        where = f"{top}/{number}"
        gpu_id = int(_text(f"{where}/gpu_id") or 0)
        if gpu_id == 0:
            continue  # a CPU
        properties = _properties(f"{where}/properties")
        properties["vram_public"] = properties["vram_size"] = 0
        for bank in _entries(f"{where}/mem_banks"):
            if bank.get("heap_type") in (_PUBLIC, _PRIVATE):
                properties["vram_size"] += bank.get("size_in_bytes", 0)
                properties["vram_public"] |= bank.get("heap_type") == _PUBLIC
        links = sorted(e.get("node_to", 0) for e in _entries(f"{where}/io_links") if e.get("type") == _XGMI)
        gpus.append(
            {
                "node": number,
                "gpu_id": gpu_id,
                "name": _text(f"{where}/name"),
                "properties": {key: int(value) for key, value in properties.items()},
                "links": links,
            }
        )
    return {"version": VERSION, "gpus": gpus}


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            return f.read(65536).strip()
    except OSError:
        return ""


def _properties(path: str) -> dict[str, int]:
    """Lines of "name number"."""
    found = {}
    for line in _text(path).splitlines():
        name, _, value = line.partition(" ")
        if value.strip().isdigit():
            found[name] = int(value)
    return found


def _entries(path: str) -> list[dict[str, int]]:
    """The properties files of the numbered directories in `path`."""
    try:
        numbers = sorted(int(name) for name in os.listdir(path) if name.isdigit())
    except OSError:
        return []
    return [_properties(f"{path}/{number}/properties") for number in numbers]


def parse(value: Any) -> list[Gpu]:
    """The GPUs of a captured topology, which may come from an archive. Raises ImageError."""
    try:
        if value["version"] != VERSION or len(value["gpus"]) > 128:
            raise ValueError
        found = [
            Gpu(
                int(g["node"]),
                int(g["gpu_id"]),
                str(g["name"])[:64],
                {str(k): int(v) for k, v in g["properties"].items()},
                tuple(int(n) for n in g["links"]),
            )
            for g in value["gpus"]
        ]
        if len({gpu.gpu_id for gpu in found}) != len(found):
            raise ValueError
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ImageError("the checkpoint's topology of AMD GPUs is not one that this cryoci knows") from e


def match(there: Sequence[Gpu], here: Sequence[Gpu], off: frozenset[str] = frozenset()) -> dict[int, Gpu]:
    """gpu_id there -> GPU here. `off` are the plugin's variables whose checks are turned off.

    Raises UnsupportedError with the field that differs, its values, and the variable if there is one.
    """
    if len(there) != len(here):
        raise UnsupportedError(
            f"the checkpoint is of a node with {len(there)} AMD GPUs and this one has {len(here)}",
            hint="the plugin matches all GPUs of a node: restore on one with as many",
        )
    fits = [
        sorted((g for g in here if difference(old, g, off) is None), key=lambda g: g.render != old.render)
        for old in there
    ]
    for old, candidates in zip(there, fits, strict=True):
        if not candidates:
            near = min(here, key=lambda g: len(differences(old, g, off)))
            field, ours, theirs, variable = differences(old, near, off)[0]
            raise UnsupportedError(
                f"GPU {old.gpu_id} ({old.name}) of the checkpoint has {field} {theirs}, and this node's nearest "
                f"({near.name}, {near.render}) has {ours}",
                hint=f"if that is no matter, turn the check off: [amd] {option(variable)} = false"
                if variable
                else "restore it on a node with the same GPUs",
            )
    found = _assign(list(there), fits, {})
    if found is None:
        raise UnsupportedError(
            "the checkpoint's AMD GPUs each have a like here, but not linked by XGMI as they were",
            hint="restore it on a node with the same links between GPUs (PCIe cannot stand in for XGMI)",
        )
    return found


def _assign(there: list[Gpu], fits: list[list[Gpu]], chosen: dict[int, Gpu]) -> dict[int, Gpu] | None:
    """Choose one of `fits` for each, each once, with XGMI wherever it was."""
    at = len(chosen)
    if at == len(there):
        return chosen
    old = there[at]
    for gpu in fits[at]:
        if gpu in chosen.values():
            continue
        linked = all(
            chosen[other.gpu_id].node in gpu.links
            for other in there[:at]
            if other.node in old.links or old.node in other.links
        )
        if linked and (found := _assign(there, fits, {**chosen, old.gpu_id: gpu})) is not None:
            return found
    return None


def difference(old: Gpu, new: Gpu, off: frozenset[str] = frozenset()) -> tuple[str, int, int, str] | None:
    """The first of `differences`."""
    return next(iter(differences(old, new, off)), None)


def differences(old: Gpu, new: Gpu, off: frozenset[str] = frozenset()) -> list[tuple[str, int, int, str]]:
    """(field, value here, value there, variable that turns the check off or "") for all that forbids it."""
    found = []
    for field in _EQUAL:
        ours, theirs = new.properties.get(field, 0), old.properties.get(field, 0)
        if ours != theirs:
            found.append((field, ours, theirs, ""))
    for field, variable in _AT_LEAST.items():
        ours, theirs = new.properties.get(field, 0), old.properties.get(field, 0)
        if ours < theirs and variable not in off:
            found.append((field, ours, theirs, variable))
    ours, theirs = new.properties.get("capability", 0), old.properties.get("capability", 0)
    if ours != theirs and _CAPABILITY not in off:
        found.append(("capability", ours, theirs, _CAPABILITY))
    return found


def option(variable: str) -> str:
    """Key of [amd] for a variable of the plugin: KFD_FW_VER_CHECK is fw-ver-check."""
    return variable.removeprefix("KFD_").lower().replace("_", "-")
