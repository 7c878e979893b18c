# SPDX-License-Identifier: Apache-2.0
"""Apply containerEdits of CDI devices to an OCI runtime specification, as CDI 1.1.0 asks for."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import Any

from cryoci.errors import NotFoundError, UnsupportedError
from cryoci.shim.devices.cdi import Device, Edits

Spec = dict[str, Any]
_KINDS = {stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p"}


def apply(spec: Spec, devices: Sequence[Device]) -> dict[str, Any]:
    """Edit `spec`; returns what was put in: `names`, `nodes`, `mounts`, `hooks`, `env`.

    The edits common to a file come once, before those of its devices. Raises NotFoundError when a host
    path is not there, UnsupportedError for edits that a checkpoint cannot carry.
    """
    done: dict[str, Any] = {
        "names": [d.qualified for d in devices], "nodes": [], "mounts": [], "hooks": [], "env": [],
    }  # fmt: skip
    seen: set[str] = set()
    for device in devices:
        if device.source not in seen:
            seen.add(device.source)
            _apply(spec, device.common, device, done)
        _apply(spec, device.edits, device, done)
    if done["mounts"]:
        spec["mounts"].sort(key=lambda m: str(m.get("destination")).rstrip("/").count("/"))
    return done


def nodes(device: Device) -> list[dict[str, Any]]:
    """The device's own nodes as in linux.devices. Raises NotFoundError when one is not on this host."""
    return [_node(node, device) for node in device.edits.get("deviceNodes") or ()]


def _apply(spec: Spec, edits: Edits, device: Device, done: dict[str, Any]) -> None:
    for key in ("intelRdt", "netDevices"):
        if edits.get(key):
            raise UnsupportedError(
                f"CDI device {device.qualified} asks for {key}, which cryoci does not give to containers",
                hint=f"a checkpoint cannot carry it; take it out of {device.source}",
            )
    process = spec.setdefault("process", {})
    for variable in edits.get("env") or ():
        _set_variable(process, variable)
        done["env"].append(variable.partition("=")[0])
    for gid in edits.get("additionalGids") or ():
        gids = process.setdefault("user", {}).setdefault("additionalGids", [])
        if gid and gid not in gids:
            gids.append(gid)
    for node in edits.get("deviceNodes") or ():
        made = _node(node, device)
        _own(made, process)
        add_node(spec, made, node.get("permissions") or "rwm")
        done["nodes"].append(made)
    mounts = spec.setdefault("mounts", [])
    for mount in edits.get("mounts") or ():
        made = {
            "destination": mount["containerPath"],
            "source": mount["hostPath"],
            "type": mount.get("type") or "bind",
            "options": list(mount.get("options") or ("ro", "nosuid", "nodev", "rbind", "rprivate")),
        }
        if made["type"] == "bind" and not os.path.lexists(made["source"]):
            raise NotFoundError(
                f"CDI device {device.qualified} mounts {made['source']}, which is not on this node",
                hint=f"{device.source} is of another driver: make it anew (cryoci cdi generate, nvidia-ctk)",
            )
        mounts[:] = [m for m in mounts if m.get("destination") != made["destination"]]
        mounts.append(made)
        done["mounts"].append({"destination": made["destination"], "source": made["source"]})
    for hook in edits.get("hooks") or ():
        made = {key: hook[key] for key in ("path", "args", "env", "timeout") if hook.get(key) is not None}
        stages = spec.get("hooks") or {}
        spec["hooks"] = stages
        if made not in stages.setdefault(hook["hookName"], []):
            stages[hook["hookName"]].append(made)
        done["hooks"].append(made)


def _set_variable(process: dict[str, Any], variable: str) -> None:
    env = process.setdefault("env", [])
    name = variable.partition("=")[0] + "="
    env[:] = [v for v in env if not (isinstance(v, str) and v.startswith(name))]
    env.append(variable)


def add_node(spec: Spec, node: dict[str, Any], access: str = "rwm") -> None:
    """Put `node` into linux.devices, in place of one of that path, and allow it in the device cgroup."""
    linux = spec.setdefault("linux", {})
    devices = [d for d in linux.get("devices") or [] if d.get("path") != node["path"]]
    linux["devices"] = [*devices, node]
    if node["type"] in ("b", "c", "u"):
        rule = {
            "allow": True,
            "type": "c" if node["type"] == "u" else node["type"],
            "major": node["major"],
            "minor": node["minor"],
            "access": access,
        }
        resources = linux.get("resources") or {}
        linux["resources"] = resources
        rules = resources.get("devices") or []
        if rule not in rules:
            resources["devices"] = [*rules, rule]


def _node(node: dict[str, Any], device: Device) -> dict[str, Any]:
    """A CDI deviceNode as an OCI device; what it leaves out is as on the host."""
    host = node.get("hostPath") or node["path"]
    kind, major, minor = node.get("type"), node.get("major"), node.get("minor")
    mode = node.get("fileMode")
    complete = kind and (kind == "p" or (major is not None and minor is not None and (major or minor)))
    if not complete or mode is None:
        try:
            there = os.stat(host)
        except OSError as e:
            raise NotFoundError(
                f"CDI device {device.qualified} needs {host}, which is not on this node: {e.strerror}",
                hint=f"load the driver, or mend {device.source}",
            ) from e
        found = _KINDS.get(stat.S_IFMT(there.st_mode))
        if found is None or (kind and kind.replace("u", "c") != found):
            raise NotFoundError(
                f"CDI device {device.qualified}: {host} is not a device of type {kind or 'b, c or p'}",
                hint=f"mend {device.source}",
            )
        kind = found
        if not complete:
            major, minor = os.major(there.st_rdev), os.minor(there.st_rdev)
        mode = stat.S_IMODE(there.st_mode) if mode is None else mode
    made = {"path": node["path"], "type": kind, "fileMode": mode}
    if kind != "p":
        made.update(major=major, minor=minor)
    made.update({key: node[key] for key in ("uid", "gid") if node.get(key) is not None})
    return made


def _own(node: dict[str, Any], process: dict[str, Any]) -> None:
    """Without an owner of its own the node belongs to the container's user."""
    user = process.get("user") or {}
    if node["type"] == "p":
        return
    for key in ("uid", "gid"):
        if key not in node and user.get(key):
            node[key] = user[key]
