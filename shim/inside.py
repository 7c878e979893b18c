# SPDX-License-Identifier: Apache-2.0
"""Act inside of a container's namespaces: talk to its application, name its host.

Also a program, `python -m cryoci.shim.inside PID http METHOD URL SECONDS`, `... PID port NUMBER SECONDS` and
`... PID hostname NAME SECONDS`, for a process enters a namespace as a whole. Its status is 0 when that went well,
else 1, and it says why.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.parse

from cryoci.errors import ConflictError, RestoreError, UsageError
from cryoci.shim import netns

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_GRACE = 5.0  # seconds that the program itself may take, beyond the time of its question


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
    check_url(method, url)
    return _call(pid, ["http", method, url], timeout)


def answers(pid: int, port: int, timeout: float) -> bool:
    """Whether a TCP port takes connections on the loopback of `pid`'s network."""
    return _call(pid, ["port", str(port)], timeout) == ""


def set_hostname(pid: int, name: str) -> None:
    """Name the host in the UTS namespace of `pid`. Raises UsageError, ConflictError when that is this node's."""
    if not _HOSTNAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is no host name", hint="up to 63 letters, digits and hyphens")
    if os.stat(f"/proc/{pid}/ns/uts").st_ino == os.stat("/proc/self/ns/uts").st_ino:
        raise ConflictError(
            "the container shares the host name of this node, which is not changed",
            hint="leave --hostname out",
        )
    if problem := _call(pid, ["hostname", name], _GRACE):
        raise RestoreError(f"the container's host name could not be set: {problem}")


def _call(pid: int, words: list[str], timeout: float) -> str:
    argv = [sys.executable, "-m", "cryoci.shim.inside", str(pid), *words, str(timeout)]
    try:
        result = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout + _GRACE,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:g} s"
    said = result.stderr.decode(errors="replace").strip()
    return "" if result.returncode == 0 else said.rpartition("\n")[2] or f"status {result.returncode}"


def _http(method: str, url: str, timeout: float) -> str:
    import http.client  # 10 ms, which restores and checkpoints need not spend

    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 80, timeout=timeout)
    try:
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request(method, path, headers={"Connection": "close"})
        answer = connection.getresponse()
    except TimeoutError:
        return f"no answer within {timeout:g} s"
    except (OSError, http.client.HTTPException) as e:
        return str(e) or type(e).__name__
    finally:
        connection.close()
    return "" if 200 <= answer.status < 300 else f"the answer was {answer.status} {answer.reason}"


def _main(argv: list[str]) -> str:
    pid, kind, timeout = int(argv[1]), argv[2], float(argv[-1])
    if kind == "hostname":
        netns.enter(pid, "uts")
        socket.sethostname(argv[3])
        return ""
    netns.enter(pid)
    if kind == "http":
        return _http(argv[3], argv[4], timeout)
    try:
        socket.create_connection(("127.0.0.1", int(argv[3])), timeout).close()
    except OSError as e:
        return str(e)
    return ""


if __name__ == "__main__":
    problem = _main(sys.argv)
    sys.exit(problem or 0)
