# SPDX-License-Identifier: Apache-2.0
"""The standard files of a long-lived process that restores containers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cryoci.shim.engines import streams


@contextmanager
def own() -> Iterator[Callable[[str], None]]:
    """Keep stdin, stdout and stderr to this process for a with block; yields how to say a line on stdout.

    Containers of bare runc and crun inherit them from whoever restores them, and CRIU could not dump a file, a device,
    a socket of the journal or a terminal of this node again. They get pipes, which it can: nothing to read, and
    a `cat` that ends with the last who writes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(fd) for fd in (0, 1, 2)]  # not inheritable
    (nothing, end), (drain, sink) = os.pipe(), os.pipe()
    os.close(end)
    streams.relay(drain, subprocess.DEVNULL)
    os.close(drain)

    def say(line: str) -> None:
        text = "".join(
            c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line.replace("\n", " ")
        )
        try:
            os.write(kept[1], f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())
        except OSError:
            pass  # whoever read it has gone, and that must not end the work

    try:
        for fd, pipe in enumerate((nothing, sink, sink)):
            os.dup2(pipe, fd)
        yield say
    finally:
        for fd, saved in enumerate(kept):
            os.dup2(saved, fd)
            os.close(saved)
        os.close(nothing)
        os.close(sink)
