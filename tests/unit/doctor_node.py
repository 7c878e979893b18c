# SPDX-License-Identifier: Apache-2.0
"""A node for the doctor: files below a directory, programs that are shell scripts, system calls by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from cryoci.shim.doctor.check import Facts


@dataclasses.dataclass(frozen=True)
class Given:
    """`files` path -> text (None: a directory), `programs` name -> body of a shell script, `calls` name -> errno."""

    files: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    programs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    machine: str = "x86_64"


def build(at: Path, given: Given) -> Facts:
    """Lay the node out below `at`."""
    bin_directory = at / "bin"
    bin_directory.mkdir(parents=True)
    for path, text in given.files.items():
        target = at / "root" / path.lstrip("/")
        if text is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    for name, script in given.programs.items():
        program = bin_directory / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    calls = {name: (lambda code=code: code) for name, code in given.calls.items()}
    return Facts(at / "root", str(bin_directory), calls, given.machine)
