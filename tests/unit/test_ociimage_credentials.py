# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Who we are to a registry: auth files, helpers, tokens, and who must not get to know."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from cryoci.errors import ConfigError, CryociError, NotFoundError, RegistryError
from cryoci.ociimage import credentials, image, transport
from cryoci.ociimage.transport import RegistryOptions
from tests.unit.faults import drain
from tests.unit.images import (  # noqa: F401
    Proxy,
    Request,
    checkpoint,
    free_port,
    make_checkpoint,
    no_credentials,
    no_sleep,
    proxy,
    ref,
    registry,
    running_registry,
    tree_of,
)

pytestmark = pytest.mark.usefixtures("no_credentials")


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
def test_tokens(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, no_sleep: list[float], entry: dict[str, str]
) -> None:
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


class Narrow:
    """A `before` hook: a registry whose tokens are for what one request needs, and for so many of them.

    `faults` answer the first requests for tokens.
    """

    def __init__(self, host: str, uses: int, faults: list[int]) -> None:
        self.realm, self.uses, self.faults = f"http://{host}/token", uses, faults
        self.left: dict[str, int] = {}
        self.lock = threading.Lock()

    def __call__(self, request: Request) -> bool:
        with self.lock:
            return self._token(request) if request.path.startswith("/token") else self._asked(request)

    def _token(self, request: Request) -> bool:
        if self.faults:
            status = self.faults.pop(0)
            return request.answer(status, headers={"Retry-After": "3"}) if status else request.hang_up()
        (scope,) = parse_qs(urlsplit(request.path).query)["scope"]
        token = f"{scope.rpartition(':')[2]}.{len(self.left)}"
        self.left[token] = self.uses
        return request.answer(200, json.dumps({"token": token}).encode())

    def _asked(self, request: Request) -> bool:
        need = "pull" if request.method in ("GET", "HEAD") else "pull,push"
        token = request.handler.headers.get("Authorization", "").removeprefix("Bearer ")
        actions = token.partition(".")[0].split(",")
        if self.left.get(token, 0) > 0 and set(need.split(",")) <= set(actions):
            self.left[token] -= 1
            return False
        drain(request)
        scope = f'realm="{self.realm}",service="s",scope="repository:n/x:{need}"'
        return request.answer(401, headers={"WWW-Authenticate": f"Bearer {scope}"})


@pytest.mark.parametrize("uses", [5, 8, 50])
def test_tokens_for_one_request_and_requests_side_by_side(
    proxy: Proxy, tmp_path: Path, no_sleep: list[float], uses: int
) -> None:
    """A token that may only pull must not keep replacing the one with which the other layer is pushed."""
    checkpoint = make_checkpoint(tmp_path / "ck")
    for number in range(4):
        shutil.copy(checkpoint / "checkpoint/core-1.img", checkpoint / f"volumes/{number}.tar")
        with open(checkpoint / f"volumes/{number}.tar", "ab") as file:
            file.write(os.urandom(2 << 20))
    proxy.before = Narrow(proxy.host, uses, [])
    image.push(checkpoint, ref(f"{proxy.host}/n/x:1"))
    image.pull(ref(f"{proxy.host}/n/x:1"), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)


def test_a_token_service_that_is_busy(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, no_sleep: list[float]
) -> None:
    """It is asked again as the registry is: a refusal is something else."""
    proxy.before = Narrow(proxy.host, 50, [503, 429, 0])
    image.push(checkpoint, ref(f"{proxy.host}/n/x:1"))
    assert no_sleep[:2] == [3.0, 3.0] and len(no_sleep) == 3
    proxy.before = Narrow(proxy.host, 50, [500] * 100)
    with pytest.raises(RegistryError, match=r"the token service of .* answered 500"):
        image.inspect(ref(f"{proxy.host}/n/x:1"))


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


def test_dockers_registry_is_served_elsewhere(
    proxy: Proxy, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docker.io is the name in references, and https://index.docker.io/v1/ the one under which docker logs in."""
    monkeypatch.setattr(transport, "SERVED", {"docker.io": proxy.host})
    seen: list[str | None] = []

    def before(request: Request) -> bool:
        seen.append(request.handler.headers.get("Authorization"))
        wanted = {"WWW-Authenticate": 'Basic realm="x"'}
        return not seen[-1] and request.answer(401, headers=wanted)

    proxy.before = before
    file = _auth_file(tmp_path, "https://index.docker.io/v1/", "u:p")
    options = RegistryOptions(plain_http=True, auth_file=file)
    image.push(checkpoint, ref("docker.io/team/c:1"), registry_options=options)
    image.pull(ref("docker.io/team/c:1"), tmp_path / "out", registry_options=options)
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert seen[-1] == "Basic " + base64.b64encode(b"u:p").decode()
    with pytest.raises(NotFoundError, match=r"docker\.io answered 404"):
        image.inspect(ref("docker.io/team/c:2"), registry_options=options)
