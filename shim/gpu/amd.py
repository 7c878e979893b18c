# SPDX-License-Identifier: Apache-2.0
"""AMD GPUs: only CRIU's amdgpu plugin can save them. See that it can work here, configure it, compare nodes.

Not run on AMD hardware: written from the plugin's source and tested on topology trees.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import struct
from collections.abc import Mapping
from typing import Any

from cryoci.errors import ConfigError, ImageError, NotFoundError, UnsupportedError
from cryoci.files import read_json
from cryoci.shim.criu.options import parse_size, unknown_key
from cryoci.shim.gpu import kfd

TOPOLOGY = "amd-topology.json"  # beside the CRIU images
PLUGIN = "amdgpu_plugin.so"
LIBDIRS = ("/usr/lib/criu", "/usr/lib64/criu", "/usr/local/lib/criu", "/usr/lib/x86_64-linux-gnu/criu")
_MINIMUM = (1, 8)  # first KFD interface with AMDKFD_IOC_CRIU_OP
_GET_VERSION = 0x80084B01  # AMDKFD_IOC_GET_VERSION: _IOR('K', 1, two uint32)
# What the plugin calls in CRIU itself; a plugin of another build asks for one that is not there (criu#2521).
_FROM_CRIU = (
    b"check_and_remove_inventory_plugin",
    b"add_inventory_plugin",
    b"set_compel_interrupt_only_mode",
)
_SWITCHES = (
    "KFD_FW_VER_CHECK",
    "KFD_SDMA_FW_VER_CHECK",
    "KFD_CACHES_COUNT_CHECK",
    "KFD_NUM_GWS_CHECK",
    "KFD_VRAM_SIZE_CHECK",
    "KFD_NUMA_CHECK",
    "KFD_CAPABILITY_CHECK",
)
_BUFFER = "KFD_MAX_BUFFER_SIZE"


@dataclasses.dataclass(frozen=True)
class AmdOptions:
    """[amd] of config.toml as the plugin's environment variables."""

    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def off(self) -> frozenset[str]:
        """Checks that are turned off."""
        return frozenset(name for name in _SWITCHES if self.variables.get(name) == "0")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> AmdOptions:
        """Check the table [amd]. Raises ConfigError."""
        names = {kfd.option(variable): variable for variable in (*_SWITCHES, _BUFFER)}
        found: dict[str, str] = {}
        for key, value in values.items():
            if key not in names:
                raise unknown_key(key, names, "[amd]")
            if names[key] == _BUFFER:
                found[_BUFFER] = str(parse_size(value, f"[amd] {key}"))
            elif isinstance(value, bool):
                found[names[key]] = "1" if value else "0"
            else:
                raise ConfigError(f"[amd] {key} is {value!r}", hint="write true or false")
        return cls(found)


def uses(devices: Any) -> bool:
    """Has a container with these devices (as `edits.apply` returns them) AMD GPUs?"""
    nodes = devices.get("nodes") if isinstance(devices, Mapping) else None
    return any(isinstance(n, Mapping) and n.get("path") == "/dev/kfd" for n in nodes or ())


def check(libdir: str | None, criu: str, device: str = "/dev/kfd") -> str:
    """See that the plugin and the kernel can do it; returns the plugin's directory for CRIU's `libdir`.

    `libdir` is the configured one, `criu` the program. Raises NotFoundError, UnsupportedError.
    """
    directory = find_plugin(libdir)
    _check_build(f"{directory}/{PLUGIN}", criu)
    _check_kernel(device)
    return directory


def find_plugin(libdir: str | None, places: tuple[str, ...] = LIBDIRS) -> str:
    """Directory of amdgpu_plugin.so: the configured one, $CRIU_LIBS_DIR, or a usual one."""
    asked = libdir or os.environ.get("CRIU_LIBS_DIR")
    for directory in (asked,) if asked else places:
        if os.path.isfile(f"{directory}/{PLUGIN}"):
            return directory
    raise NotFoundError(
        f"the container has AMD GPUs, and CRIU's plugin for them, {PLUGIN}, is not in {asked or ', '.join(places)}",
        hint="install criu-amdgpu-plugin (Fedora) or build CRIU with it, and name its directory: [criu] libdir",
    )


def _check_build(plugin: str, criu: str) -> None:
    try:
        with open(plugin, "rb") as f:
            asks = f.read(64 << 20)
        with open(criu, "rb") as f:
            has = f.read(64 << 20)
    except OSError as e:
        raise NotFoundError(f"cannot read {e.filename}: {e.strerror}", hint="reinstall CRIU") from e
    missing = [name.decode() for name in _FROM_CRIU if name + b"\0" in asks and name + b"\0" not in has]
    if missing:
        raise UnsupportedError(
            f"{plugin} was built for another CRIU than {criu}: it needs {', '.join(missing)}",
            hint="install both from the same release",
        )


def _check_kernel(device: str) -> None:
    buffer = bytearray(8)
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _GET_VERSION, buffer)
        finally:
            os.close(fd)
    except OSError as e:
        raise NotFoundError(
            f"cannot ask the AMD driver through {device}: {e.strerror}", hint="load it: modprobe amdgpu"
        ) from e
    check_version(*struct.unpack("=II", buffer))


def check_version(major: int, minor: int) -> None:
    """Raises UnsupportedError for a KFD interface without checkpoint calls."""
    if (major, minor) < _MINIMUM:
        raise UnsupportedError(
            f"the AMD driver's interface is {major}.{minor}, and checkpoints need 1.8 or later",
            hint="use a newer kernel, or ROCm's amdgpu-dkms",
        )


def saved(images: str) -> list[kfd.Gpu] | None:
    """The topology of the checkpoint in `images`, None when it has none. Raises ImageError."""
    path = f"{images}/{TOPOLOGY}"
    try:
        if os.path.getsize(path) > 1 << 20:
            raise ImageError(f"{TOPOLOGY} of the checkpoint is too large to be one")
        return kfd.parse(read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise ImageError(f"{TOPOLOGY} of the checkpoint cannot be read: {e}") from e


def image_facts(images: str) -> dict[str, str]:
    """`io.cryoci.gpu.amd` of the image: the device ids of the GPUs, in order, which must be the same again.

    Raises ImageError.
    """
    there = saved(images) or []
    ids = [f"{gpu.properties.get('device_id', 0):04x}" for gpu in there]
    return {"gpu.amd": json.dumps(ids)} if ids else {}


def compare(images: str, options: AmdOptions, root: str = kfd.SYSFS) -> dict[str, str] | None:
    """Which GPUs of this node stand in for those of the checkpoint in `images`; None when it has none.

    They are told by their render nodes: {/dev/dri/renderDN there: here}. Raises UnsupportedError with what differs,
    ImageError, NotFoundError.
    """
    there = saved(images)
    if there is None:
        return None
    found = kfd.match(there, kfd.parse(kfd.capture(root)), options.off)
    return {old.render: found[old.gpu_id].render for old in there}


def variables(options: AmdOptions) -> dict[bytes, bytes]:
    """Environment for CRIU, which the runtimes hand on."""
    return {os.fsencode(name): os.fsencode(value) for name, value in options.variables.items()}
