# SPDX-License-Identifier: Apache-2.0
"""Run a program; a failure carries a command line that can be pasted into a shell."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from cryoci import trace
from cryoci.errors import NotFoundError, ToolError

_EXEC = 0.1  # seconds


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    check: bool = True,
    input: bytes | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    stdout: int | IO[Any] = subprocess.PIPE,
    stderr: int | IO[Any] = subprocess.PIPE,
    hint: str | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run `argv` and return its result; stdin is /dev/null unless `input` is given.

    `timeout` is in seconds. Raises ToolError on a nonzero status (with `check`) or a timeout, and
    NotFoundError when the program does not exist.
    """
    words = [os.fspath(a) for a in argv]
    stdin = None if input is not None else subprocess.DEVNULL
    try:
        with trace.call(words) as traced:
            result = subprocess.run(
                words,
                input=input,
                stdin=stdin,
                env=env,
                cwd=cwd,
                timeout=timeout,
                stdout=stdout,
                stderr=stderr,
            )
            traced.status = result.returncode
    except FileNotFoundError as e:
        raise NotFoundError(
            f"cannot run {words[0]}: no such program", hint=f"install it, or put it on PATH: {words[0]}"
        ) from e
    except subprocess.TimeoutExpired as e:
        raise ToolError(f"no answer within {timeout:g} s from: {shlex.join(words)}", hint=hint) from e
    if check and result.returncode != 0:
        raise ToolError(describe(words, result), hint=hint)
    return result


def at_work() -> Iterator[list[str]]:
    """The command lines of this node's processes, less those without one; one that ends meanwhile is left out."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = _command_line(f"/proc/{entry}")
            except OSError:
                continue
            if words:
                yield words


def _command_line(process: str) -> list[str]:
    """Words of the process with that directory; in the middle of its exec it has none for a moment. Raises OSError."""
    deadline = time.monotonic() + _EXEC
    while True:
        with open(f"{process}/cmdline", "rb") as f:
            words = os.fsdecode(f.read()).split("\0")[:-1]
        if words or time.monotonic() > deadline:
            return words
        os.readlink(f"{process}/exe")  # kernel threads and zombies have none
        time.sleep(0.001)


def describe(argv: Sequence[str], result: subprocess.CompletedProcess[bytes]) -> str:
    """One message about a failed command: its status, its last words, its command line."""
    said = (result.stderr or b"").decode(errors="replace").strip() if result.stderr is not None else ""
    if not said and result.stdout:
        said = result.stdout.decode(errors="replace").strip()
    status = f"status {result.returncode}" if result.returncode >= 0 else f"signal {-result.returncode}"
    tail = f": {said[-2000:]}" if said else ""
    return f"command failed with {status}{tail}\n  command: {shlex.join(argv)}"


def which(name: str, *, package: str | None = None) -> str:
    """Absolute path of a program on PATH (sbin included). Raises NotFoundError naming the Debian package."""
    path = os.environ.get("PATH", os.defpath)
    found = shutil.which(name, path=f"{path}:/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        raise NotFoundError(f"{name} is not installed", hint=f"apt-get install {package or name}")
    return found
