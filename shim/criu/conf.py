# SPDX-License-Identifier: Apache-2.0
"""CRIU configuration files: one option a line, evaluated after what the runtime asks for.

Syntax: criu(8), "Configuration file syntax". runc hands the file named by annotation `org.criu.config`
to CRIU, crun does since 1.26 with libcriu >= 4.2; else it is named by $CRIU_CONFIG_FILE, which the
runtime's own settings override.
"""

from __future__ import annotations

import os
from typing import Literal

from cryoci.files import write_atomic
from cryoci.shim.criu.options import CriuOptions

Verb = Literal["dump", "restore"]

_SPELLING = {"log_level": "verbosity"}
# CRIU's parser hands lines to getopt, for which an optional argument is attached (criu/config.c): with a blank
# it would be the default, "soft".
_ATTACHED = frozenset({"manage_cgroups"})
_DUMP_ONLY = frozenset({"skip_in_flight", "link_remap", "ghost_limit", "timeout"})


def render(options: CriuOptions, verb: Verb) -> str:
    """The configuration file for one operation; options without a meaning for `verb` stay out."""
    lines = ["# Written by cryoci-runtime for each checkpoint and restore; see /etc/cryoci/config.toml."]
    for name, value in vars(options).items():
        if value is None or (verb == "restore" and name in _DUMP_ONLY):
            continue
        option = _SPELLING.get(name, name.replace("_", "-"))
        if isinstance(value, bool):
            lines.append(option if value else f"no-{option}")
        elif isinstance(value, tuple):
            lines += [f"{option} {v}" for v in value]
        elif name in _ATTACHED:
            lines.append(f"{option}={value}")
        else:
            lines.append(f"{option} {value}")
    if verb == "dump" and options.manage_cgroups == "ignore":
        # crun before 1.26 cannot be told to ignore them at the restore, so the image must hold none
        lines.append("cgroup-dump-controller none")
    return "\n".join(lines) + "\n"


def write(path: str | os.PathLike[str], options: CriuOptions, verb: Verb) -> None:
    """Write `render(options, verb)` to `path`, atomically. Raises OSError."""
    write_atomic(path, render(options, verb), mode=0o600)
