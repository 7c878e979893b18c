# SPDX-License-Identifier: Apache-2.0
"""CDI specifications (version 1.1.0): check one, and find devices in the directories of this node.

https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md. Of two specifications of one device
the one in the later directory counts (/run/cdi over /etc/cdi); within one directory that is a conflict,
and the device has none. A broken file harms only its own devices.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from cryoci.errors import ConfigError, NotFoundError
from cryoci.shim.devices import yaml

DIRECTORIES = ("/etc/cdi", "/run/cdi")
VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
_LIMIT = 8 << 20  # bytes of one specification
_VENDOR = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?"
_CLASS = r"[A-Za-z0-9](?:[A-Za-z0-9_-]*[A-Za-z0-9])?"
_KIND = re.compile(f"{_VENDOR}/{_CLASS}")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_EDITS: dict[str, type] = {
    "env": list, "deviceNodes": list, "mounts": list, "hooks": list, "additionalGids": list,
    "intelRdt": dict, "netDevices": list,
}  # fmt: skip

Edits = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Device:
    """One device: its `kind` ("vendor/class"), its `name`, its own edits, those of all its file, the file."""

    kind: str
    name: str
    edits: Edits
    common: Edits
    source: str

    @property
    def qualified(self) -> str:
        return f"{self.kind}={self.name}"


def split(name: str) -> tuple[str, str] | None:
    """(kind, device) of "vendor/class=device", or None when `name` is no such name."""
    kind, equals, device = name.partition("=")
    return (kind, device) if equals and _KIND.fullmatch(kind) and _NAME.fullmatch(device) else None


def check(value: Any, source: str) -> list[Device]:
    """The devices of a parsed specification. Raises ConfigError naming `source` and the field."""

    def wrong(what: str) -> ConfigError:
        return ConfigError(
            f"{source} is no CDI specification: {what}", hint="mend it, or remove it and make it anew"
        )

    if not isinstance(value, dict):
        raise wrong("it is not an object")
    for key in value:
        if key not in ("cdiVersion", "kind", "annotations", "devices", "containerEdits"):
            raise wrong(f"unknown field {key!r}")
    version, kind = value.get("cdiVersion"), value.get("kind")
    if not isinstance(version, str) or version.removeprefix("v") not in VERSIONS:
        raise wrong(f"cdiVersion {version!r} is not one of {', '.join(VERSIONS)}")
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise wrong(f"kind {kind!r} is not vendor/class")
    common = value.get("containerEdits") or {}
    _check_edits(common, "containerEdits", wrong)
    listed = value.get("devices")
    if not isinstance(listed, list) or not listed:
        raise wrong("it has no devices")
    devices: dict[str, Device] = {}
    for place, entry in enumerate(listed):
        where = f"devices[{place}]"
        if not isinstance(entry, dict) or set(entry) - {"name", "annotations", "containerEdits"}:
            raise wrong(f"{where} is not a device")
        name = entry.get("name")
        name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name  # YAML: name: 0
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise wrong(f"{where} has the name {name!r}")
        if name in devices:
            raise wrong(f"device {name} is there twice")
        edits = entry.get("containerEdits")
        _check_edits(edits, f"{where}.containerEdits", wrong)
        if not edits:
            raise wrong(f"{where} has no containerEdits")
        devices[name] = Device(kind, name, edits, common, source)
    return list(devices.values())


def _check_edits(edits: Any, where: str, wrong: Any) -> None:
    if not isinstance(edits, dict):
        raise wrong(f"{where} is not an object")
    for key, value in edits.items():
        if key not in _EDITS:
            raise wrong(f"unknown field {where}.{key}")
        if value is not None and not isinstance(value, _EDITS[key]):
            raise wrong(f"{where}.{key} is not {'an object' if _EDITS[key] is dict else 'a list'}")
    for variable in edits.get("env") or ():
        if not isinstance(variable, str) or variable.find("=") < 1 or "\0" in variable:
            raise wrong(f"{where}.env has {variable!r}, which is not NAME=VALUE")
    for node in edits.get("deviceNodes") or ():
        if not isinstance(node, dict) or not _absolute(node.get("path")):
            raise wrong(f"{where}.deviceNodes has one without an absolute path")
        path = node["path"]
        if node.get("type") not in (None, "", "b", "c", "u", "p"):
            raise wrong(f"{where}: {path} has the type {node['type']!r}")
        if node.get("hostPath") is not None and not _absolute(node["hostPath"]):
            raise wrong(f"{where}: {path} has a hostPath that is not absolute")
        permissions = node.get("permissions", "")
        if not isinstance(permissions, str) or set(permissions) - set("rwm"):
            raise wrong(f"{where}: {path} has the permissions {permissions!r}, not some of rwm")
        for key in ("major", "minor", "fileMode", "uid", "gid"):
            if node.get(key) is not None and not _natural(node[key]):
                raise wrong(f"{where}: {path} has {key} {node[key]!r}")
    for mount in edits.get("mounts") or ():
        if not isinstance(mount, dict) or not _absolute(mount.get("containerPath")):
            raise wrong(f"{where}.mounts has one without an absolute containerPath")
        if not isinstance(mount.get("hostPath"), str) or not mount["hostPath"]:
            raise wrong(f"{where}.mounts: {mount['containerPath']} has no hostPath")
        if not _texts(mount.get("options")) or not isinstance(mount.get("type", ""), str):
            raise wrong(f"{where}.mounts: {mount['containerPath']} has options that are no list of texts")
    for hook in edits.get("hooks") or ():
        if (
            not isinstance(hook, dict)
            or hook.get("hookName") not in _HOOKS
            or not _absolute(hook.get("path"))
        ):
            raise wrong(f"{where}.hooks has one without a known hookName and an absolute path")
        if not _texts(hook.get("args")) or not _texts(hook.get("env")):
            raise wrong(f"{where}.hooks: {hook['path']} has args or env that are no list of texts")
        if hook.get("timeout") is not None and not _natural(hook["timeout"]):
            raise wrong(f"{where}.hooks: {hook['path']} has the timeout {hook['timeout']!r}")
    for gid in edits.get("additionalGids") or ():
        if not _natural(gid):
            raise wrong(f"{where}.additionalGids has {gid!r}")


def _absolute(path: Any) -> bool:
    return isinstance(path, str) and path[:1] == "/" and "\0" not in path and ".." not in path.split("/")


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32


def _texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


class Registry:
    """The devices that the specifications of this node describe; `problems` says what is wrong with the rest."""

    def __init__(self, directories: Sequence[str] = DIRECTORIES) -> None:
        self.directories = tuple(directories)
        self.devices: dict[str, Device] = {}
        self.problems: list[str] = []
        self._conflicts: dict[str, str] = {}
        for directory in self.directories:
            self._read(directory)

    def _read(self, directory: str) -> None:
        found: dict[str, Device] = {}
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            return
        conflicts: dict[str, str] = {}
        for name in names:
            if not name.endswith((".json", ".yaml", ".yml")):
                continue
            try:
                devices = read(f"{directory}/{name}")
            except ConfigError as e:
                self.problems.append(e.message)
                continue
            for device in devices:
                other = found.get(device.qualified)
                if other is not None:
                    conflicts[device.qualified] = f"both {other.source} and {device.source} describe it"
                found[device.qualified] = device
        self.devices.update(found)
        for key in found:
            self._conflicts.pop(key, None)  # what a later directory says counts alone
        self._conflicts.update(conflicts)

    def add(self, devices: Iterable[Device]) -> None:
        """Devices that no file describes; those of files count more."""
        for device in devices:
            self.devices.setdefault(device.qualified, device)

    def of_kind(self, kind: str) -> list[Device]:
        """The usable devices of one kind."""
        return [d for key, d in self.devices.items() if d.kind == kind and key not in self._conflicts]

    def resolve(self, names: Iterable[str]) -> list[Device]:
        """The devices called `names`, each once. Raises NotFoundError (with what is there) or ConfigError."""
        found: dict[str, Device] = {}
        for name in names:
            if name in self._conflicts:
                raise ConfigError(
                    f"CDI device {name} cannot be told: {self._conflicts[name]}",
                    hint="remove one of the two files",
                )
            if name not in self.devices:
                known = ", ".join(sorted(self.devices)) or "none"
                broken = "".join(f"; {problem}" for problem in self.problems)
                raise NotFoundError(
                    f"this node has no CDI device {name} (it has: {known}){broken}",
                    hint="see `cryoci cdi list`; specifications lie in " + " and ".join(self.directories),
                )
            found[name] = self.devices[name]
        return list(found.values())


def read(path: str) -> list[Device]:
    """The devices of the specification in file `path`. Raises ConfigError."""
    try:
        with open(path, "rb") as f:
            raw = f.read(_LIMIT + 1)
        if len(raw) > _LIMIT:
            raise ValueError(f"larger than {_LIMIT} bytes")
        value = yaml.parse(raw.decode())
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"cannot read the CDI specification {path}: {e}", hint="mend or remove it") from e
    return check(value, path)
