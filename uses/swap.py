# SPDX-License-Identifier: Apache-2.0
"""`cryoci swap`: one container out of the GPU, another one in; whatever fails, the first one runs on."""

from __future__ import annotations

from cryoci.errors import ConflictError, CryociError
from cryoci.shim import app
from cryoci.shim.engines import gpu
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.gpu import Parked


def swap(out: Container, into: Container, *, hooks: bool = True) -> tuple[Parked, Parked]:
    """Park `out`, unpark `into`, with or without app hooks. Raises what the two raise; `out` is as before then."""
    if out.id == into.id:
        raise ConflictError(f"{out.name} and {into.name} are the same container", hint="name two")
    parked = gpu.park(out, app.Choice(off=not hooks))
    try:
        return parked, gpu.unpark_or_stay(into, hooks=hooks)
    except BaseException as error:
        if parked.changed:
            try:
                gpu.unpark(out)
            except CryociError as e:
                raise ConflictError(
                    f"{error}; and then {out.name} could not be unparked again: {e.message}",
                    hint=f"cryoci unpark {out.name}, or cryoci repair {out.name}",
                ) from error
        raise
