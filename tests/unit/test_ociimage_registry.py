# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""A registry that fails in every way we know of, and the words with which we say so."""

from __future__ import annotations

import base64
import email.utils
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import certifi
import pytest

from cryoci.errors import ConfigError, CryociError, NotFoundError, RegistryError
from cryoci.ociimage import credentials, image, reference, registries, transport
from cryoci.ociimage.manifest import Descriptor
from cryoci.ociimage.reference import RegistryRef
from cryoci.ociimage.registry import Registry
from cryoci.ociimage.transport import RegistryOptions
from tests.unit.faults import drain
from tests.unit.images import (  # noqa: F401
    Proxy,
    Request,
    checkpoint,
    free_port,
    no_credentials,
    no_sleep,
    proxy,
    registry,
    running_registry,
    tree_of,
)

pytestmark = pytest.mark.usefixtures("no_credentials")


def ref(text: str) -> RegistryRef:
    found = reference.parse(text)
    assert isinstance(found, RegistryRef)
    return found


class Times:
    """A `before` hook that answers the first `n` requests that fit, and lets the rest pass."""

    def __init__(
        self, n: int, method: str, part: str, status: int, headers: dict[str, str] | None = None
    ) -> None:
        self.left, self.method, self.part = n, method, part
        self.status, self.headers = status, headers
        self.hits = 0
        self.lock = threading.Lock()

    def __call__(self, request: Request) -> bool:
        with self.lock:
            if request.method != self.method or self.part not in request.path or not self.left:
                return False
            self.left -= 1
            self.hits += 1
        return request.answer(self.status, b"", self.headers) if self.status else request.hang_up()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 0])
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "HEAD"])
def test_transient_failures_are_retried(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, no_sleep: list[float], status: int, method: str
) -> None:
    name = ref(f"{proxy.host}/retry/{method.lower()}{status}:1")
    hook = Times(2, method, "/retry/", status)
    proxy.before = hook
    image.push(checkpoint, name)
    image.pull(name, tmp_path / "out")
    assert hook.hits == 2 and len(no_sleep) >= 2
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413])
def test_other_answers_are_final(proxy: Proxy, checkpoint: Path, no_sleep: list[float], status: int) -> None:
    hook = Times(100, "PUT", "/manifests/", status)
    proxy.before = hook
    with pytest.raises((RegistryError, NotFoundError)) as caught:
        image.push(checkpoint, ref(f"{proxy.host}/final/s{status}:1"))
    assert hook.hits == 1 and not no_sleep
    assert status == 401 or str(status) in caught.value.message
    assert caught.value.hint or status == 400


def test_retries_are_bounded(proxy: Proxy, no_sleep: list[float]) -> None:
    hook = Times(100, "GET", "/manifests/", 503)
    proxy.before = hook
    with pytest.raises(RegistryError, match="503"):
        image.inspect(ref(f"{proxy.host}/bounded/x:1"))
    assert hook.hits == 5 and len(no_sleep) == 4 and sum(no_sleep) < 20


def test_retry_after_is_obeyed_and_bounded(proxy: Proxy, no_sleep: list[float]) -> None:
    for given, waited in (("7", 7.0), ("86400", transport.MAX_PAUSE)):
        proxy.before = Times(1, "GET", "/manifests/", 429, {"Retry-After": given})
        with pytest.raises(NotFoundError):
            image.inspect(ref(f"{proxy.host}/after/x:1"))
        assert no_sleep.pop() == waited


def test_retry_after_may_be_a_date(proxy: Proxy, no_sleep: list[float]) -> None:
    given = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    proxy.before = Times(1, "GET", "/manifests/", 503, {"Retry-After": given})
    with pytest.raises(NotFoundError):
        image.inspect(ref(f"{proxy.host}/after/x:1"))
    assert 15 < no_sleep.pop() <= 20


@pytest.mark.parametrize("put", [False, True], ids=["streamed", "monolithic"])
def test_a_bulk_upload_waits_as_others_do(
    proxy: Proxy, checkpoint: Path, no_sleep: list[float], put: bool
) -> None:
    """Its body cannot be sent again by the transport, so the upload itself obeys, bounds and jitters."""
    asked: list[str] = []

    def busy(request: Request, given: str | None) -> bool:
        headers = request.handler.headers
        if request.method == "PATCH" and put:
            return request.answer(405)
        large = int(headers.get("Content-Length") or 0) > 1 << 20 or headers.get("Transfer-Encoding")
        if not large or len(asked) == 2:
            return False
        asked.append(request.path)
        drain(request)
        return request.answer(503, headers={"Retry-After": given} if given else None)

    for given, least, most in (("7", 7.0, 7.0), ("86400", 30.0, 30.0), (None, 0.25, 1.5)):
        asked.clear()
        no_sleep.clear()
        proxy.before = lambda request, given=given: busy(request, given)  # type: ignore[misc]
        image.push(checkpoint, ref(f"{proxy.host}/bulk/{put}-{given}:1".lower()))
        assert len(asked) == len(no_sleep) == 2 and all(least <= pause <= most for pause in no_sleep)
        assert given or not {0.5, 1.0} & set(no_sleep)  # jittered


@pytest.mark.parametrize("cut", [0, 1, 500_000, 3_000_000])
def test_upload_that_breaks_goes_on(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, no_sleep: list[float], cut: int
) -> None:
    proxy.cut = cut
    name = ref(f"{proxy.host}/resume/cut{cut}:1")
    pushed = image.push(checkpoint, name)
    left: int | None = proxy.cut
    assert left is None  # it did break
    assert sum(method == "PATCH" for method, _ in proxy.log) == 2
    proxy.cut = None
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert image.push(checkpoint, name).digest == pushed.digest


def test_upload_that_the_registry_forgot(proxy: Proxy, checkpoint: Path, no_sleep: list[float]) -> None:
    proxy.cut = 1000
    hook = Times(1, "GET", "/blobs/uploads/", 404)
    proxy.before = hook
    image.push(checkpoint, ref(f"{proxy.host}/forgot/x:1"))
    assert hook.hits == 1


@pytest.mark.parametrize("status", [404, 405, 411, 415, 501])
def test_registry_without_patch_gets_one_put(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, status: int
) -> None:
    proxy.before = Times(100, "PATCH", "/", status)
    name = ref(f"{proxy.host}/put/s{status}:1")
    image.push(checkpoint, name)
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)


def test_download_that_breaks_goes_on(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, no_sleep: list[float]
) -> None:
    name = ref(f"{proxy.host}/range/x:1")
    image.push(checkpoint, name)
    big = image.inspect(name).layers[1].digest
    broken: list[str] = []

    def before(request: Request) -> bool:
        if request.method != "GET" or big not in request.path or broken:
            return False
        broken.append(request.path)
        data = b"".join(Registry(ref(f"{proxy.upstream}/range/x:1")).open_blob(_descriptor(name)))
        request.handler.send_response(200)
        request.handler.send_header("Content-Length", str(len(data)))
        request.handler.end_headers()
        request.handler.wfile.write(data[:2_000_000])
        request.handler.wfile.flush()
        return request.hang_up()

    proxy.before = before
    image.pull(name, tmp_path / "out")
    assert broken and tree_of(tmp_path / "out") == tree_of(checkpoint)


def _descriptor(name: RegistryRef) -> Descriptor:
    layer = image.inspect(ref(str(name))).layers[1]
    return Descriptor(layer.media_type, layer.digest, layer.size)


def test_nothing_listens(no_sleep: list[float]) -> None:
    with pytest.raises(RegistryError, match=r"cannot reach registry .*refused"):
        image.inspect(ref(f"127.0.0.1:{free_port()}/a/b:1"))


def test_no_such_name(no_sleep: list[float]) -> None:
    with pytest.raises(RegistryError, match="cannot reach registry"):
        image.inspect(ref("registry.invalid/a/b:1"))


def test_missing_tag_and_repository(registry: str) -> None:
    for call in (
        lambda: image.inspect(ref(f"{registry}/no/such:1")),
        lambda: image.list_images(ref(f"{registry}/no/such")),
    ):
        with pytest.raises(NotFoundError):
            call()


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


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants user "u" with password "p" (HTTP Basic)."""
    root = tmp_path_factory.mktemp("guarded")
    (root / "htpasswd").write_text("u:$2y$05$CjCGJhw7nTKk0EoMi5mPWejnXKQCbZ7TmlDCeyc5RUJ0TksV4v5tW\n")
    with running_registry(
        root, extra=f"auth: {{htpasswd: {{realm: test, path: {root}/htpasswd}}}}\n"
    ) as host:
        yield host


def test_login_is_asked_for(guarded: str) -> None:
    with pytest.raises(RegistryError, match="wants a login, and no credentials were found") as caught:
        image.inspect(ref(f"{guarded}/a/b:1"))
    assert "podman login" in (caught.value.hint or "")


def test_wrong_password_names_its_file(guarded: str, tmp_path: Path, no_sleep: list[float]) -> None:
    file = _auth_file(tmp_path, guarded, "u:wrong")
    with pytest.raises(RegistryError, match=f"those of {file}.* were refused"):
        image.inspect(ref(f"{guarded}/a/b:1"), registry_options=RegistryOptions(auth_file=file))
    assert not no_sleep


def _auth_file(tmp_path: Path, key: str, secret: str) -> Path:
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {key: {"auth": base64.b64encode(secret.encode()).decode()}}}))
    return file


class Tokens:
    """A token service on loopback that gives "good" to user u:p, or to a refresh token "r"."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        tokens = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def reply(self, good: bool) -> None:
                body = json.dumps({"token": "good", "access_token": "good"} if good else {}).encode()
                self.send_response(200 if good else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                tokens.asked.append(self.path)
                self.reply(self.headers.get("Authorization") == "Basic " + base64.b64encode(b"u:p").decode())

            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                tokens.asked.append(form)
                self.reply("refresh_token=r" in form)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.realm = f"http://127.0.0.1:{self.server.server_address[1]}/token"


@pytest.mark.parametrize("entry", [{"auth": base64.b64encode(b"u:p").decode()}, {"identitytoken": "r"}])
def test_tokens(proxy: Proxy, checkpoint: Path, tmp_path: Path, entry: dict[str, str]) -> None:
    tokens = Tokens()

    def before(request: Request) -> bool:
        if request.handler.headers.get("Authorization") == "Bearer good":
            return False
        scope = 'scope="repository:tok/x:pull,push"'
        return request.answer(
            401, b"", {"WWW-Authenticate": f'Bearer realm="{tokens.realm}",service="s",{scope}'}
        )

    proxy.before = before
    file = tmp_path / "auth.json"
    file.write_text(json.dumps({"auths": {proxy.host: entry}}))
    options = RegistryOptions(auth_file=file)
    image.push(checkpoint, ref(f"{proxy.host}/tok/x:1"), registry_options=options)
    image.pull(ref(f"{proxy.host}/tok/x:1"), tmp_path / "out", registry_options=options)
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert "pull%2Cpush" in tokens.asked[0]
    tokens.server.shutdown()
    tokens.server.server_close()
    with pytest.raises(CryociError):
        image.inspect(ref(f"{proxy.host}/tok/x:1"))


def test_credentials_by_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, **auths: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        value = {k: {"auth": base64.b64encode(f"u:{v}".encode()).decode()} for k, v in auths.items()}
        path.write_text(json.dumps({"auths": value}))

    def secret(host: str, repository: str) -> str:
        return base64.b64decode(credentials.find(host, repository).basic).decode().partition(":")[2]

    home = Path(os.environ["HOME"])
    write(home / ".docker/config.json", **{"h.io": "docker"})
    assert secret("h.io", "a/b") == "docker" and secret("other.io", "a") == ""
    write(home / ".config/containers/auth.json", **{"h.io": "config", "h.io/a": "team", "h.io/a/b": "repo"})
    assert (secret("h.io", "x"), secret("h.io", "a/x"), secret("h.io", "a/b")) == ("config", "team", "repo")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    write(tmp_path / "run/containers/auth.json", **{"h.io": "run"})
    assert secret("h.io", "x") == "run"
    write(tmp_path / "named.json", **{"h.io": "named"})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "named.json"))
    assert secret("h.io", "x") == "named"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match="no auth file"):
        secret("h.io", "x")


def test_credential_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    helper.write_text('#!/bin/sh\nread host\necho "{\\"Username\\": \\"u\\", \\"Secret\\": \\"$host\\"}"\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"credHelpers": {"h.io": "test"}}))
    found = credentials.find("h.io", "a", file)
    assert base64.b64decode(found.basic) == b"u:h.io"
    assert found.basic not in repr(found)
    assert not credentials.find("other.io", "a", file).basic
    # a helper that knows nothing says so by its status, and a name that is none stands before an identity token
    helper.write_text("#!/bin/sh\necho credentials not found in native keychain\nexit 1\n")
    assert credentials.find("h.io", "a", file) == credentials.Credentials()
    helper.write_text('#!/bin/sh\necho "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"r:1\\"}"\n')
    found = credentials.find("h.io", "a", file)
    assert (found.basic, found.identity_token) == ("", "r:1")


@pytest.mark.parametrize("text", ["nonsense", "[]", '{"auths": {"h.io": {"auth": "%%"}}}'])
def test_broken_auth_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "auth.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        credentials.find("h.io", "a", file)


def test_credentials_stay_at_their_registry(proxy: Proxy, tmp_path: Path, checkpoint: Path) -> None:
    """An upload location at another host must not get our password."""
    seen: list[str | None] = []
    other = Proxy(proxy.upstream)

    def watch(request: Request) -> bool:
        seen.append(request.handler.headers.get("Authorization"))
        return False

    other.before = watch

    def before(request: Request) -> bool:
        if not request.handler.headers.get("Authorization"):
            return request.answer(401, b"", {"WWW-Authenticate": 'Basic realm="x"'})
        if request.method == "POST":
            return request.answer(307, b"", {"Location": f"http://{other.host}{request.path}"})
        return False

    proxy.before = before
    options = RegistryOptions(auth_file=_auth_file(tmp_path, proxy.host, "u:p"))
    with pytest.raises(RegistryError):
        image.push(checkpoint, ref(f"{proxy.host}/a/b:1"), registry_options=options)
    proxy.before = lambda request: (
        bool(
            not request.handler.headers.get("Authorization")
            and request.answer(401, b"", {"WWW-Authenticate": 'Basic realm="x"'})
        )
        or (
            "/blobs/sha256:" in request.path
            and request.method == "GET"
            and request.answer(307, b"", {"Location": f"http://{other.host}{request.path}"})
        )
    )
    image.push(checkpoint, ref(f"{proxy.host}/a/b:1"), registry_options=options)
    image.pull(ref(f"{proxy.host}/a/b:1"), tmp_path / "out", registry_options=options)
    assert len(seen) >= 3 and not any(seen)
    other.close()


def test_terminal_escapes_in_a_registrys_words(proxy: Proxy) -> None:
    body = json.dumps({"errors": [{"code": "X", "message": "a\x1b[31mb"}]}).encode()
    proxy.before = lambda request: "/manifests/" in request.path and request.answer(400, body)
    with pytest.raises(RegistryError) as caught:
        image.inspect(ref(f"{proxy.host}/a/b:1"))
    assert "X: a[31mb" in caught.value.message


def test_huge_manifest_is_refused(proxy: Proxy) -> None:
    proxy.before = lambda request: "/manifests/" in request.path and request.answer(200, b" " * (5 << 20))
    with pytest.raises(RegistryError, match="over 4194304 bytes"):
        image.inspect(ref(f"{proxy.host}/a/b:1"))


def test_tag_list_goes_over_pages(registry: str, proxy: Proxy, checkpoint: Path) -> None:
    for tag in ("a", "b", "c"):
        image.push(checkpoint, ref(f"{registry}/team/pages:{tag}"))
    store = Registry(ref(f"{registry}/team/pages"))
    assert store.names() == ["a", "b", "c"]

    def before(request: Request) -> bool:
        if request.path.endswith("tags/list?n=1000"):
            link = {"Link": '</v2/team/pages/tags/list?n=2&last=a>; rel="next"'}
            return request.answer(200, b'{"tags":["a"]}', link)
        return False

    proxy.before = before
    assert Registry(ref(f"{proxy.host}/team/pages")).names() == ["a", "b", "c"]


def test_a_layer_of_known_size_goes_with_its_length(proxy: Proxy, checkpoint: Path) -> None:
    """An uncompressed one is as long as its tar, which spares a copy of it; nobody knows how long another gets."""
    seen: list[tuple[str | None, str | None]] = []

    def note(request: Request) -> bool:
        if request.method == "PATCH":
            headers = request.handler.headers
            seen.append((headers.get("Content-Length"), headers.get("Content-Range")))
        return False

    proxy.before = note
    image.push(checkpoint, ref(f"{proxy.host}/team/known:1"), compression="none")
    sizes = [layer.size for layer in image.inspect(ref(f"{proxy.host}/team/known:1")).layers]
    assert seen and set(seen) <= {(str(size), f"0-{size - 1}") for size in sizes}
    seen.clear()
    image.push(checkpoint, ref(f"{proxy.host}/team/other:1"))
    assert seen and set(seen) == {(None, None)}
