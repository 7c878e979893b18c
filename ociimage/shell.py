# SPDX-License-Identifier: Apache-2.0
"""`sh` for programs that are part of a job: no pty, no colours, whole errors, a command line that can be pasted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import sh

from cryoci.command import which
from cryoci.errors import ToolError


class Program:
    """A program on PATH, called with words; returns what it printed, without the final newline.

    Raises NotFoundError when it is not installed, ToolError with all that it said when it fails.
    """

    def __init__(self, name: str, *, package: str | None = None) -> None:
        self._command = sh.Command(which(name, package=package)).bake(
            _tty_in=False, _tty_out=False, _tty_err=False, _in="", _return_cmd=True, _truncate_exc=False
        )
        self._name = name

    def __call__(self, words: Sequence[str], *, hint: str | None = None) -> str:
        try:
            done = self._command(*words)
        except sh.ErrorReturnCode as e:
            said = (e.stderr or e.stdout).decode(errors="replace").strip()
            line = shlex.join([self._name, *words])
            how = f"signal {-e.exit_code}" if e.exit_code < 0 else f"status {e.exit_code}"
            raise ToolError(f"command failed with {how}: {said}\n  command: {line}", hint=hint) from None
        return str(done.stdout.decode(errors="replace")).rstrip("\n")
