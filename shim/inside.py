# SPDX-License-Identifier: Apache-2.0
"""Act inside of a container's namespaces: talk to its application, name its host. A thread enters them for that."""

from __future__ import annotations

import os
import re
import socket
import time
import urllib.parse
from contextlib import suppress

from cryoci.errors import ConflictError, RestoreError, UsageError
from cryoci.shim import netns

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_CLOSING = 1.0  # seconds
_SLACK = _CLOSING + 0.5  # seconds beyond those of a question, in which it can still say what was wrong


def check_url(method: str, url: str) -> None:
    """Raise UsageError unless this is a question to the application itself.

    The words may come out of a checkpoint, so they reach nothing beyond the container: a plain loopback
    address, in its own network namespace.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port_ok = parts.port is None or 0 < parts.port < 65536
    except ValueError:
        parts, port_ok = urllib.parse.urlsplit(""), False
    if method not in _METHODS:
        raise UsageError(f"{method!r} is no HTTP method", hint=f"one of {', '.join(_METHODS)}")
    if parts.scheme != "http" or parts.hostname not in _LOOPBACK or not port_ok or not url.isprintable():
        raise UsageError(
            f"{url[:200]!r} is no address of the application itself",
            hint="write http://127.0.0.1:PORT/PATH: it is asked from inside of the container's network",
        )


def request(pid: int, method: str, url: str, timeout: float) -> str:
    """Ask the application of `pid`; returns "" for a 2xx answer within `timeout` seconds, else what was wrong."""
    import http.client  # 10 ms, which restores and checkpoints need not spend

    check_url(method, url)
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 80, timeout=timeout)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))

    def ask() -> str:
        connection.request(method, path, headers={"Connection": "close"})
        with connection.sock.dup() as ours:
            answer = connection.getresponse()
            _until_gone(ours)
        return "" if 200 <= answer.status < 300 else f"the answer was {answer.status} {answer.reason}"

    try:
        return netns.within(pid, ask, timeout + _SLACK)
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    except (OSError, http.client.HTTPException) as e:
        return str(e) or type(e).__name__
    finally:
        if connection.sock is not None:  # an answer that comes byte by byte would keep its thread
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()


def answers(pid: int, port: int, timeout: float) -> bool:
    """Whether a TCP port takes connections on the loopback of `pid`'s network."""

    def ask() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout) as ours:
            ours.shutdown(socket.SHUT_WR)
            _until_gone(ours)

    try:
        netns.within(pid, ask)
    except OSError:
        return False
    return True


def _until_gone(ours: socket.socket) -> None:
    """Wait a moment until the application has closed its end: CRIU does not dump a connection that is open."""
    end = time.monotonic() + _CLOSING
    with suppress(OSError):
        while (left := end - time.monotonic()) > 0:
            ours.settimeout(left)
            if not ours.recv(1 << 16):
                return


def set_hostname(pid: int, name: str) -> None:
    """Name the host in the UTS namespace of `pid`. Raises UsageError, ConflictError when that is this node's."""
    if not _HOSTNAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is no host name", hint="up to 63 letters, digits and hyphens")
    if os.stat(f"/proc/{pid}/ns/uts").st_ino == os.stat("/proc/self/ns/uts").st_ino:
        raise ConflictError(
            "the container shares the host name of this node, which is not changed",
            hint="leave --hostname out",
        )
    try:
        netns.within_path(f"/proc/{pid}/ns/uts", "uts", lambda: socket.sethostname(name))
    except OSError as e:
        raise RestoreError(f"the container's host name could not be set: {e.strerror}") from e
