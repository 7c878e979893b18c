# SPDX-License-Identifier: Apache-2.0
"""A trace of the programs that cryoci runs: for people on stderr (`cryoci --verbose`), for machines in a log.

$CRYOCI_LOG is "journald", or a file that gets one JSON object a line: time (RFC 3339), event, pid, and the rest.
Calls and spans have `start`, CLOCK_MONOTONIC seconds, which is the same clock in all processes of the node: what
`--timeline` draws (cryoci/timeline.py, which reads them from $CRYOCI_TIMELINE). A log that cannot be written is no
reason to fail.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cryoci.redact import words

JOURNAL = "/run/systemd/journal/socket"
TIMELINE = "CRYOCI_TIMELINE"
verbose = False  # set by `cryoci --verbose`
_complained = False


class Call:
    """One call of a program; `status` is its exit status once it has ended."""

    status: int | None = None


@contextmanager
def call(argv: Sequence[str]) -> Iterator[Call]:
    """Trace the program that the with block runs: its words (secrets removed), duration and status."""
    if not verbose and "CRYOCI_LOG" not in os.environ and TIMELINE not in os.environ:
        yield Call()
        return
    made, start = Call(), time.monotonic()
    try:
        yield made
    finally:
        seconds = time.monotonic() - start
        shown = words(argv)
        if verbose:
            state = "failed" if made.status is None else f"status {made.status}"
            sys.stderr.write(f"+ {seconds:7.3f} s  {state}  {shlex.join(_short(shown))}\n")
        event("call", argv=shown, start=round(start, 6), seconds=round(seconds, 6), status=made.status)


@contextmanager
def span(name: str, **values: Any) -> Iterator[dict[str, Any]]:
    """Trace a step of cryoci's own. `values`, to which the with block may add, say how much (bytes, threads)."""
    start = time.monotonic()
    try:
        yield values
    finally:
        event("span", name=name, start=round(start, 6), seconds=round(time.monotonic() - start, 6), **values)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """`span`, whose duration is put into `seconds` too when the with block ends well."""
    start = time.monotonic()
    with span(name):
        yield
    seconds[name] = time.monotonic() - start


def _short(argv: Sequence[str]) -> Sequence[str]:
    """The runtime by its name, for people: it is called by its file, and that by an interpreter."""
    return ["cryoci-runtime", *argv[3:]] if argv[2:3] and argv[2].endswith("/shim/launcher.py") else argv


def event(event: str, **values: Any) -> None:
    """Write one event to $CRYOCI_LOG and $CRYOCI_TIMELINE, as far as they are set.

    Never raises; with --verbose it says why there is no log.
    """
    global _complained
    sinks = [(name, os.environ[name]) for name in ("CRYOCI_LOG", TIMELINE) if os.environ.get(name)]
    if not sinks:
        return
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    for variable, where in sinks:
        try:
            text = json.dumps({"time": stamp, "event": event, "pid": os.getpid(), **values}, default=str)
            if where == "journald":
                _journal(event, text)
            else:
                _append(where, text)
        except (OSError, ValueError) as e:
            if verbose and not _complained:
                _complained = True
                sys.stderr.write(f"cryoci: nothing is logged: {variable}={where}: {e}\n")


def _append(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(fd, text.encode() + b"\n")
    finally:
        os.close(fd)


def _journal(name: str, text: str) -> None:
    """systemd's native protocol: NAME=VALUE lines; JSON has no newline in it."""
    import socket

    fields = f"MESSAGE={text}\nPRIORITY=6\nSYSLOG_IDENTIFIER=cryoci\nCRYOCI_EVENT={name}\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.settimeout(1)
        journal.sendto(fields.encode(), JOURNAL)
