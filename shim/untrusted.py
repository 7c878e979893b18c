# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint may ask of the node that restores it.

config.dump and spec.dump come from an archive. Devices, hooks, host paths and annotations in them would
act on this node as root, outside of the container (containerd's THREAT_MODEL.md CRI-005 lists real cases),
so they are taken out; what a container cannot run without is refused by name unless the operator allows it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cryoci.errors import ImageError, RestoreError
from cryoci.shim import app
from cryoci.shim.devices import drop

ALLOWABLE = ("mounts", "devices", "host-namespaces", "privileged")

# runtime-spec types that the kernel fills; everything else brings a host path in.
_KERNEL_MOUNTS = frozenset({"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"})
# Destinations that podman makes anew for each restore (libpod/container_internal_common.go, restore).
PODMAN_MADE = frozenset(
    {"/dev/shm", "/etc/resolv.conf", "/etc/hosts", "/etc/hostname", "/run/.containerenv", "/run/secrets"}
)
_ANNOTATIONS = frozenset(
    {
        "io.container.manager",
        "org.opencontainers.image.stopSignal",
        "org.systemd.property.KillSignal",
        "org.systemd.property.TimeoutStopUSec",
        *app.ANNOTATIONS,  # its hooks act on the container alone
    }
)
_SPEC_KEYS = frozenset(
    {"ociVersion", "process", "root", "hostname", "domainname", "mounts", "annotations", "linux"}
)
_LINUX_KEYS = frozenset(
    {"uidMappings", "gidMappings", "sysctl", "resources", "cgroupsPath", "namespaces", "seccomp"}
    | {"rootfsPropagation", "maskedPaths", "readonlyPaths", "mountLabel", "personality", "timeOffsets"}
)
_VOLUME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}")  # libpod/define/errors.go, RegexError
_NAMESPACES = ("pid", "network", "ipc", "uts", "mount")

# libpod ContainerConfig keys that describe the container itself. Left out on purpose: what names host files
# or programs (exitCommand, rootfs, overlayVolumes, conmonPidFile, pid_file, logPath, secretsPath, ...).
_PODMAN_KEYS = frozenset(
    """
    spec id name Dependencies idMappingsOptions networkMode networks newNetworks createNetNS
    postConfigureNetNS staticIP staticMAC portMappings newPortMappings exposedPorts dnsServer dnsSearch
    dnsOption hostAdd useImageHostname UseImageHosts UseImageResolvConf rootfsImageID rootfsImageName
    RawImageName runtime command entrypoint CreateCommand createdTime created user groups umask
    stopSignal stopTimeout stopSignalName labels logDriver logSize logTag cgroupManager cgroupsMode
    cgroupParent privileged shmSize shmSizeSystemd noShm noShmShare namedVolumes userVolumes volumes
    readWriteTmpfs restart_policy restart_retries healthcheck healthcheck_on_failure_action
    healthMaxLogCount healthMaxLogSize startupHealthCheck timezone passwd
    passwdEntry hostUsers envSecrets ShmDir staticDir mounts lockID storageOpts
    labelopts label_nested processLabel mountLabel createWorkingDir pause isService isInfra
    kubeExitCodePropagation sdnotifyMode systemd timeout pidNsCtr netNsCtr ipcNsCtr utsNsCtr
    """.split()
)


def spec(
    value: Any,
    *,
    made_here: Collection[str] = (),
    allow: Collection[str] = (),
    injected: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A copy of an archive's spec that is safe to run on this node.

    `made_here` are mount destinations that the engine fills itself; `allow` names what the operator permits
    (ALLOWABLE). GPUs of the old node go without a word, by their names and by `injected` (shim/devices): this
    node's come in their place. Raises ImageError when it is no spec, RestoreError when it asks for what is not
    permitted.
    """
    if not isinstance(value, dict) or not isinstance(value.get("process"), dict):
        raise ImageError("spec.dump is not an OCI runtime specification")
    asked = _copy(value)
    drop.strip(asked, injected)
    for key in ("root", "linux", "annotations"):
        if not isinstance(asked.get(key) or {}, dict):
            raise ImageError(f"{key} of spec.dump is not an object")
    clean = {key: part for key, part in asked.items() if key in _SPEC_KEYS}  # no hooks, no vm, no zos
    theirs = asked.get("linux") or {}
    linux = {key: part for key, part in theirs.items() if key in _LINUX_KEYS}
    wants: list[tuple[str, str]] = []
    clean["mounts"] = list(_mounts(asked.get("mounts"), made_here, allow, wants))
    if devices := theirs.get("devices"):
        if "devices" in allow:
            linux["devices"] = devices
        else:
            wants.append(("devices", ", ".join(_names(devices, "path"))))
    if "devices" not in allow:
        linux["resources"] = _resources(theirs.get("resources"))
    linux["namespaces"] = _namespaces(linux.get("namespaces") or [], allow, wants)
    clean["linux"] = linux
    noted = asked.get("annotations") or {}
    clean["annotations"] = {
        key: text for key, text in noted.items() if key in _ANNOTATIONS and isinstance(text, str)
    }
    _refuse(wants)
    return clean


def podman_config(
    value: Any,
    *,
    volumes: str = "/var/lib/containers/storage/volumes",
    made_here: Collection[str] = (),
    allow: Collection[str] = (),
    injected: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A copy of an archive's libpod ContainerConfig that is safe to import here. Raises as `spec`.

    `volumes` is podman's directory of named volumes on this node, `made_here` as for `spec`, besides podman's own.
    """
    if not isinstance(value, dict):
        raise ImageError("config.dump is not a podman container configuration")
    wants: list[tuple[str, str]] = []
    if value.get("privileged") and "privileged" not in allow:
        wants.append(("privileged", "the container ran with --privileged"))
    if value.get("rootfs"):
        wants.append(("rootfs", str(value["rootfs"])))
    _refuse(wants)
    clean = _copy({key: part for key, part in value.items() if key in _PODMAN_KEYS})
    named = _volumes(clean.get("namedVolumes"))
    made = {*PODMAN_MADE, *named, *made_here}
    clean["spec"] = spec(clean.get("spec"), made_here=made, allow=allow, injected=injected)
    for mount in clean["spec"]["mounts"]:
        if mount["destination"] in named:  # podman keeps the mount as it stands, so it must be this node's
            mount["source"] = f"{volumes}/{named[mount['destination']]}/_data"
    return clean


def _copy(value: dict[str, Any]) -> dict[str, Any]:
    try:
        return copy.deepcopy(value)
    except RecursionError as e:
        raise ImageError("the container's configuration is nested too deeply") from e


def _volumes(volumes: Any) -> dict[str, str]:
    """Destination -> name of the named volumes."""
    named: dict[str, str] = {}
    for volume in _list(volumes, "namedVolumes of config.dump"):
        name, where = volume.get("volumeName"), volume.get("dest")
        if not isinstance(name, str) or not _VOLUME.fullmatch(name) or not isinstance(where, str):
            raise ImageError(f"config.dump names a volume that cannot be one: {str(name)[:80]!r}")
        if volume.get("subPath"):
            raise RestoreError(
                f"volume {name} is mounted by a directory inside of it, which cryoci does not restore",
                hint="mount the whole volume in the container",
            )
        named[where] = name
    return named


def _mounts(
    mounts: Any, made_here: Collection[str], allow: Collection[str], wants: list[tuple[str, str]]
) -> Iterable[dict[str, Any]]:
    for mount in _list(mounts, "mounts of spec.dump"):
        kind, options = mount.get("type"), mount.get("options") or []
        if (
            not isinstance(mount.get("destination"), str)
            or not isinstance(kind, str | None)
            or not isinstance(options, list)
            or not all(isinstance(option, str) for option in options)
        ):
            raise ImageError("a mount of spec.dump is not a mount")
        bind = kind not in _KERNEL_MOUNTS or any(option.strip() in ("bind", "rbind") for option in options)
        if bind and mount["destination"] not in made_here and "mounts" not in allow:
            wants.append(("mounts", f"{mount.get('source')} on {mount['destination']}"))
        else:
            yield mount


def _resources(resources: Any) -> dict[str, Any]:
    """Without permissions for devices: the runtime adds those that every container has."""
    if not isinstance(resources or {}, dict):
        raise ImageError("linux.resources of spec.dump is not an object")
    kept = dict(resources or {})
    if "devices" in kept:
        kept["devices"] = [{"allow": False, "access": "rwm"}]
    return kept


def _namespaces(
    namespaces: Any, allow: Collection[str], wants: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Namespaces of the container's own; a path into another one means nothing on this node."""
    own = [{"type": str(n.get("type"))} for n in _list(namespaces, "namespaces of spec.dump")]
    missing = [name for name in _NAMESPACES if {"type": name} not in own]
    if missing and "host-namespaces" not in allow:
        wants.append(("host-namespaces", ", ".join(missing)))
    return own


def _refuse(wants: list[tuple[str, str]]) -> None:
    if not wants:
        return
    kinds = sorted({kind for kind, _ in wants})
    what = "; ".join(f"{kind}: {detail}" for kind, detail in wants)
    flags = " ".join(f"--allow {kind}" for kind in kinds if kind in ALLOWABLE)
    raise RestoreError(
        f"the checkpoint asks for things of this node that an image may not take ({what})",
        hint=f"if you trust where it comes from, add: {flags}"
        if flags
        else "it cannot be restored by cryoci",
    )


def _list(values: Any, what: str) -> list[dict[str, Any]]:
    values = values or []
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ImageError(f"the {what} are not a list of objects")
    return values


def _names(values: Any, key: str) -> list[str]:
    return [str(v.get(key)) for v in values if isinstance(v, dict)] if isinstance(values, list) else ["?"]
