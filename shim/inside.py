# SPDX-License-Identifier: Apache-2.0
"""Talk to an application in the network namespace of its container.

Also a program, `python -m cryoci.shim.inside PID http METHOD URL SECONDS` and `... PID port NUMBER SECONDS`, for a
process enters a network namespace as a whole. Its status is 0 when the answer was good, 1 when there was none.
"""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import urllib.parse

from cryoci.errors import UsageError
from cryoci.shim import netns

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")
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
