# SPDX-License-Identifier: Apache-2.0
"""One HTML page of one operation: `--report FILE.html` of checkpoint, restore and inspect.

What the operation took, what the checkpoint holds and where its memory lies, what went wrong: all that somebody needs
who is called at night and has nothing but this file. It is written when the operation fails, too. It names
processes, files and mounts of the container, so only its owner may read it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cryoci.errors import CryociError, NotFoundError, UsageError
from cryoci.files import write_atomic
from cryoci.ociimage import catalog, contents
from cryoci.ociimage import report as checkpoint_report
from cryoci.ociimage.compat import Node
from cryoci.ociimage.reference import LayoutRef, Reference, RegistryRef
from cryoci.ociimage.report import Report
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim.gpu import dump
from cryoci.timeline import Recorded, recording
from cryoci.uses import memory_map

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities


@dataclass(frozen=True)
class Held:
    """What a checkpoint holds: inspect's report, the maps of its processes, its GPUs; `problems` with the latter."""

    report: Report
    maps: tuple[memory_map.Map, ...]
    gpus: dump.Dump | None
    problems: tuple[str, ...]


@dataclass
class Operation:
    """What the page is of. The caller fills in `ref` as soon as there is something to look at, `seconds` and the rest.

    `error` and `hint` say why it failed; `made` are names and values of what it made.
    """

    title: str
    ref: Reference | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    made: Sequence[tuple[str, str]] = ()
    error: str = ""
    hint: str = ""
    recorded: Recorded | None = None
    ended: float = 0.0  # seconds since the epoch


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
            problems.append(f"its memory map cannot be read: {_said(e)}")
        try:
            gpus = dump.read(os.fspath(found.directory / "checkpoint"))
        except CryociError as e:
            problems.append(e.message)
    return Held(report, tuple(maps), gpus, tuple(problems))


def check(target: str) -> Path:
    """The file that a report goes to. Raises UsageError, NotFoundError: before anything is done."""
    path = Path(target)
    if path.suffix != ".html":
        raise UsageError(f"--report {target}: a report is an HTML page", hint="name it FILE.html")
    if not path.absolute().parent.is_dir():
        raise NotFoundError(f"--report {target}: there is no such directory", hint="make it first")
    return path


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


@contextmanager
def reporting(
    target: str | None,
    timeline: str | None,
    title: str,
    *,
    complain: Callable[[str], None],
    node: Callable[[], Node],
    registry_options: RegistryOptions | None = None,
    identities: Identities | None = None,
) -> Iterator[Operation]:
    """Record the with block for `--timeline` and `--report`; both are written when the block fails, too.

    A report that cannot be written fails no operation that is done: `complain` gets to know why. Raises UsageError and
    NotFoundError, before the block.
    """
    from cryoci.uses.report_page import page

    path = check(target) if target is not None else None
    operation = Operation(title)
    try:
        with recording(timeline, title, keep=path is not None) as operation.recorded:
            yield operation
    except BaseException as e:
        operation.error, operation.hint = (
            _said(e),
            (e.hint or e.advice or "") if isinstance(e, CryociError) else "",
        )
        raise
    finally:
        if path is not None:
            operation.ended = time.time()
            try:
                held, problem = _try(operation, node, registry_options, identities)
                write_atomic(path, page(operation, held, problem).encode(), mode=0o600)
            except (CryociError, OSError) as e:
                complain(f"no report: {_said(e)}")


def _try(
    operation: Operation,
    node: Callable[[], Node],
    registry_options: RegistryOptions | None,
    identities: Identities | None,
) -> tuple[Held | None, str]:
    """What the operation was about, or why nothing can be said of it."""
    if operation.ref is None:
        return None, ""
    try:
        held = look(operation.ref, node=node(), registry_options=registry_options, identities=identities)
    except (CryociError, OSError) as e:
        return None, f"{operation.ref} could not be looked at: {_said(e)}"
    return held, ""


def _said(error: BaseException) -> str:
    if isinstance(error, CryociError):
        return error.message
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return f"ended with status {error.code}"
    return str(error) or type(error).__name__
