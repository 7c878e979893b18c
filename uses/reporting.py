# SPDX-License-Identifier: Apache-2.0
"""The page that an operation leaves behind: `--report FILE.html`, also when it fails.

What looks at checkpoints and draws pages (report.py, report_page.py) is imported when a page is written, since every
checkpoint and restore passes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cryoci.errors import CryociError, NotFoundError, UsageError
from cryoci.files import write_atomic
from cryoci.timeline import Recorded, recording

if TYPE_CHECKING:
    from cryoci.ociimage.compat import Node
    from cryoci.ociimage.reference import Reference
    from cryoci.ociimage.seal.keyring import Identities
    from cryoci.ociimage.transport import RegistryOptions
    from cryoci.uses.report import Held


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


def check(target: str) -> Path:
    """The file that a report goes to. Raises UsageError, NotFoundError: before anything is done."""
    path = Path(target)
    if path.suffix != ".html":
        raise UsageError(f"--report {target}: a report is an HTML page", hint="name it FILE.html")
    if not path.absolute().parent.is_dir():
        raise NotFoundError(f"--report {target}: there is no such directory", hint="make it first")
    return path


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
    path = check(target) if target is not None else None
    operation = Operation(title)
    try:
        with recording(timeline, title, keep=path is not None) as operation.recorded:
            yield operation
    except BaseException as e:
        operation.error, operation.hint = (
            said(e),
            (e.hint or e.advice or "") if isinstance(e, CryociError) else "",
        )
        raise
    finally:
        if path is not None:
            operation.ended = time.time()
            from cryoci.uses.report_page import page

            try:
                held, problem = _try(operation, node, registry_options, identities)
                write_atomic(path, page(operation, held, problem).encode(), mode=0o600)
            except Exception as e:  # whatever a checkpoint may hold: the operation itself is done
                complain(f"no report: {said(e)}")


def _try(
    operation: Operation,
    node: Callable[[], Node],
    registry_options: RegistryOptions | None,
    identities: Identities | None,
) -> tuple[Held | None, str]:
    """What the operation was about, or why nothing can be said of it."""
    if operation.ref is None:
        return None, ""
    from cryoci.uses.report import look

    try:
        held = look(operation.ref, node=node(), registry_options=registry_options, identities=identities)
    except (CryociError, OSError) as e:
        return None, f"{operation.ref} could not be looked at: {said(e)}"
    return held, ""


def said(error: BaseException) -> str:
    if isinstance(error, CryociError):
        return error.message
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, SystemExit):
        return f"ended with status {error.code}"
    return str(error) or type(error).__name__
