# SPDX-License-Identifier: Apache-2.0
"""What the image tests share: a checkpoint directory, a real registry, and a proxy that makes it misbehave."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cryoci.ociimage import reference
from cryoci.ociimage.reference import RegistryRef
from tests.nodes import tree

CONFIG = {
    "id": "ab" * 32,
    "name": "counter",
    "rootfsImageName": "docker.io/library/debian:trixie",
    "rootfsImageID": "cd" * 32,
    "rootfsImageRef": "docker.io/library/debian@sha256:" + "e" * 64,
    "runtime": "/usr/bin/runc",
    "checkpointedTime": "2026-11-01T10:00:00.123456789Z",
}
PAGES = 9 << 20  # bytes; enough to be a layer of its own, in five frames


def make_checkpoint(directory: Path, pages: int = PAGES) -> Path:
    """A directory as podman's archive unpacks to, with memory that compresses about like a process's."""
    (directory / "checkpoint").mkdir(parents=True)
    (directory / "volumes").mkdir()
    (directory / "config.dump").write_text(json.dumps(CONFIG))
    (directory / "spec.dump").write_text(json.dumps({"annotations": {"io.container.manager": "libpod"}}))
    (directory / "dump.log").write_text("(00.000000) Version: 4.1.1 (gitid 0)\n")
    (directory / "checkpoint/inventory.img").write_bytes(b"inventory")
    (directory / "checkpoint/core-1.img").write_bytes(random.Random(1).randbytes(3000))
    (directory / "volumes/data.tar").write_bytes(bytes(10240))
    (directory / "rootfs-diff.tar").write_bytes(bytes(10240))
    generator = random.Random(2)
    with open(directory / "checkpoint/pages-1.img", "wb") as file:
        for _ in range(0, pages, 1 << 20):
            file.write(generator.randbytes(600 << 10) + bytes((1 << 20) - (600 << 10)))
        file.truncate(pages)
    return directory


def ref(text: str) -> RegistryRef:
    """The image of a registry that `text` names."""
    found = reference.parse(text)
    assert isinstance(found, RegistryRef)
    return found


def tree_of(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` and its content."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def registry_program() -> str:
    """A docker-registry that runs on this host: installed, or that of the node tree."""
    return program("docker-registry")


def program(name: str) -> str:
    """A program that runs on this host, or that of the node tree does: Go programs need no libraries of it."""
    inside = sorted(tree.CACHE.glob(f"tree-*/{name.lstrip('/') if '/' in name else f'usr/bin/{name}'}"))
    found = shutil.which(name) or (str(inside[-1]) if inside else None)
    if found is None:
        pytest.skip(f"no {name}: apt-get install it, or build the node tree (make node)")
    return found


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def running_registry(root: Path, *, extra: str = "", tls: str = "") -> Iterator[str]:
    """A real registry on loopback; yields HOST:PORT. `extra` and `tls` are more of its YAML."""
    port = free_port()
    config = root / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {root}/data}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'{tls}}}\n{extra}"
    )
    with open(root / "registry.log", "wb") as log:
        program = [registry_program(), "serve", str(config)]
        process = subprocess.Popen(program, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise AssertionError((root / "registry.log").read_text()) from None
                time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Request:
    """One request at the proxy, before it goes on to the real registry."""

    def __init__(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.handler = handler
        self.method = handler.command
        self.path = handler.path

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> bool:
        """Answer instead of the registry."""
        self.handler.send_response(status)
        for key, value in (headers or {}).items():
            self.handler.send_header(key, value)
        self.handler.send_header("Content-Length", str(len(body)))
        self.handler.send_header("Connection", "close")
        self.handler.end_headers()
        self.handler.wfile.write(body)
        self.handler.close_connection = True
        return True

    def hang_up(self) -> bool:
        """Break the connection."""
        self.handler.close_connection = True
        self.handler.connection.shutdown(socket.SHUT_RDWR)
        return True


class _Server(http.server.ThreadingHTTPServer):
    """Requests that outlive their test fail unheard: what they print would be another test's output."""

    daemon_threads = True
    closed = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not self.closed:
            super().handle_error(request, client_address)


class Proxy:
    """In front of a registry at `upstream`. Hooks may be set at any time.

    `before(request)` may answer by itself (return True). `body(request, data)` may change what the registry
    answered, and `sent(request, data)` what goes to it, in length the same; `cut` counts down body bytes of PATCH
    requests until the connection breaks. A PATCH of more than `stall` bytes sets `stalled` and waits for `go_on`, and
    so does an answer of more than `hold` bytes when these have been given. `up` counts the body bytes that went to the
    registry, `down` those that came from it. With `forgiving` an upload's status is given for any address of it, as
    registries since distribution 3 do (the 2.8 behind this one ends an upload that is asked for by an old address).
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.log: list[tuple[str, str]] = []
        self.before: Callable[[Request], bool] = lambda request: False
        self.body: Callable[[Request, bytes], bytes] = lambda request, data: data
        self.sent: Callable[[Request, bytes], bytes] = lambda request, data: data
        self.cut: int | None = None
        self.stall = self.hold = sys.maxsize
        self.stalled, self.go_on = threading.Event(), threading.Event()
        self.up = self.down = 0
        self.forgiving = False
        self.lost = 0  # the number of the request from now whose answer does not arrive
        self.halved = 0  # the number of the request from now whose answer breaks off in its middle
        self._uploads: dict[str, str] = {}
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else head and body of an answer are 40 ms apart

            def log_message(self, *args: Any) -> None:
                pass

            def handle_any(self) -> None:
                proxy.handle(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.closed = True
        self._server.shutdown()
        self._server.server_close()

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """One request."""
        request = Request(handler)
        self.log.append((request.method, request.path))
        if self.before(request):
            return
        data, broken = self._read(handler)
        data = self.sent(request, data)
        path = request.path
        upload = path.partition("?")[0]
        if self.forgiving and request.method == "GET":
            path = self._uploads.get(upload, path)
        self.up += len(data)
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        headers = {k: v for k, v in handler.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(data))
        connection.request(request.method, path, data, headers)
        answer = connection.getresponse()
        if "/blobs/uploads/" in (location := answer.headers.get("Location", "")):
            where = urlsplit(location)
            self._uploads[where.path] = f"{where.path}?{where.query}"
        content = self.body(request, answer.read())
        self.lost -= 1
        if broken or self.lost == 0:
            request.hang_up()
            return
        handler.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("content-length", "transfer-encoding"):
                handler.send_header(key, value)
        length = answer.headers.get("Content-Length") if request.method == "HEAD" else str(len(content))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        self.halved -= 1
        if self.halved == 0 and len(content) > 1:
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            request.hang_up()
            return
        self._give(handler, content)

    def _give(self, handler: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        if len(content) > self.hold:
            first, content = content[: self.hold], content[self.hold :]
            handler.wfile.write(first)
            self.down += len(first)
            self.stalled.set()
            self.go_on.wait(30)
        try:
            handler.wfile.write(content)
            self.down += len(content)
        except OSError:
            pass  # whoever asked is gone

    def _read(self, handler: http.server.BaseHTTPRequestHandler) -> tuple[bytes, bool]:
        if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(handler.headers.get("Content-Length") or 0)
            if handler.command == "PATCH" and self.cut is not None and length > self.cut:
                data, self.cut = handler.rfile.read(self.cut), None
                return data, True
            return handler.rfile.read(length), False
        data = b""
        while size := int(handler.rfile.readline() or b"-1", 16):
            if size < 0:
                return data, True  # the client hung up
            data += handler.rfile.read(size)
            handler.rfile.readline()
            if len(data) > self.stall:
                self.stall = sys.maxsize
                self.stalled.set()
                self.go_on.wait(30)
            if self.cut is not None and len(data) > self.cut:
                data, self.cut = data[: self.cut], None
                return data, True
        handler.rfile.readline()
        return data, False


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a real registry for the tests of one module."""
    root = tmp_path_factory.mktemp("registry")
    with running_registry(root) as host:
        yield host
    shutil.rmtree(root)


@pytest.fixture
def proxy(registry: str) -> Iterator[Proxy]:
    """A proxy before `registry`, without any fault yet."""
    made = Proxy(registry)
    yield made
    made.close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint directory."""
    return make_checkpoint(tmp_path / "ck")


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Retries that do not wait; returns the pauses they would have made."""
    from cryoci.ociimage import transport

    pauses: list[float] = []
    monkeypatch.setattr(transport, "sleep", pauses.append)
    return pauses


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the auth files of whoever runs it."""
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("CONTAINERS_REGISTRIES_CONF", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CRYOCI_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CRYOCI_LIB", str(tmp_path / "lib"))
    os.makedirs(tmp_path / "home", exist_ok=True)
