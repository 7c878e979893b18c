# SPDX-License-Identifier: Apache-2.0
"""Which GPU of this node takes the place of which GPU of the other node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from cryoci.errors import ConflictError, SpaceError, UnsupportedError


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU: `chip` is its model as the driver names it; `free` bytes of memory (here), `need` bytes (there)."""

    uuid: str
    chip: str
    index: int = 0
    free: int = 0
    need: int = 0


def choose(
    wanted: Sequence[Gpu], available: Sequence[Gpu], fixed: Mapping[str, str] | None = None
) -> dict[str, Gpu]:
    """Old UUID -> GPU of this node, for every GPU that the checkpoint saw; `fixed` is old UUID -> new UUID.

    The chip must be the same and the memory free. A GPU that is here itself stays; then the one that needs
    most chooses first, and gets the fullest that is large enough. Raises UnsupportedError (no such chip, or
    fewer), SpaceError (memory), ConflictError (a fixed choice that cannot be).
    """
    here = {gpu.uuid: gpu for gpu in available}
    chosen: dict[str, Gpu] = {}
    for old, new in (fixed or {}).items():
        gpu = next((w for w in wanted if w.uuid == old), None)
        if gpu is None or new not in here or new in [c.uuid for c in chosen.values()]:
            raise ConflictError(
                f"GPU {old} cannot become {new}: "
                + ("the checkpoint has no such GPU" if gpu is None else "that is not here, or taken twice"),
                hint=f"the checkpoint has {_list(wanted)}; this node has {_list(available)}",
            )
        _fits(gpu, here[new])
        chosen[old] = here[new]
    for gpu in wanted:
        taken = {c.uuid for c in chosen.values()}
        if (
            gpu.uuid not in chosen
            and gpu.uuid in here
            and gpu.uuid not in taken
            and here[gpu.uuid].free >= gpu.need
        ):
            chosen[gpu.uuid] = here[gpu.uuid]
    for gpu in sorted(wanted, key=lambda g: (-g.need, g.index)):
        if gpu.uuid in chosen:
            continue
        taken = {c.uuid for c in chosen.values()}
        alike = [g for g in available if g.chip == gpu.chip and g.uuid not in taken]
        if not alike:
            raise UnsupportedError(
                f"none of this node's GPUs is left for {gpu.uuid}, a {gpu.chip} (the checkpoint needs {len(wanted)}): "
                f"it has {_list(available)}",
                hint="restore it on a node with as many GPUs of the same model; drivers move state between no others",
            )
        fitting = sorted((g for g in alike if g.free >= gpu.need), key=lambda g: (g.free, g.index))
        if not fitting:
            _fits(gpu, max(alike, key=lambda g: g.free))
        chosen[gpu.uuid] = fitting[0]
    return {gpu.uuid: chosen[gpu.uuid] for gpu in wanted}


def _fits(old: Gpu, new: Gpu) -> None:
    if old.chip != new.chip:
        raise UnsupportedError(
            f"the checkpoint is of a {old.chip} ({old.uuid}), and {new.uuid} is a {new.chip}",
            hint="choose a GPU of the same model",
        )
    if new.free < old.need:
        raise SpaceError(
            f"the checkpoint needs {old.need / 1e9:.1f} GB of GPU memory for {old.uuid}, and {new.uuid} has "
            f"{new.free / 1e9:.1f} GB free",
            hint="end what uses that GPU (nvidia-smi shows it): a restore without room ends the process for good",
        )


def _list(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"{g.uuid} ({g.chip})" for g in gpus) or "none"
