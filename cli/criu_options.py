# SPDX-License-Identifier: Apache-2.0
"""Options of CRIU that `checkpoint` and `restore` take, as click options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cryoci.shim.criu.options import CGROUP_MODES, NETWORK_LOCKS, CriuOptions

_FLAG: dict[str, Any] = {"is_flag": True}
_SHARED: dict[str, dict[str, Any]] = {
    "tcp-established": {**_FLAG, "help": "Carry established TCP connections."},
    "file-locks": {**_FLAG, "help": "Carry file locks."},
    "ext-unix-sk": {**_FLAG, "help": "Allow unix sockets that lead out of the container."},
    "shell-job": {**_FLAG, "help": "Allow a terminal of the caller's session."},
    "network-lock": {"type": click.Choice(NETWORK_LOCKS), "help": "How the network is held still."},
    "manage-cgroups": {"type": click.Choice(CGROUP_MODES), "help": "What CRIU does with cgroups."},
    "external": {"multiple": True, "metavar": "SPEC", "help": "An external resource, as in criu(8)."},
}
_DUMP: dict[str, dict[str, Any]] = {
    "link-remap": {**_FLAG, "help": "Carry open files whose name was unlinked but that have others."},
    "ghost-limit": {"metavar": "SIZE", "help": "Largest deleted but open file to carry (CRIU: 1M)."},
    "timeout": {"type": int, "metavar": "SECONDS", "help": "Time for all processes to stop (CRIU: 10)."},
    "skip-in-flight": {**_FLAG, "help": "Leave out TCP connections that are not accepted yet."},
}
_RESTORE: dict[str, dict[str, Any]] = {
    "tcp-close": {**_FLAG, "help": "Restore established TCP connections as closed."},
}


def for_dump(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a dump."""
    return _add(command, {**_SHARED, **_DUMP})


def for_restore(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a restore."""
    return _add(command, {**_SHARED, **_RESTORE})


def take(values: dict[str, Any]) -> CriuOptions:
    """The CriuOptions among a command's keyword arguments, which are taken out of `values`."""
    found: dict[str, Any] = {}
    for name in {**_SHARED, **_DUMP, **_RESTORE}:
        value = values.pop(name.replace("-", "_"), None)
        if not (value is None or value is False or value == ()):  # 0 is a value, and refused as such
            found[name] = value
    return CriuOptions.from_mapping(found, where="--")


def _add(command: Callable[..., Any], options: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    for name, settings in reversed(options.items()):
        command = click.option(f"--{name}", **settings)(command)
    return command
