# SPDX-License-Identifier: Apache-2.0
"""Take out of a specification what belongs to the GPUs of another node.

Known by what cryoci wrote down when it put it in, and by the names that NVIDIA's and AMD's tools use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

GPU_NODE = re.compile(r"/dev/(nvidia\d+|dri/renderD\d+)")
_NODE = re.compile(
    r"/dev/(nvidia(\d+|ctl|-modeset|-uvm|-uvm-tools)|nvidia-caps(-imex-channels)?/[\w-]+|kfd|dri/(card|renderD)\d+)"
)
_LIBRARY = re.compile(
    r"(?:/[^/]+)*/(lib(cuda|cudadebugger|nvidia|nvcuvid|nvoptix|GLX_nvidia|EGL_nvidia|GLESv\d?_(CM_)?nvidia|vdpau_nvidia)"
    r"[\w-]*\.so(\.[\d.]+)?|nvidia_drv\.so|libglxserver_nvidia\.so[\d.]*)"
)
_FILE = re.compile(
    r"(/usr)?/lib/firmware/nvidia/.*|/proc/driver/nvidia(/.*)?|/(usr/)?s?bin/nvidia-[\w-]+|/run/nvidia-[\w/.-]+"
    r"|/var/run/nvidia-[\w/.-]+|/usr/share/nvidia/.*|(/usr/share|/etc)/(glvnd|vulkan|egl)/.*nvidia[\w.-]*"
)
_HOOK = re.compile(
    r"nvidia-(ctk|cdi-hook|container-toolkit|container-runtime-hook|container-cli)(\.real)?|amd-ctk|amd-container-.*"
)


def strip(spec: dict[str, Any], injected: Mapping[str, Any] | None = None) -> dict[str, list[Any]]:
    """Remove GPU devices, their cgroup rules, mounts and hooks from `spec`; returns `nodes` and `mounts`.

    `injected` is what `edits.apply` returned on the other node. It may come from an archive: it can only
    make more go.
    """
    paths, targets, programs = _injected(injected)
    nodes: list[Any] = []
    linux = spec.get("linux")
    if isinstance(linux, dict) and isinstance(linux.get("devices"), list):
        nodes = [d for d in linux["devices"] if _gone(d, "path", paths, _NODE)]
        linux["devices"] = [d for d in linux["devices"] if d not in nodes]
        if not linux["devices"]:
            del linux["devices"]
        numbers = {(d.get("major"), d.get("minor")) for d in nodes}
        resources = linux.get("resources")
        if numbers and isinstance(resources, dict) and isinstance(resources.get("devices"), list):
            resources["devices"] = [
                r
                for r in resources["devices"]
                if not (
                    isinstance(r, dict) and r.get("allow") and (r.get("major"), r.get("minor")) in numbers
                )
            ]
    mounts: list[Any] = []
    if isinstance(spec.get("mounts"), list):
        mounts = [
            m
            for m in spec["mounts"]
            if _gone(m, "destination", targets, _NODE, _LIBRARY, _FILE) and not _from_kernel(m)
        ]
        spec["mounts"] = [m for m in spec["mounts"] if m not in mounts]
    hooks(spec, programs)
    return {"nodes": nodes, "mounts": mounts}


def hooks(spec: dict[str, Any], programs: frozenset[str] = frozenset()) -> list[str]:
    """Remove the hooks of GPU tools, and those of `programs`; returns their programs.

    runc runs some hooks on restore, before the container's mounts are there (runc#5296), and crun none.
    """
    removed: list[str] = []
    stages = spec.get("hooks")
    if not isinstance(stages, dict):
        return removed
    for stage, entries in list(stages.items()):
        if not isinstance(entries, list):
            continue
        kept = []
        for entry in entries:
            path = str(entry.get("path")) if isinstance(entry, dict) else ""
            if path in programs or _HOOK.fullmatch(os.path.basename(path)):
                removed.append(path)
            else:
                kept.append(entry)
        stages[stage] = kept
        if not kept:
            del stages[stage]
    if not stages:
        del spec["hooks"]
    return removed


def _injected(value: Mapping[str, Any] | None) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    def texts(key: str, field: str) -> frozenset[str]:
        entries = value.get(key) if isinstance(value, Mapping) else None
        entries = entries if isinstance(entries, list) else []
        return frozenset(e[field] for e in entries if isinstance(e, dict) and isinstance(e.get(field), str))

    return texts("nodes", "path"), texts("mounts", "destination"), texts("hooks", "path")


def _gone(entry: Any, key: str, known: frozenset[str], *patterns: re.Pattern[str]) -> bool:
    path = entry.get(key) if isinstance(entry, dict) else None
    return isinstance(path, str) and (path in known or any(p.fullmatch(path) for p in patterns))


def _from_kernel(mount: dict[str, Any]) -> bool:
    """/proc, /dev and the like, which an archive may not make us drop."""
    return mount.get("type") in ("proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2") or mount.get(
        "destination"
    ) in ("/dev", "/dev/shm", "/proc", "/sys")
