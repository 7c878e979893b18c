# SPDX-License-Identifier: Apache-2.0
"""Which GPU of this node stands in for which GPU of the checkpoint.

The driver moves a process only between GPUs of the same chip, wants every GPU that the process saw in the map,
and spoils the process for good when memory runs out in the middle: so all of that is decided before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryoci.errors import SpaceError, UnsupportedError, UsageError
from cryoci.shim.gpu.nvml import Gpu


@dataclass(frozen=True)
class Wanted:
    """A GPU that the processes saw; `need` is the bytes that they held on it."""

    uuid: str
    name: str
    need: int


def choose(
    wanted: Sequence[Wanted], here: Sequence[Gpu], fixed: Mapping[str, str] | None = None
) -> dict[str, Gpu]:
    """{UUID of the checkpoint: GPU of this node}, one for each of `wanted`.

    `fixed` pins old to new, by UUID or by index here. A GPU that is here itself stays itself; the others go,
    largest need first, to the one with the most free memory. Raises UnsupportedError, SpaceError, UsageError.
    """
    chosen: dict[str, Gpu] = {}
    left = {gpu.uuid: gpu for gpu in here}
    pinned = _pinned(wanted, here, fixed or {})
    for one in wanted:  # pins first: a GPU that is here itself must not take what is promised to another
        if one.uuid not in pinned:
            continue
        gpu = pinned[one.uuid]
        if gpu.uuid not in left:
            raise UsageError(
                f"the device map gives {gpu.uuid} to two GPUs of the checkpoint",
                hint="write each NEW once; GPUs that the map does not name are chosen",
            )
        _check(one, gpu)
        chosen[one.uuid] = left.pop(gpu.uuid)
    for one in wanted:
        if one.uuid not in chosen and one.uuid in left:
            _check(one, left[one.uuid])
            chosen[one.uuid] = left.pop(one.uuid)
    for one in sorted(wanted, key=lambda one: -one.need):
        if one.uuid in chosen:
            continue
        same = [gpu for gpu in left.values() if gpu.name == one.name and not gpu.mig]
        if not same:
            names = ", ".join(f"{gpu.name} ({gpu.uuid})" for gpu in left.values()) or "no other GPU"
            raise UnsupportedError(
                f"the checkpoint needs another {one.name} (in place of {one.uuid}), and this node has {names}",
                hint="restore it on a node with the same chips; the driver does not move between kinds",
            )
        gpu = max(same, key=lambda gpu: (gpu.free, -gpu.index))
        _check(one, gpu)
        chosen[one.uuid] = left.pop(gpu.uuid)
    return {one.uuid: chosen[one.uuid] for one in wanted}


def parse_map(text: str) -> dict[str, str]:
    """ "auto", or "OLD=NEW,..." as the keys and values of `choose`'s `fixed`. Raises UsageError."""
    if text == "auto":
        return {}
    fixed: dict[str, str] = {}
    for part in text.split(","):
        old, equals, new = part.strip().partition("=")
        if not equals or not old or not new or old in fixed:
            raise UsageError(
                f"{text!r} is no device map", hint="write auto, or OLD=NEW,... with UUIDs or indices"
            )
        fixed[old] = new
    return fixed


def pairs(chosen: Mapping[str, Gpu]) -> dict[bytes, bytes] | None:
    """The driver's map; None when every GPU is itself, for which it wants none."""
    from cryoci.shim.gpu.nvml import uuid_bytes

    if all(old == gpu.uuid for old, gpu in chosen.items()):
        return None
    return {uuid_bytes(old): gpu.key for old, gpu in chosen.items()}


def _pinned(wanted: Sequence[Wanted], here: Sequence[Gpu], fixed: Mapping[str, str]) -> dict[str, Gpu]:
    old_names = {name: one.uuid for i, one in enumerate(wanted) for name in (one.uuid, str(i))}
    new_names = {name: gpu for gpu in here for name in (gpu.uuid, str(gpu.index))}
    found: dict[str, Gpu] = {}
    for old, new in fixed.items():
        if old not in old_names:
            raise UsageError(
                f"the device map names {old}, which is no GPU of the checkpoint",
                hint=f"it has {', '.join(one.uuid for one in wanted)}",
            )
        if new not in new_names:
            raise UsageError(
                f"the device map names {new}, which is no GPU that the container gets here",
                hint=f"there are {', '.join(gpu.uuid for gpu in here) or 'none'}",
            )
        found[old_names[old]] = new_names[new]
    return found


def _check(one: Wanted, gpu: Gpu) -> None:
    if gpu.name != one.name:
        raise UnsupportedError(
            f"the checkpoint was made on {one.name} ({one.uuid}), and {gpu.uuid} is {gpu.name}",
            hint="restore it on the same chip; the driver does not move between kinds",
        )
    if gpu.mig:
        raise UnsupportedError(
            f"{gpu.uuid} ({gpu.name}) is split by MIG, which the driver cannot restore to",
            hint="turn MIG off on that GPU, or use another one",
        )
    if gpu.free < one.need:
        raise SpaceError(
            f"{gpu.uuid} ({gpu.name}) has {gpu.free >> 20} MiB free, and the checkpoint needs {one.need >> 20} MiB",
            hint="end or park (`cryoci park`) what else uses it; a restore that runs out of memory is lost for good",
        )
