# SPDX-License-Identifier: Apache-2.0
"""Devices into a bundle: those asked for on create; on restore this node's in place of another node's."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from cryoci.errors import NotFoundError, UnsupportedError
from cryoci.files import read_json
from cryoci.shim import bundle, config
from cryoci.shim.devices import cdi, drop, edits, nvidia, request
from cryoci.shim.devices.options import DeviceOptions

Spec = dict[str, Any]
FACTS = "cryoci-runtime.json"  # shim/checkpoint.py writes it
GPU_DUMP = "gpu.dump"
_LIMIT = 1 << 20  # bytes
_VERSION = re.compile(r"\d+\.\d+(\.\d+)*")


def modify(spec: Spec, context: bundle.Context) -> None:
    """The modifier behind `bundle.devices`. Raises ConfigError, NotFoundError, UnsupportedError."""
    options = config.load().devices
    if context.images is None:
        done = on_create(spec, options)
    else:
        done = on_restore(spec, context.images, options)
        if done is None and drop.hooks(spec):
            context.edits.append("hooks of GPU tools removed")
    if done is not None:
        context.devices = done
        context.edits.append("devices " + " ".join(done["names"]))


def registry(options: DeviceOptions) -> cdi.Registry:
    """The CDI devices of this node; without a specification for them, NVIDIA's GPUs as its driver shows them."""
    found = cdi.Registry(options.cdi_directories)
    if not found.of_kind(nvidia.KIND):
        found.add(nvidia.devices())
    return found


def on_create(spec: Spec, options: DeviceOptions) -> dict[str, Any] | None:
    """Put in what `spec` asks for; None when it asks for nothing. What the engine has put in stays."""
    asked = request.words(spec, options)
    if not asked:
        return None
    here = registry(options)
    devices = here.resolve(request.names(asked, here, options.kinds))
    if _present(spec, devices):
        return _found(spec, [d.qualified for d in devices])
    return edits.apply(spec, devices)


def _present(spec: Spec, devices: list[cdi.Device]) -> bool:
    there = {
        (d.get("path"), d.get("major"), d.get("minor"))
        for d in (spec.get("linux") or {}).get("devices") or []
        if isinstance(d, dict)
    }
    wanted = {(n["path"], n.get("major"), n.get("minor")) for device in devices for n in edits.nodes(device)}
    return bool(wanted) and wanted <= there


def _found(spec: Spec, names: list[str]) -> dict[str, Any]:
    """What GPU tools have put into `spec`, told by its names."""
    copy = {
        "linux": {"devices": list((spec.get("linux") or {}).get("devices") or [])},
        "mounts": list(spec.get("mounts") or []),
    }
    gone = drop.strip(copy)
    mounts = [{"destination": m["destination"], "source": m.get("source")} for m in gone["mounts"]]
    return {"names": names, "nodes": gone["nodes"], "mounts": mounts, "hooks": [], "env": []}


def found(spec: Spec) -> dict[str, Any] | None:
    """`_found` for a container whose devices cryoci did not put in; None when it has no GPU."""
    seen = _found(spec, [])
    return seen if seen["nodes"] else None


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a checkpoint says of its devices; none of it is trusted but as a wish.

    `names` are CDI names on the other node, `count` is how many GPUs it had, `injected` is as `edits.apply`.
    """

    names: tuple[str, ...] = ()
    count: int = 0
    injected: Mapping[str, Any] | None = None


def carried(images: str) -> Carried:
    """What the checkpoint with its CRIU images in `images` says; an empty answer when it says nothing."""
    dump, facts = _read(f"{images}/{GPU_DUMP}"), _read(f"{images}/{FACTS}")
    injected = facts.get("devices")
    if not isinstance(injected, dict):
        spec = _read(f"{images}/../spec.dump")
        try:
            injected = found(spec) if spec else None
        except (AttributeError, KeyError, TypeError):
            injected = None
    names = _names(dump.get("devices")) or _names((injected or {}).get("names"))
    gpus = dump.get("gpus")
    count = len(gpus) if isinstance(gpus, list) else 0
    if not count:
        nodes = (injected or {}).get("nodes")
        nodes = nodes if isinstance(nodes, list) else []
        paths = {str(n.get("path")) for n in nodes if isinstance(n, dict)}
        count = sum(1 for path in paths if drop.GPU_NODE.fullmatch(path))
    return Carried(names, min(count, 1024), injected)


def _read(path: str) -> dict[str, Any]:
    try:
        if os.path.getsize(path) > 8 * _LIMIT:
            return {}
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _names(value: Any) -> tuple[str, ...]:
    value = value if isinstance(value, list) else []
    return tuple(name for name in value[:1024] if isinstance(name, str) and cdi.split(name))


def on_restore(spec: Spec, images: str, options: DeviceOptions) -> dict[str, Any] | None:
    """Exchange the devices of the node of the checkpoint in `images` for this node's; None without GPUs.

    The mounts keep the places that the checkpoint knows, with this node's files behind them. No hooks go in.
    Raises NotFoundError when this node has too few, UnsupportedError when it has no file for such a place.
    """
    wish = carried(images)
    asked = request.words(spec, options)
    gone = drop.strip(spec, wish.injected)
    old_nodes = _paths(gone["nodes"], "path") | _paths((wish.injected or {}).get("nodes"), "path")
    had = sum(1 for path in old_nodes if drop.GPU_NODE.fullmatch(path))
    if not (asked or wish.names or had):
        return None  # also one whose GPUs were no devices of its own, as with all of /dev bound into it
    count = wish.count or had
    here = registry(options)
    given = frozenset(_paths(gone["nodes"], "path"))
    devices = choose(here, mapped(spec) or asked, wish.names, count, options.kinds, given)
    hookless = [
        dataclasses.replace(d, edits={**d.edits, "hooks": []}, common={**d.common, "hooks": []})
        for d in devices
    ]
    kept = list(spec.get("mounts") or [])
    done = edits.apply(spec, hookless)
    places = _paths(gone["mounts"], "destination") | _paths(
        (wish.injected or {}).get("mounts"), "destination"
    )
    if places:
        made = [m for m in spec["mounts"] if m not in kept]
        spec["mounts"] = [m for m in spec["mounts"] if m in kept] + relocate(made, sorted(places))
        done["mounts"] = [
            {"destination": m["destination"], "source": m["source"]} for m in spec["mounts"] if m not in kept
        ]
        spec["mounts"].sort(key=lambda m: str(m.get("destination")).rstrip("/").count("/"))
    new = {node["path"] for node in done["nodes"]}
    done["stale"] = sorted(path for path in old_nodes - new if path.startswith("/dev/"))
    return done


def mapped(spec: Spec) -> list[str]:
    """UUIDs of this node's GPUs that the operator's device map (`cryoci restore --device-map`) names."""
    from cryoci.shim.gpu.restoring import MAP_ANNOTATION, MAP_VARIABLE

    annotations = spec.get("annotations")
    noted = annotations.get(MAP_ANNOTATION) if isinstance(annotations, dict) else None
    text = str(noted or os.environ.get(MAP_VARIABLE) or "auto")
    new = [part.partition("=")[2].strip() for part in text.split(",")]
    return new if all(uuid.startswith("GPU-") for uuid in new) else []


def _paths(entries: Any, key: str) -> set[str]:
    entries = entries if isinstance(entries, list) else []
    return {
        e[key] for e in entries if isinstance(e, dict) and isinstance(e.get(key), str) and e[key][:1] == "/"
    }


def choose(
    here: cdi.Registry,
    asked: list[str],
    names: tuple[str, ...],
    count: int,
    kinds: tuple[str, ...],
    paths: frozenset[str] = frozenset(),
) -> list[cdi.Device]:
    """Devices of this node for a checkpoint that had `names`, with `count` GPUs among them.

    What the bundle asks for now goes first; then the GPUs whose nodes (`paths`) the bundle has, as an engine
    puts them there that has given the container its share of this node; then the same names as before; then
    as many others of the kind. Raises NotFoundError when there are too few.
    """
    named = [n for n in names if n.partition("=")[0] in kinds]
    kind = named[0].partition("=")[0] if named else next((k for k in kinds if here.of_kind(k)), kinds[0])
    single: dict[str, cdi.Device] = {}
    for device in sorted(here.of_kind(kind), key=_order):
        own = _gpu_paths(device)
        if len(own) == 1:
            single.setdefault(own.pop(), device)
    given = [device for path, device in single.items() if path in paths]
    for devices in (_resolve(here, asked, kinds), given, _resolve(here, named, kinds)):
        if devices and (not count or gpus(devices) == count):
            return devices
    if not count or len(single) < count:
        raise NotFoundError(
            f"the checkpoint had {count or len(names)} devices of kind {kind}, and this node has {len(single)}"
            + (f" (it asks for {', '.join(names)})" if names else ""),
            hint="restore it on a node with as many GPUs; `cryoci cdi list` shows what a node has",
        )
    return list(single.values())[:count]


def _resolve(here: cdi.Registry, words: list[str], kinds: tuple[str, ...]) -> list[cdi.Device]:
    """The devices that `words` name, [] when one of them is not here."""
    try:
        return here.resolve(request.names(words, here, kinds))
    except NotFoundError:
        return []


def _gpu_paths(device: cdi.Device) -> set[str]:
    paths = {str(node["path"]) for node in device.edits.get("deviceNodes") or ()}
    return {path for path in paths if drop.GPU_NODE.fullmatch(path)}


def gpus(devices: list[cdi.Device]) -> int:
    """How many GPUs are in `devices`: different nodes such as /dev/nvidia0."""
    return len({path for device in devices for path in _gpu_paths(device)})


def _order(device: cdi.Device) -> tuple[bool, int, str]:
    """Numbers first, by number."""
    return (not device.name.isdigit(), int(device.name) if device.name.isdigit() else 0, device.name)


def relocate(made: list[dict[str, Any]], places: list[str]) -> list[dict[str, Any]]:
    """Mounts for exactly `places`, which the checkpoint has, out of this node's `made`.

    Where a path holds a driver's version, this node's file of another version stands in. What a process has
    mapped must be the same file all the same: CRIU compares its build id. Raises UnsupportedError.
    """
    exact = {m["destination"]: m for m in made}
    alike: dict[str, list[dict[str, Any]]] = {}
    for mount in made:
        alike.setdefault(_VERSION.sub("*", mount["destination"]), []).append(mount)
    result, missing = [], []
    for place in places:
        if place in exact:
            result.append(exact[place])
            continue
        others = alike.get(_VERSION.sub("*", place), [])
        if len(others) == 1:
            result.append({**others[0], "destination": place})
        else:
            missing.append(place)
    if missing:
        raise UnsupportedError(
            f"the checkpoint has driver files mounted that this node has none for: {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            hint="make the same specification on both nodes: `cryoci cdi generate` leaves versions out of the paths",
        )
    return result
