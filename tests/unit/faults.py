# SPDX-License-Identifier: Apache-2.0
"""Faults of a registry, done to one request of many."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from tests.unit.images import Proxy, Request


class Nth:
    """Does `fault` to the request of that number, once."""

    def __init__(self, number: int, fault: Callable[[Request], bool]) -> None:
        self.number, self.fault = number, fault
        self.seen = 0
        self.lock = threading.Lock()

    def __call__(self, request: Request) -> bool:
        with self.lock:
            self.seen += 1
            hit = self.seen == self.number
        return self.fault(request) if hit else False


def drain(request: Request) -> None:
    """Take the body in, so that the client gets to read the answer."""
    handler = request.handler
    if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
        while size := int(handler.rfile.readline() or b"0", 16):
            handler.rfile.read(size + 2)
        handler.rfile.readline()
    else:
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))


def answer(status: int) -> Callable[[Request], bool]:
    def fault(request: Request) -> bool:
        drain(request)
        return request.answer(status, headers={"Retry-After": "0"} if status == 429 else None)

    return fault


def truncate(request: Request) -> bool:
    """Headers that promise more than comes."""
    drain(request)
    handler = request.handler
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.wfile.flush()
    return request.hang_up()


def delay(request: Request) -> bool:
    time.sleep(0.5)  # longer than the read timeout of these tests
    return request.hang_up()


PASSING: dict[str, Callable[[Request], bool]] = {
    "drop": lambda request: request.hang_up(),
    "delay": delay,
    "429": answer(429),
    "500": answer(500),
    "503": answer(503),
}
KINDS = (*PASSING, "half", "expired", "flip")


def install(proxy: Proxy, kind: str, number: int) -> None:
    """Do the fault `kind` to the request of that number from now on, and to no other."""
    remove(proxy)
    if kind == "half":
        proxy.halved = number
    elif kind == "expired":
        proxy.before = _Expired(proxy, number)
    elif kind == "flip":
        proxy.body = _Flip(number)
    else:
        proxy.before = Nth(number, PASSING[kind])


def remove(proxy: Proxy) -> None:
    """Let everything pass."""
    proxy.before = lambda request: False
    proxy.body = lambda request, data: data
    proxy.halved = 0


class _Expired(Nth):
    """Wants a new token at that request, and gives one to whoever asks."""

    def __init__(self, proxy: Proxy, number: int) -> None:
        realm = f'Bearer realm="http://{proxy.host}/token",service="s"'

        def fault(request: Request) -> bool:
            drain(request)
            return request.answer(401, headers={"WWW-Authenticate": realm})

        super().__init__(number, fault)

    def __call__(self, request: Request) -> bool:
        if request.path.startswith("/token"):
            return request.answer(200, json.dumps({"token": f"t{time.monotonic_ns()}"}).encode())
        return super().__call__(request)


class _Flip:
    """One bit in the middle of that answer."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._lock = threading.Lock()

    def __call__(self, request: Request, data: bytes) -> bytes:
        with self._lock:
            self._left -= 1
            hit = not self._left
        if not hit or not data:
            return data
        i = len(data) // 2
        return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
