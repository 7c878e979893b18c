# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""A registry that fails in every way we know of, and the words with which we say so."""

from __future__ import annotations

import email.utils
import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cryoci.errors import NotFoundError, RegistryError
from cryoci.ociimage import image, transport
from cryoci.ociimage.manifest import Descriptor
from cryoci.ociimage.reference import RegistryRef
from cryoci.ociimage.registry import Registry
from tests.unit.faults import drain
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
