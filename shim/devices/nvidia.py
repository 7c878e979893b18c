# SPDX-License-Identifier: Apache-2.0
"""A CDI specification for this host's NVIDIA driver, read from /proc, /dev and the loader's directories.

It has no hooks. They would have to run again on restore, where runc runs them too early and crun not at
all. What NVIDIA's hooks do is not needed: each library is mounted under its soname in the directories that
the loader searches without a cache, so there is nothing to update, no link to make, and no driver version
in a path that a checkpoint remembers. Devices are called by index and by UUID, and `all`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from typing import Any

from cryoci.errors import NotFoundError, UnsupportedError
from cryoci.shim.devices import cdi

KIND = "nvidia.com/gpu"
# The loader's own directories on x86-64 and arm64: Debian's kind, then all others'.
_TARGETS = {
    "x86_64": ("/usr/lib/x86_64-linux-gnu", "/usr/lib64"),
    "aarch64": ("/usr/lib/aarch64-linux-gnu", "/usr/lib64"),
}
_PLACES = (
    "/usr/local/nvidia/lib64",
    "/run/nvidia/driver/usr/lib64",
    "/usr/lib/nvidia",
    "/lib64",
    "/usr/lib",
)
_LIBRARIES = re.compile(
    r"lib(cuda|cudadebugger|nvcuvid|nvidia-(ml|cfg|ptxjitcompiler|nvvm\d*|gpucomp|opencl|allocator|encode|opticalflow"
    r"|fbc|ngx|sandboxutils|pkcs11(-openssl3)?|tileiras))\.so(\.\d+)*"
)
_PROGRAMS = (
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
    "nvidia-modprobe",
)
_COMMON = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
_READ_ONLY = ("ro", "nosuid", "nodev", "rbind", "rprivate")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU as /proc/driver/nvidia shows it; `minor` is the N of /dev/nvidiaN, `index` the place by bus id."""

    index: int
    minor: int
    uuid: str
    name: str
    bus: str


def inventory(root: str = "/") -> list[Gpu]:
    """The GPUs that the driver below `root` knows, in the order of the bus, as NVML counts."""
    top = _under(root, "/proc/driver/nvidia/gpus")
    try:
        buses = sorted(os.listdir(top))
    except OSError:
        return []
    found: list[Gpu] = []
    for bus in buses:
        facts = _facts(f"{top}/{bus}/information")
        minor = facts.get("Device Minor", "")
        if minor.isdigit():
            uuid = facts.get("GPU UUID", "")
            uuid = uuid if re.fullmatch(r"GPU-[0-9a-fA-F-]{36}", uuid) else ""  # "GPU-????" before first use
            found.append(Gpu(len(found), int(minor), uuid, facts.get("Model", ""), bus))
    return found


def _facts(path: str) -> dict[str, str]:
    """ "Key: \t value" lines, as of /proc/driver/nvidia/gpus/BUS/information."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = f.read(1 << 16).splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def driver_version(root: str = "/") -> str | None:
    """Version of the kernel module below `root`, such as "580.159.04"."""
    for path, pattern in (
        ("/proc/driver/nvidia/version", r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s"),
        ("/sys/module/nvidia/version", r"(\d+\.\d+(?:\.\d+)?)"),
    ):
        try:
            with open(_under(root, path), encoding="utf-8", errors="replace") as f:
                match = re.search(pattern, f.read(4096))
        except OSError:
            continue
        if match:
            return match[1]
    return None


def specification(root: str = "/") -> dict[str, Any]:
    """The specification. Raises NotFoundError (no driver, no GPU) or UnsupportedError (MIG).

    Its paths are those of the host that `root` shows; below another root than / it is for looking at.
    """
    version = driver_version(root)
    if version is None:
        raise NotFoundError(
            "no NVIDIA driver is loaded: /proc/driver/nvidia/version is not there",
            hint="install the driver and load it: modprobe nvidia",
        )
    gpus = [gpu for gpu in inventory(root) if os.path.lexists(_under(root, f"/dev/nvidia{gpu.minor}"))]
    if not gpus:
        raise NotFoundError(
            f"NVIDIA driver {version} is loaded, but there is no GPU with its /dev/nvidiaN",
            hint="make the nodes: nvidia-modprobe -c 0 -u",
        )
    devices: list[dict[str, Any]] = []
    for gpu in gpus:
        own = {"deviceNodes": _nodes(root, (f"nvidia{gpu.minor}",))}
        devices.append({"name": str(gpu.index), "containerEdits": own})
        if gpu.uuid:
            devices.append({"name": gpu.uuid, "containerEdits": own})
    every = [node for gpu in gpus for node in _nodes(root, (f"nvidia{gpu.minor}",))]
    devices.append({"name": "all", "containerEdits": {"deviceNodes": every}})
    common = {
        "env": ["NVIDIA_VISIBLE_DEVICES=void"],  # NVIDIA's runtime, if it stands below, has nothing to add
        "deviceNodes": _nodes(root, _COMMON),
        "mounts": _mounts(root, version),
    }
    return {
        "cdiVersion": "0.5.0",
        "kind": KIND,
        "devices": devices,
        "containerEdits": common,
    }


def devices(root: str = "/") -> list[cdi.Device]:
    """The devices of `specification`; [] where there is no driver."""
    try:
        return cdi.check(specification(root), "the NVIDIA driver of this node")
    except (NotFoundError, UnsupportedError):
        return []


def _nodes(root: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Device nodes that are there. Only the path: numbers are looked up when a container is made."""
    return [{"path": f"/dev/{name}"} for name in names if os.path.lexists(_under(root, f"/dev/{name}"))]


def _mounts(root: str, version: str) -> list[dict[str, Any]]:
    machine = os.uname().machine
    targets = _TARGETS.get(machine)
    if targets is None:
        raise UnsupportedError(
            f"NVIDIA's driver libraries have no known place on {machine}",
            hint="write the specification by hand, or with nvidia-ctk",
        )
    mounts = [
        _mount(source, f"{target}/{soname}")
        for soname, source in sorted(libraries(root, version, targets).items())
        for target in targets
    ]
    for firmware in (f"/lib/firmware/nvidia/{version}", f"/usr/lib/firmware/nvidia/{version}"):
        try:
            names = sorted(
                n for n in os.listdir(_under(root, firmware)) if re.fullmatch(r"gsp_?\w*\.bin", n)
            )
        except OSError:
            continue
        # the driver reads it through the host's tree; containers that look for it find it here
        mounts += [_mount(f"{firmware}/{name}", f"{firmware}/{name}") for name in names]
        break
    for program in _PROGRAMS:
        for directory in ("/usr/bin", "/usr/local/nvidia/bin", "/run/nvidia/driver/usr/bin", "/usr/sbin"):
            if os.path.isfile(_under(root, f"{directory}/{program}")):
                mounts.append(_mount(f"{directory}/{program}", f"/usr/bin/{program}"))
                break
    socket = "/run/nvidia-persistenced/socket"
    if os.path.lexists(_under(root, socket)) and _is_socket(_under(root, socket)):
        mounts.append({**_mount(socket, socket), "options": [*_READ_ONLY, "noexec"]})
    return mounts


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.stat(path).st_mode)


def _mount(source: str, target: str) -> dict[str, Any]:
    return {"hostPath": source, "containerPath": target, "options": list(_READ_ONLY)}


def libraries(root: str, version: str, targets: tuple[str, ...]) -> dict[str, str]:
    """soname -> path on the host of the driver's libraries: those of exactly `version`.

    A library's soname is the shortest libX.so.N that leads to it; the few without one are asked for by version.
    """
    found: dict[str, str] = {}
    for directory in dict.fromkeys((*_loader_directories(root), *targets, *_PLACES)):
        try:
            names = sorted(os.listdir(_under(root, directory)))
        except OSError:
            continue
        sonames: dict[str, str] = {}
        for name in names:
            if not _LIBRARIES.fullmatch(name) or name.endswith(".so"):
                continue
            real = _final(root, f"{directory}/{name}")
            if not real.endswith(f".so.{version}"):
                continue
            if len(name) < len(sonames.get(real, name + "x")):
                sonames[real] = name
        for real, soname in sonames.items():
            found.setdefault(soname, real)
    return found


def _loader_directories(root: str) -> list[str]:
    """Where the host's loader looks, from the paths in its cache; the cache's text parts are enough for that."""
    try:
        with open(_under(root, "/etc/ld.so.cache"), "rb") as f:
            raw = f.read(64 << 20)
    except OSError:
        return []
    paths = re.findall(rb"(?<=\0)(/[^\0]*)/libcuda\.so\.1(?=\0)", raw)
    return list(dict.fromkeys(p.decode("utf-8", "surrogateescape") for p in paths))


def _final(root: str, path: str) -> str:
    """The file that `path` leads to, links followed below `root`."""
    for _ in range(40):
        try:
            target = os.readlink(_under(root, path))
        except OSError:
            break
        path = target if target[:1] == "/" else os.path.normpath(os.path.join(os.path.dirname(path), target))
    return path


def _under(root: str, path: str) -> str:
    return root.rstrip("/") + path
