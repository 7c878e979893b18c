# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Every fault at every request of a push and a pull, and processes that are killed in the middle.

The rule: a fault that passes is overcome; one that does not is told in one typed error; and never does anything but
the right bytes become a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cryoci.errors import CryociError, IntegrityError
from cryoci.ociimage import image, layers, parallel
from cryoci.ociimage import registry as registry_module
from cryoci.ociimage.reference import LayoutRef
from cryoci.ociimage.transport import RegistryOptions
from tests.unit.faults import PASSING, Nth, drain, truncate
from tests.unit.images import (  # noqa: F401
    Proxy,
    Request,
    make_checkpoint,
    no_credentials,
    no_sleep,
    proxy,
    ref,
    registry,
    tree_of,
)

pytestmark = pytest.mark.usefixtures("no_credentials")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that many tests only read."""
    return make_checkpoint(tmp_path_factory.mktemp("faults") / "ck")


@pytest.fixture
def small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of 700 kB that travels as a large one does: hundreds of transfers stay quick."""
    monkeypatch.setattr(layers, "BULK_SIZE", 256 << 10)
    monkeypatch.setattr(registry_module, "SMALL", 64 << 10)
    directory = tmp_path / "small"
    shutil.copytree(source, directory)
    os.truncate(directory / "checkpoint/pages-1.img", 700_000)
    return directory


OPTIONS = RegistryOptions(read_timeout=0.4)


def requests_of(proxy: Proxy, work: Callable[[], object]) -> int:
    proxy.log.clear()
    work()
    return len(proxy.log)


EACH = [pytest.param([kind], marks=pytest.mark.more, id=kind) for kind in PASSING if kind != "drop"]
MIXED = pytest.param(["delay", "429", "500", "503"], id="mixed")


@pytest.mark.parametrize("faults", [pytest.param(["drop"], id="drop"), MIXED, *EACH])
def test_a_passing_fault_at_every_request_of_a_push(
    proxy: Proxy, small: Path, tmp_path: Path, no_sleep: list[float], faults: list[str]
) -> None:
    place = f"{proxy.host}/push/{'-'.join(faults)}"
    count = requests_of(proxy, lambda: image.push(small, ref(f"{place}/count:1")))
    assert count > 10
    for number in range(1, count + 1):
        name = ref(f"{place}/{number}:1")
        proxy.before = Nth(number, PASSING[faults[number % len(faults)]])
        pushed = image.push(small, name, registry_options=OPTIONS)
        proxy.before = lambda request: False
        assert image.inspect(name).digest == pushed.digest
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(small)


@pytest.mark.parametrize("fault", [*PASSING, "truncate"])
def test_a_fault_at_every_request_of_a_pull(
    proxy: Proxy, small: Path, tmp_path: Path, no_sleep: list[float], fault: str
) -> None:
    name = ref(f"{proxy.host}/pull/{fault}:1")
    image.push(small, name)
    expected = tree_of(small)
    count = requests_of(proxy, lambda: image.pull(name, tmp_path / "first"))
    for number in range(1, count + 1):
        proxy.before = Nth(number, PASSING.get(fault, truncate))
        out = tmp_path / f"out{number}"
        try:
            image.pull(name, out, registry_options=OPTIONS)
        except CryociError:
            assert fault == "truncate"
            assert not out.exists() and not list(tmp_path.glob(".out*"))
        else:
            assert tree_of(out) == expected


def test_a_flipped_bit_in_every_answer_of_a_pull(
    proxy: Proxy, small: Path, tmp_path: Path, no_sleep: list[float]
) -> None:
    name = ref(f"{proxy.host}/flip/a:1")
    image.push(small, name)
    expected, refused = tree_of(small), 0
    for place in (0, 0.5, 1):
        for number in range(1, 30):
            seen = [0]

            def flip(
                request: Request,
                data: bytes,
                number: int = number,
                place: float = place,
                seen: list[int] = seen,
            ) -> bytes:
                seen[0] += 1
                if seen[0] != number or not data:
                    return data
                i = int(place * (len(data) - 1))
                return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]

            proxy.body = flip
            out = tmp_path / f"out{place}-{number}"
            try:
                image.pull(name, out)
            except CryociError:
                refused += 1
                assert not out.exists() and not list(tmp_path.glob(".out*"))
            else:
                assert tree_of(out) == expected
            if seen[0] < number:
                break
    assert refused >= 9


def test_a_flipped_bit_in_every_request_of_a_push(
    proxy: Proxy, small: Path, tmp_path: Path, no_sleep: list[float]
) -> None:
    """The registry finds it, or reading the tag back does. A registry takes any index under a tag, so one that was
    altered on its way may stay there, told as an error; the checkpoint that it leads to is right or refused."""
    failed = 0
    for number in range(1, 30):
        name = ref(f"{proxy.host}/flipped/{number}:1")
        seen = [0]

        def flip(request: Request, data: bytes, number: int = number, seen: list[int] = seen) -> bytes:
            seen[0] += bool(data)
            if seen[0] != number or not data:
                return data
            i = len(data) // 2
            return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]

        proxy.sent = flip
        try:
            image.push(small, name)
        except CryociError:
            failed += 1
        out = tmp_path / f"out{number}"
        try:
            image.pull(name, out)
        except CryociError:
            assert not out.exists()
        else:
            assert tree_of(out) == tree_of(small)
        if seen[0] < number:
            break
    assert failed >= 5


def test_a_truncated_answer_at_every_request_of_a_push(
    proxy: Proxy, small: Path, no_sleep: list[float]
) -> None:
    place = f"{proxy.host}/truncated"
    count = requests_of(proxy, lambda: image.push(small, ref(f"{place}/count:1")))
    for number in range(1, count + 1):
        name = ref(f"{place}/{number}:1")
        proxy.before = Nth(number, truncate)
        try:
            pushed = image.push(small, name, registry_options=OPTIONS)
        except CryociError:
            proxy.before = lambda request: False
            pushed = image.push(small, name)
        proxy.before = lambda request: False
        assert image.inspect(name).digest == pushed.digest


def test_tokens_that_expire_at_every_request(
    proxy: Proxy, small: Path, tmp_path: Path, no_sleep: list[float]
) -> None:
    """A token is good for a request of each layer in flight and one more; each new one is asked for anew."""
    left = [0]
    lock = threading.Lock()
    realm = f"http://{proxy.host}/token"

    def before(request: Request) -> bool:
        with lock:
            if request.path.startswith("/token"):
                left[0] = parallel.WIDTH + 1
                return request.answer(200, json.dumps({"token": f"t{time.monotonic_ns()}"}).encode())
            left[0] -= 1
            if request.handler.headers.get("Authorization", "").startswith("Bearer") and left[0] >= 0:
                return False
        drain(request)
        return request.answer(401, headers={"WWW-Authenticate": f'Bearer realm="{realm}",service="s"'})

    name = ref(f"{proxy.host}/tokens/a:1")
    proxy.before = before
    image.push(small, name)
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(small)


def test_a_full_disk(registry: str, source: Path, tmp_path: Path) -> None:
    """A file system of 4 MiB, in a mount namespace of its own: told in one line, and nothing is left on it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    name = f"{registry}/full/a:1"
    image.push(source, ref(name))
    small = tmp_path / "small"
    small.mkdir()
    for target in (f"{small}/out", f"oci:{small}/layout:a"):
        script = (
            f"mount -t tmpfs -o size=4m small {small}; "
            f"{sys.executable} -m cryoci.cli.main pull {name} {target}; code=$?; "
            f"find {small} -type f -size +64k; exit $code"
        )
        words = ["unshare", "-m", "sh", "-c", script]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "no space left" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""


def test_a_push_from_a_full_disk(registry: str, source: Path, tmp_path: Path) -> None:
    """It makes no copy, and its journal only spares sending: there may be no byte left for it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    name = f"{registry}/full/push:1"
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=64k small {small} && head -c 1M /dev/zero > {small}/full; "
        f"CRYOCI_LIB={small}/lib exec {sys.executable} -m cryoci.cli.main push {source} {name}"
    )
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "No space left" in done.stderr, done.stderr  # head's
    image.pull(ref(name), tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(source)


def _moved(proxy: Proxy) -> tuple[Callable[[Request, bytes], bytes], list[int]]:
    """A `body` hook that counts the bytes of blobs that came down."""
    down = [0]

    def body(request: Request, data: bytes) -> bytes:
        if request.method == "GET" and "/blobs/sha256:" in request.path:
            down[0] += len(data)
        return data

    return body, down


def test_a_killed_pull_goes_on_with_what_is_missing(
    proxy: Proxy, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ref(f"{proxy.host}/killed/pull:1")
    image.push(source, name)
    parts = sorted(image.inspect(name).layers, key=lambda layer: layer.size)
    largest = parts[-1].digest
    stuck = threading.Event()

    def stall(request: Request) -> bool:
        if request.method == "GET" and largest in request.path:
            stuck.set()
            time.sleep(30)
        return False

    target = LayoutRef(tmp_path / "layout", "c")
    proxy.before = stall
    words = [sys.executable, "-m", "cryoci.cli.main", "pull", str(name), str(target)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert stuck.wait(30)
    end = time.monotonic() + 10
    store = tmp_path / "layout/blobs/sha256"
    finished = [layer.digest[7:] for layer in parts[:-1]]
    while not all((store / digest).exists() for digest in finished) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    proxy.before = lambda request: False
    proxy.body, down = _moved(proxy)
    copied = image.copy(name, target)
    assert down[0] == parts[-1].size
    assert copied.skipped >= sum(layer.size for layer in parts[:-1])
    image.pull(target, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(source)
    assert not list(store.glob(".tmp*")) or image.remove(target) > 0


def test_a_killed_push_goes_on_with_what_is_missing(proxy: Proxy, source: Path, tmp_path: Path) -> None:
    origin = LayoutRef(tmp_path / "layout", "c")
    image.push(source, origin)
    parts = sorted(image.inspect(origin).layers, key=lambda layer: layer.size)
    name = ref(f"{proxy.host}/killed/push:1")
    stuck = threading.Event()

    def stall(request: Request) -> bool:
        if request.method == "PATCH":  # only the large one is streamed
            stuck.set()
            time.sleep(30)
        return False

    proxy.before = stall
    words = [sys.executable, "-m", "cryoci.cli.main", "push", str(origin), str(name)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert stuck.wait(30)
    time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    proxy.before = lambda request: False
    proxy.up = 0
    copied = image.copy(origin, name)
    assert copied.skipped >= parts[0].size
    assert (
        parts[-1].size <= proxy.up < parts[-1].size + (64 << 10)
    )  # the one that was under way, and documents
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(source)


@pytest.mark.parametrize("forgiving", [True, False], ids=["kept", "forgotten"])
def test_a_killed_push_of_a_directory_goes_on(proxy: Proxy, tmp_path: Path, forgiving: bool) -> None:
    """The layer that was under way goes on at its byte where the registry keeps it; what was there is not sent."""
    source = make_checkpoint(tmp_path / "ck", pages=72 << 20)  # more than sockets hold
    shutil.copyfile(source / "checkpoint/core-1.img", source / "checkpoint/pages-2.img")
    with open(source / "checkpoint/pages-2.img", "ab") as file:
        file.write(os.urandom(9 << 20))
    name = ref(f"{proxy.host}/killed/{'kept' if forgiving else 'forgotten'}:1")
    proxy.forgiving = forgiving
    proxy.stall = 12 << 20  # the second layer is below that
    words = [sys.executable, "-m", "cryoci.cli.main", "push", str(source), str(name)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert proxy.stalled.wait(60)
    end = time.monotonic() + 30
    while not (done := _noted(tmp_path / "lib/pushes")) & {"checkpoint/pages-2.img"}:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert "checkpoint/pages-1.img" not in done
    process.send_signal(signal.SIGKILL)
    process.wait()
    proxy.go_on.set()
    seen, end = -1, time.monotonic() + 30
    while (seen != proxy.up or seen < 12 << 20) and time.monotonic() < end:
        seen = proxy.up
        time.sleep(0.5)  # the registry takes in what was on its way
    first, proxy.up = proxy.up, 0
    proxy.log.clear()
    pushed = image.push(source, name)
    parts = {layer.holds: layer.size for layer in image.inspect(name).layers}
    before = sum(size for holds, size in parts.items() if holds in done)
    small = 64 << 10  # manifests, the config, and layers that lie below `registry.SMALL`
    if forgiving:
        assert parts["checkpoint/pages-1.img"] > first - before > 12 << 20
        assert abs(first + proxy.up - sum(parts.values())) < small
        assert sum(method == "PATCH" for method, _ in proxy.log) == 1
    else:
        assert abs(proxy.up - parts["checkpoint/pages-1.img"]) < small
    assert pushed.skipped >= parts["checkpoint/pages-2.img"]
    assert not list((tmp_path / "lib/pushes").iterdir())
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(source)


@pytest.mark.parametrize("compression", ["zstd:1", "none"])
def test_a_directory_that_changed_after_a_kill(
    proxy: Proxy, small: Path, tmp_path: Path, no_sleep: list[float], compression: str
) -> None:
    """What is taken up is of other bytes by now: the registry's check finds it, and all of it is sent anew."""
    proxy.forgiving = True
    name = ref(f"{proxy.host}/killed/changed:1")
    proxy.cut = 300_000
    with pytest.raises(CryociError):
        image.push(small, name, compression=compression, registry_options=RegistryOptions(attempts=1))
    assert _uploads(tmp_path / "lib/pushes")
    with open(small / "checkpoint/pages-1.img", "r+b") as file:
        file.write(b"other")
    image.push(small, name, compression=compression)
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(small)


def _noted(place: Path) -> set[str]:
    """The layers that ended, by the journals in `place`."""
    lines = [json.loads(line) for path in place.glob("*") for line in path.read_text().splitlines()]
    return {line["name"] for line in lines if "digest" in line}


def _uploads(place: Path) -> list[str]:
    return [line for path in place.glob("*") for line in path.read_text().splitlines() if '"upload"' in line]


@pytest.mark.parametrize("compression", ["zstd:1", "none"])
def test_an_answer_that_is_lost_after_the_deed(
    proxy: Proxy, small: Path, tmp_path: Path, no_sleep: list[float], compression: str
) -> None:
    """The registry has done what each request asked, and the connection breaks before it says so."""
    place = f"{proxy.host}/lost/{compression.partition(':')[0]}"
    count = requests_of(proxy, lambda: image.push(small, ref(f"{place}/count:1"), compression=compression))
    for number in range(1, count + 1):
        proxy.lost = number
        pushed = image.push(small, name := ref(f"{place}/{number}:1"), compression=compression)
        assert image.inspect(name).digest == pushed.digest
    assert proxy.lost <= 0
    image.pull(name, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(small)


def test_what_stays_wrong_is_told_once(proxy: Proxy, source: Path, no_sleep: list[float]) -> None:
    """A registry that keeps other bytes than it was given is found out when the tag is read back."""
    proxy.body = lambda request, data: (
        data.replace(b'"counter"', b'"counteR"')
        if request.method == "GET" and request.path.endswith("/manifests/1")
        else data
    )
    with pytest.raises(IntegrityError):
        image.push(source, ref(f"{proxy.host}/wrong/a:1"))
