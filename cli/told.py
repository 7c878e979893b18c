# SPDX-License-Identifier: Apache-2.0
"""`--timeline` and `--report` of a command: what it took, and what it made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from cryoci.cli import output

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities
    from cryoci.ociimage.transport import RegistryOptions
    from cryoci.uses.reporting import Operation

Command = TypeVar("Command", bound=Callable[..., Any])


def options(command: Command) -> Command:
    """The two options; `take` takes them from what the command gets."""
    return output.timeline_option(output.report_option(command))


def take(given: dict[str, Any]) -> tuple[str | None, str | None]:
    """Where the page and the timeline go, taken out of `given`."""
    return given.pop("report"), given.pop("timeline")


def about(
    title: str,
    where: tuple[str | None, str | None],
    *,
    registry: RegistryOptions | None = None,
    identities: Identities | None = None,
) -> AbstractContextManager[Operation]:
    """A with block that the page and the timeline at `where` (`take`) tell of; also when it fails.

    Raises UsageError and NotFoundError, before the block.
    """
    from cryoci.cli import node
    from cryoci.uses.reporting import reporting

    return reporting(
        *where,
        title,
        complain=output.complain,
        node=node.here,
        registry_options=registry,
        identities=identities,
    )
