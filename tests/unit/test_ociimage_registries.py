# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""registries.conf and certs.d: mirrors, other locations, blocked registries, CAs and client certificates."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from requests.adapters import HTTPAdapter

from cryoci.errors import ConfigError, IntegrityError, RegistryError, UsageError
from cryoci.ociimage import contents, image, registries, shelf, transport
from cryoci.ociimage.transport import RegistryOptions
from tests.unit.images import (  # noqa: F401
    PAGES,
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


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registries, "CONF", tmp_path / "registries.conf")
    return tmp_path / "registries.conf"


def test_mirrors_come_first_and_are_optional(
    conf: Path, registry: str, proxy: Proxy, checkpoint: Path, tmp_path: Path, no_sleep: list[float]
) -> None:
    image.push(checkpoint, ref(f"{registry}/mirrored/c:1"))
    conf.write_text(
        f'[[registry]]\nprefix = "far.example/team"\nlocation = "127.0.0.1:{free_port()}/none"\n'
        f'[[registry.mirror]]\nlocation = "127.0.0.1:{free_port()}/down"\n'
        f'[[registry.mirror]]\nlocation = "{proxy.host}/mirrored"\ninsecure = true\n'
    )
    image.pull(ref("far.example/team/c:1"), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert any(path.startswith("/v2/mirrored/c/blobs/") for _, path in proxy.log)
    with contents.opened(ref("far.example/team/c:1")) as found:  # what inspect and memory read
        assert found.sizes["checkpoint/pages-1.img"] == PAGES
    shelf.save(ref("far.example/team/c:1"), tmp_path / "saved.tar")
    # what a mirror gives is checked like everything else
    digest = image.inspect(ref("far.example/team/c:1")).digest
    proxy.body = lambda request, data: data[:-1] + b" " if "/blobs/" in request.path else data
    with pytest.raises(IntegrityError):
        image.pull(ref(f"far.example/team/c@{digest}"), tmp_path / "out2")


def test_another_location(conf: Path, registry: str, checkpoint: Path, tmp_path: Path) -> None:
    image.push(checkpoint, ref(f"{registry}/moved/c:1"))
    conf.write_text(f'[[registry]]\nprefix = "old.example"\nlocation = "{registry}/moved"\n')
    image.pull(ref("old.example/c:1"), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)


def test_which_mirrors_serve_what(conf: Path) -> None:
    digest = "sha256:" + "0" * 64
    conf.write_text(
        '[[registry]]\nlocation = "h.io"\n'
        '[[registry.mirror]]\nlocation = "m1.io/x"\npull-from-mirror = "digest-only"\n'
        '[[registry.mirror]]\nlocation = "m2.io"\npull-from-mirror = "tag-only"\n'
        '[[registry.mirror]]\nlocation = "m3.io"\n'
        '[[registry]]\nprefix = "*.wild.io"\nlocation = "w.io/cache"\n'
        '[[registry]]\nlocation = "h.io/evil"\nblocked = true\n'
    )
    by_tag = [str(s.ref) for s in registries.sources(ref("h.io/a/b:1"))]
    assert by_tag == ["m2.io/a/b:1", "m3.io/a/b:1", "h.io/a/b:1"]
    by_digest = [str(s.ref) for s in registries.sources(ref(f"h.io/a/b@{digest}"))]
    assert by_digest == [f"m1.io/x/a/b@{digest}", f"m3.io/a/b@{digest}", f"h.io/a/b@{digest}"]
    assert [str(s.ref) for s in registries.sources(ref("a.wild.io/b:1"))] == ["w.io/cache/b:1"]
    assert [str(s.ref) for s in registries.sources(ref("other.io/b:1"))] == ["other.io/b:1"]
    with pytest.raises(UsageError, match="blocked"):
        image.inspect(ref("h.io/evil/b:1"))
    with pytest.raises(UsageError, match="blocked"):
        image.remove(ref("h.io/evil/b:1"))
    conf.write_text('[[registry]]\nprefix = "h.io"\nlocation = "Not A Place"\n')
    with pytest.raises(ConfigError, match="leads to no repository"):
        registries.sources(ref("h.io/a:1"))


def test_what_a_user_says_comes_first(conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers-registries.conf(5): one's own file stands for the host's, drop-ins of both are added."""

    def say(path: Path, **locations: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(f'[[registry]]\nprefix = "{k}.io"\nlocation = "{v}"\n' for k, v in locations.items())
        )

    def found() -> str:
        return " ".join(registries.sources(ref(f"{name}.io/x:1"))[-1].ref.host for name in "abc")

    own = tmp_path / "home/.config/containers/registries.conf"
    say(conf, a="host.io", b="host.io")
    say(conf.parent / "registries.conf.d/1.conf", b="host-more.io")
    say(own.parent / "registries.conf.d/1.conf", c="own-more.io")
    assert found() == "host.io host-more.io own-more.io"
    say(own, a="own.io")
    assert found() == "own.io b.io own-more.io"
    say(tmp_path / "named.conf", a="named.io")
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(tmp_path / "named.conf"))
    assert found() == "named.io host-more.io own-more.io"
    (tmp_path / "named.conf").write_text('[[registry]]\nlocation = "a.io"\nblocked = true\n')
    with pytest.raises(UsageError) as caught:
        registries.check(ref("a.io/x:1"))
    assert str(tmp_path / "named.conf") in (caught.value.hint or "")
    place = own.parent / "certs.d/h.io:5000"
    place.mkdir(parents=True)
    (place / "ca.crt").write_text("")
    assert registries.certificates("h.io:5000").authorities == (place / "ca.crt",)
    assert registries.certificates("h.io").authorities == ()


def test_blobs_are_mounted_between_repositories_of_one_registry(
    proxy: Proxy, checkpoint: Path, tmp_path: Path
) -> None:
    one, two = ref(f"{proxy.host}/mount/one:1"), ref(f"{proxy.host}/mount/two:1")
    pushed = image.push(checkpoint, one)
    proxy.log.clear()
    copied = image.copy(one, two)
    assert copied.digest == pushed.digest and copied.skipped == copied.size
    assert not any(method == "GET" and "/blobs/" in path for method, path in proxy.log)
    image.pull(two, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    # a registry that opens an upload instead, or refuses: the bytes travel
    for status in (202, 403, 405):

        def before(request: Request, status: int = status) -> bool:
            if request.method == "POST" and "mount=" in request.path and status != 202:
                return request.answer(status)
            if "mount=" in request.path:
                place = {"Location": "/v2/mount/x/blobs/uploads/1234"}
                return request.answer(202, headers=place)
            return False

        proxy.before = before
        image.copy(one, ref(f"{proxy.host}/mount/three{status}:1"))


def authority(root: Path, name: str, *, client: bool = False) -> None:
    """NAME.pem and NAME.key, self-signed."""
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    more = (
        ["-addext", "extendedKeyUsage=clientAuth"] if client else ["-addext", "subjectAltName=IP:127.0.0.1"]
    )
    files = ["-keyout", f"{root}/{name}.key", "-out", f"{root}/{name}.pem"]
    subprocess.run(
        [*words, "-days", "2", "-subj", f"/CN={name}", *more, *files], check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """HOST:PORT of a registry that wants a client certificate, and the directory of its keys."""
    root = tmp_path_factory.mktemp("mutual")
    authority(root, "server")
    authority(root, "client", client=True)
    tls = (
        f", tls: {{certificate: {root}/server.pem, key: {root}/server.key, clientcas: [{root}/client.pem]}}"
    )
    with running_registry(root, tls=tls) as host:
        yield host, root


def test_certificates_of_certs_d(
    mutual: tuple[str, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, root = mutual
    monkeypatch.setattr(transport, "is_loopback", lambda host: False)
    monkeypatch.setattr(registries, "CERTIFICATES", (tmp_path / "certs.d",))
    place = tmp_path / "certs.d" / host
    place.mkdir(parents=True)
    options = RegistryOptions(plain_http=False, attempts=1)
    with pytest.raises(RegistryError, match="no trusted TLS connection"):
        image.push(checkpoint, ref(f"{host}/a/b:1"), registry_options=options)
    (place / "ca.crt").write_bytes((root / "server.pem").read_bytes())
    with pytest.raises(RegistryError) as caught:  # the CA is right, and we have no certificate
        image.push(checkpoint, ref(f"{host}/a/b:1"), registry_options=options)
    assert f"certs.d/{host}" in (caught.value.hint or "")
    (place / "client.cert").write_bytes((root / "client.pem").read_bytes())
    with pytest.raises(ConfigError, match="has no key beside it"):
        image.push(checkpoint, ref(f"{host}/a/b:1"), registry_options=options)
    (place / "client.key").write_bytes((root / "client.key").read_bytes())
    image.push(checkpoint, ref(f"{host}/a/b:1"), registry_options=options)
    image.pull(ref(f"{host}/a/b:1"), tmp_path / "out", registry_options=options)
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    shown: list[object] = []

    def note(self: HTTPAdapter, request: requests.PreparedRequest, **more: object) -> requests.Response:
        shown.append(more["cert"])
        return requests.Response()

    with monkeypatch.context() as patch:
        patch.setattr(HTTPAdapter, "send", note)
        session = transport.Transport(host, "a/b", options)._session
        for url in (f"https://{host}/v2/", "https://elsewhere.example/blob"):
            session.get(url)
    assert shown == [(f"{place}/client.cert", f"{place}/client.key"), None]
    (place / "ca.crt").write_text("rubbish")
    with pytest.raises(ConfigError, match="no certificate in PEM"):
        image.inspect(ref(f"{host}/a/b:1"), registry_options=options)
