# SPDX-License-Identifier: Apache-2.0
"""One HTML page of one operation: what a checkpoint holds and where its memory lies, for `--report FILE.html`.

With what the operation took and what went wrong (reporting.py) it is all that somebody needs who is called at night
and has nothing but this file. It names processes, files and mounts of the container, so only its owner may read it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryoci.errors import CryociError
from cryoci.files import write_atomic
from cryoci.ociimage import catalog, contents
from cryoci.ociimage import report as checkpoint_report
from cryoci.ociimage.compat import Node
from cryoci.ociimage.reference import LayoutRef, Reference, RegistryRef
from cryoci.ociimage.report import Report
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim.gpu import dump
from cryoci.uses import memory_map
from cryoci.uses.reporting import Operation, check, said

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities


@dataclass(frozen=True)
class Held:
    """What a checkpoint holds: inspect's report, the maps of its processes, its GPUs; `problems` with the latter."""

    report: Report
    maps: tuple[memory_map.Map, ...]
    gpus: dump.Dump | None
    problems: tuple[str, ...]


def look(
    ref: Reference,
    *,
    node: Node | None = None,
    registry_options: RegistryOptions | None = None,
    identities: Identities | None = None,
) -> Held:
    """Look at a checkpoint as `inspect` does, without fetching memory. Raises what that does."""
    image = None
    if isinstance(ref, (LayoutRef, RegistryRef)):
        image = catalog.inspect(ref, registry_options=registry_options)
    problems: list[str] = []
    with contents.opened(
        ref, memory_map.keep, registry_options=registry_options, identities=identities
    ) as found:
        report = checkpoint_report.read(ref, found, image, node=node)
        maps: list[memory_map.Map] = []
        gpus = None
        try:
            maps = memory_map.read(found, report.processes)
        except (CryociError, OSError) as e:
            problems.append(f"its memory map cannot be read: {said(e)}")
        try:
            gpus = dump.read(os.fspath(found.directory / "checkpoint"))
        except CryociError as e:
            problems.append(e.message)
    return Held(report, tuple(maps), gpus, tuple(problems))


def write(
    target: str,
    ref: Reference,
    *,
    node: Node | None = None,
    registry_options: RegistryOptions | None = None,
    identities: Identities | None = None,
) -> None:
    """The page of a checkpoint alone. Raises what `check` and `look` raise, OSError."""
    from cryoci.uses.report_page import page

    path = check(target)
    held = look(ref, node=node, registry_options=registry_options, identities=identities)
    operation = Operation(f"checkpoint {ref}", ended=time.time())
    write_atomic(path, page(operation, held, "").encode(), mode=0o600)
