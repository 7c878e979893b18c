# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Whom a registry is trusted by: authorities of the system, of certs.d and of options; plain HTTP; proxies."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import certifi
import pytest

from cryoci.errors import ConfigError, RegistryError
from cryoci.ociimage import image, registries, transport
from cryoci.ociimage.transport import RegistryOptions
from tests.unit.images import (  # noqa: F401
    Proxy,
    Request,
    checkpoint,
    free_port,
    no_credentials,
    no_sleep,
    proxy,
    ref,
    registry,
    running_registry,
    tree_of,
)

pytestmark = pytest.mark.usefixtures("no_credentials")


def test_tls_asked_of_a_plain_registry(registry: str) -> None:
    with pytest.raises(RegistryError, match="speaks plain HTTP, not TLS"):
        image.inspect(ref(f"{registry}/a/b:1"), registry_options=RegistryOptions(plain_http=False))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """HOST:PORT of a registry with TLS on loopback, and its CA."""
    root = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", f"{root}/key.pem", "-out", f"{root}/ca.pem"]
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    subprocess.run([*words, *subject, *files], check=True, capture_output=True)
    with running_registry(root, tls=f", tls: {{certificate: {root}/ca.pem, key: {root}/key.pem}}") as host:
        yield host, root / "ca.pem"


def test_tls(tls: tuple[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    host, ca = tls
    trusted = RegistryOptions(plain_http=False, ca_file=ca)
    image.push(checkpoint, ref(f"{host}/a/b:1"), registry_options=trusted)
    image.pull(ref(f"{host}/a/b:1"), tmp_path / "out", registry_options=trusted)
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    with pytest.raises(RegistryError, match="speaks TLS, not plain HTTP"):
        image.inspect(ref(f"{host}/a/b:1"), registry_options=RegistryOptions(plain_http=True))
    # loopback is trusted without a certificate, plain or not, as docker does it
    assert image.inspect(ref(f"{host}/a/b:1")).container_name == "counter"


def test_untrusted_certificate(tls: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "is_loopback", lambda host: False)
    with pytest.raises(RegistryError, match="no trusted TLS connection"):
        image.inspect(ref(f"{tls[0]}/a/b:1"))


@pytest.mark.parametrize("bundle", ["", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_whom_to_trust(
    tls: tuple[str, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: str
) -> None:
    """What was said here goes before what other programs take from the environment, and the system's store counts."""
    host, ca = tls
    image.push(checkpoint, name := ref(f"{host}/trust/{bundle.lower()}x:1"))  # over loopback
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", certifi.where())
    if bundle:
        monkeypatch.setenv(bundle, certifi.where())
    monkeypatch.setattr(transport, "is_loopback", lambda host: False)
    with pytest.raises(RegistryError, match="no trusted TLS connection"):
        image.inspect(name)
    for options in (RegistryOptions(tls_verify=False), RegistryOptions(ca_file=ca)):
        assert image.inspect(name, registry_options=options).digest
    monkeypatch.setattr(registries, "CERTIFICATES", (tmp_path / "certs.d",))
    (tmp_path / "certs.d" / host).mkdir(parents=True)
    shutil.copy(ca, tmp_path / "certs.d" / host / "ca.crt")
    for options in (RegistryOptions(), RegistryOptions(tls_verify=False), RegistryOptions(ca_file=ca)):
        assert image.inspect(name, registry_options=options).digest
    with pytest.raises(RegistryError, match="no trusted TLS connection"):
        image.inspect(name, registry_options=RegistryOptions(ca_file=Path(certifi.where())))
    shutil.rmtree(tmp_path / "certs.d")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))  # where the system has its authorities
    assert image.inspect(name).digest


class Tunnel(http.server.BaseHTTPRequestHandler):
    """A proxy as companies have it: CONNECT, and bytes in both directions."""

    asked: ClassVar[list[str]] = []

    def log_message(self, *args: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.asked.append(self.path)
        host, _, port = self.path.partition(":")
        with socket.create_connection((host, int(port))) as far:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=self._pass, args=(far, self.connection), daemon=True)
            back.start()
            self._pass(self.connection, far)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass


def test_through_a_proxy(
    tls: tuple[str, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, ca = tls
    for variable in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(variable, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tunnel)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(transport, "is_loopback", lambda host: False)
    monkeypatch.setattr(registries, "CERTIFICATES", (tmp_path / "certs.d",))
    (tmp_path / "certs.d" / host).mkdir(parents=True)
    shutil.copy(ca, tmp_path / "certs.d" / host / "ca.crt")
    name = ref(f"{host}/proxy/x:1")
    image.push(checkpoint, name)
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert set(Tunnel.asked) == {host}
    server.shutdown()
    server.server_close()


def test_plain_http_is_not_tried_elsewhere(
    registry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transport, "is_loopback", lambda host: False)
    with pytest.raises(RegistryError, match="speaks plain HTTP"):
        image.inspect(ref(f"{registry}/a/b:1"))
    conf = tmp_path / "registries.conf"
    conf.write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')
    assert transport.is_insecure(registry, "a/b", conf)
    assert not transport.is_insecure(registry + "0", "a/b", conf)
    conf.write_text(conf.read_text() + f'[[registry]]\nprefix = "{registry}/a"\ninsecure = false\n')
    assert not transport.is_insecure(registry, "a/b", conf)
    conf.write_text("[")
    with pytest.raises(ConfigError):
        transport.is_insecure(registry, "a/b", conf)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("localhost:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:5", True),
        ("a.localhost", True),
        ("127.0.0.1.evil.io", False),
        ("h.io", False),
        ("10.0.0.1", False),
        ("localhost.evil.io", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert transport.is_loopback(host) is expected
