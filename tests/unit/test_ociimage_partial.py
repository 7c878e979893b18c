# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Pulls to a directory and to a layout that were killed: what is missing is moved, what was there is hashed again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cryoci.errors import ConflictError, CryociError
from cryoci.ociimage import image, layers, partial, tar
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.seal import age
from cryoci.ociimage.seal.keyring import Identities, Recipients
from tests.unit.images import (  # noqa: F401
    Proxy,
    make_checkpoint,
    no_credentials,
    no_sleep,
    proxy,
    ref,
    registry,
    tree_of,
)

pytestmark = pytest.mark.usefixtures("no_credentials", "no_sleep")

HOLD = 24 << 20  # bytes of the large layer that a pull gets before it is killed
SLACK = 12 << 20  # bytes of blob that may be in sockets and queues, or behind the last mark


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two large files, one of which comes whole before the other stops; with holes, and podman's link."""
    directory = make_checkpoint(tmp_path_factory.mktemp("partial") / "ck", pages=72 << 20)
    shutil.copyfile(directory / "checkpoint/core-1.img", directory / "checkpoint/pages-2.img")
    with open(directory / "checkpoint/pages-2.img", "ab") as file:
        file.write(os.urandom(9 << 20))
    return directory


def kill(
    proxy: Proxy,
    name: RegistryRef,
    target: str,
    ready: Callable[[], bool],
    *more: str,
    number: signal.Signals = signal.SIGKILL,
) -> None:
    """Have a pull killed when it has HOLD bytes of the large layer, and `ready` says that it wrote what it had."""
    proxy.hold = HOLD
    proxy.stalled.clear()
    proxy.go_on.clear()
    words = [sys.executable, "-m", "cryoci.cli.main", "pull", *more, str(name), target]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert proxy.stalled.wait(60)
        end = time.monotonic() + 30
        while not ready():
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.send_signal(number)
        if number != signal.SIGKILL:
            proxy.go_on.set()  # its threads end with the chunk that they wait for
        process.wait(60)
        proxy.hold = sys.maxsize
        proxy.go_on.set()
    proxy.down = 0
    proxy.log.clear()


def marks(place: Path) -> list[dict[str, int]]:
    """The lines of a journal that end well."""
    try:
        text = (place / "journal").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line.endswith(b"}")]


def far(place: Path) -> bool:
    """Whether all but the large layer is whole, and most of what came of that is noted."""
    lines = marks(place)
    whole = {line["layer"] for line in lines if "whole" in line}
    return len(whole) >= 4 and max((line.get("blob", 0) for line in lines), default=0) > HOLD - SLACK


@pytest.fixture(scope="module")
def killed(
    registry: str, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, Path]]:
    """The image in a repository of `registry`, the bytes of its blobs, and what a pull that was killed has left."""
    front = Proxy(registry)
    name = ref(f"{registry}/partial/a:1")
    size = image.push(source, name).size
    base = tmp_path_factory.mktemp("killed")
    kill(front, ref(f"{front.host}/partial/a:1"), f"{base}/out", lambda: far(base / ".out.partial"))
    front.close()
    yield "partial/a:1", size, base / ".out.partial"


def left(killed: tuple[str, int, Path], directory: Path) -> Path:
    """A copy of what the killed pull has left, as if it had been to `directory`."""
    place = directory.parent / f".{directory.name}.partial"
    shutil.copytree(killed[2], place)
    return place


def test_a_killed_pull_to_a_directory_moves_what_is_missing(
    proxy: Proxy, source: Path, killed: tuple[str, int, Path], tmp_path: Path
) -> None:
    path, size, _ = killed
    out = tmp_path / "out"
    place = left(killed, out)
    pulled = image.pull(ref(f"{proxy.host}/{path}"), out)
    assert tree_of(out) == tree_of(source)
    blobs = [where for _, where in proxy.log if "/blobs/" in where]
    assert len(blobs) == 2  # the config, and the layer that was under way
    down = proxy.down
    largest = max(layer.size for layer in image.inspect(ref(f"{proxy.host}/{path}")).layers)
    assert largest - HOLD <= down <= largest - HOLD + SLACK + (64 << 10)
    assert abs(size - pulled.skipped - down) < 64 << 10  # of manifests and the config
    assert not place.exists()


def test_killed_again_and_again(proxy: Proxy, source: Path, tmp_path: Path) -> None:
    """What was taken up can be taken up: the journal is written anew each time."""
    name = ref(f"{proxy.host}/partial/again:1")
    image.push(source, name)
    out, place = tmp_path / "out", tmp_path / ".out.partial"
    kill(proxy, name, str(out), lambda: far(place))
    before = max(line.get("blob", 0) for line in marks(place))
    moved = HOLD // 4
    proxy.hold = moved
    proxy.stalled.clear()
    proxy.go_on.clear()
    words = [sys.executable, "-m", "cryoci.cli.main", "pull", str(name), str(out)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert proxy.stalled.wait(60)
    end = time.monotonic() + 30
    while max((line.get("blob", 0) for line in marks(place)), default=0) <= before:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    proxy.hold = sys.maxsize
    proxy.go_on.set()
    pulled = image.pull(name, out)
    assert pulled.skipped > before
    assert tree_of(out) == tree_of(source)
    assert os.stat(out / "checkpoint/pages-1.img").st_blocks * 512 < 65 << 20  # holes stayed holes


def damage_content(place: Path) -> None:
    with open(place / "files/checkpoint/pages-1.img", "r+b") as file:
        file.seek(5 << 20)
        file.write(b"other")


def damage_whole(place: Path) -> None:
    with open(place / "files/checkpoint/pages-2.img", "r+b") as file:
        file.write(b"other")


def cut(place: Path) -> None:
    os.truncate(place / "files/checkpoint/pages-1.img", 1 << 20)


def longer(place: Path) -> None:
    """Bytes that no mark speaks of, where zeros will come."""
    with open(place / "files/checkpoint/pages-1.img", "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"\1" * (4 << 20))


def gone(place: Path) -> None:
    (place / "files/checkpoint/pages-1.img").unlink()


def link(place: Path) -> None:
    """A file that leads elsewhere."""
    (place.parent / "victim").write_bytes(b"victim" * 100)
    (place / "files/checkpoint/pages-1.img").unlink()
    (place / "files/checkpoint/pages-1.img").symlink_to(place.parent / "victim")


def hard_link(place: Path) -> None:
    (place.parent / "victim").write_bytes(b"victim" * 100)
    (place / "files/checkpoint/pages-1.img").unlink()
    os.link(place.parent / "victim", place / "files/checkpoint/pages-1.img")


def folder_link(place: Path) -> None:
    os.rename(place / "files/checkpoint", place.parent / "elsewhere")
    (place / "files/checkpoint").symlink_to(place.parent / "elsewhere")


def stray(place: Path) -> None:
    (place / "files/rootfs.tar").write_bytes(b"evil")
    (place / "files/checkpoint/evil").mkdir()
    (place / "evil").mkdir()


def torn(place: Path) -> None:
    size = (place / "journal").stat().st_size
    os.truncate(place / "journal", size - 5)


def edit(change: Callable[[dict[str, object]], dict[str, object]]) -> Callable[[Path], None]:
    def work(place: Path) -> None:
        lines = [json.loads(line) for line in (place / "journal").read_text().splitlines()]
        (place / "journal").write_text("".join(json.dumps(change(line)) + "\n" for line in lines))

    return work


def _renamed(line: dict[str, object]) -> dict[str, object]:
    return {**line, "name": "ctr.log"} if line.get("name") == "checkpoint/pages-1.img" else line


def _doubled(line: dict[str, object]) -> dict[str, object]:
    return (
        {**line, "name": "checkpoint/pages-2.img"} if line.get("name") == "checkpoint/pages-1.img" else line
    )


def _outside(line: dict[str, object]) -> dict[str, object]:
    return {**line, "name": "../victim"} if line.get("name") == "checkpoint/pages-1.img" else line


def _too_far(line: dict[str, object]) -> dict[str, object]:
    return {**line, "raw": int(str(line["raw"])) + 512} if "raw" in line else line


def _other_place(line: dict[str, object]) -> dict[str, object]:
    return {**line, "blob": int(str(line["blob"])) + 1} if "blob" in line else line


def _absurd(line: dict[str, object]) -> dict[str, object]:
    return {**line, "whole": 1 << 45} if "whole" in line else line


def _other_image(line: dict[str, object]) -> dict[str, object]:
    return {**line, "image": "sha256:" + "0" * 64} if "image" in line else line


DAMAGES = [damage_content, damage_whole, cut, longer, gone, link, hard_link, folder_link, stray, torn] + [
    edit(change) for change in (_renamed, _doubled, _outside, _too_far, _other_place, _absurd, _other_image)
]


@pytest.mark.parametrize(
    "damage",
    DAMAGES,
    ids=[d.__name__ for d in DAMAGES[:10]]
    + ["renamed", "doubled", "outside", "too-far", "other-place", "absurd", "other-image"],
)
def test_what_was_kept_is_never_believed(
    proxy: Proxy, source: Path, killed: tuple[str, int, Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "out"
    place = left(killed, out)
    damage(place)
    image.pull(ref(f"{proxy.host}/{killed[0]}"), out)
    assert tree_of(out) == tree_of(source)
    assert not place.exists()
    victim = tmp_path / "victim"
    assert not victim.exists() or victim.read_bytes() == b"victim" * 100


def test_a_flipped_bit_behind_what_was_kept(
    proxy: Proxy, killed: tuple[str, int, Path], tmp_path: Path
) -> None:
    """The part that is fetched is refused with the rest, all is fetched, and that is refused by its own digest."""
    out = tmp_path / "out"
    place = left(killed, out)
    proxy.body = lambda request, data: (
        data[:-100] + bytes([data[-100] ^ 1]) + data[-99:] if len(data) > 1 << 20 else data
    )
    with pytest.raises(CryociError):
        image.pull(ref(f"{proxy.host}/{killed[0]}"), out)
    assert not out.exists() and not place.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_decrypted_is_not_kept(
    proxy: Proxy, source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """No digest of it is public, so it could not be verified; and nothing of it may stay where that can be helped."""
    age.generate(tmp_path / "id.txt")
    public = (tmp_path / "id.txt").read_text().splitlines()[0].split(": ")[1]
    name = ref(f"{proxy.host}/partial/sealed-{number.value}:1")
    image.push(source, name, encrypt_to=Recipients.parse([public]))
    out, place = tmp_path / "out", tmp_path / ".out.partial"
    key = ("--decrypt-key", str(tmp_path / "id.txt"))
    kill(proxy, name, str(out), lambda: (place / "files/config.dump").exists(), *key, number=number)
    assert place.exists() == (number == signal.SIGKILL) and not out.exists()
    pulled = image.pull(name, out, identities=Identities.load([tmp_path / "id.txt"]))
    assert pulled.skipped == 0 and tree_of(out) == tree_of(source) and not place.exists()


def test_an_error_leaves_nothing_of_what_was_kept(
    proxy: Proxy, killed: tuple[str, int, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    place = left(killed, out)
    proxy.before = lambda request: request.hang_up() if request.handler.headers.get("Range") else False
    with pytest.raises(CryociError):
        image.pull(ref(f"{proxy.host}/{killed[0]}"), out)
    assert not out.exists() and not place.exists()


def test_another_pull_to_the_same_directory(
    registry: str, killed: tuple[str, int, Path], tmp_path: Path
) -> None:
    with partial.opened(tmp_path / "out"):
        with pytest.raises(ConflictError, match="another pull"):
            image.pull(ref(f"{registry}/{killed[0]}"), tmp_path / "out")
    assert (tmp_path / "out").is_dir() and not list(tmp_path.glob(".out*"))


def test_what_is_not_ours_is_left_alone(
    registry: str, source: Path, killed: tuple[str, int, Path], tmp_path: Path
) -> None:
    """In a directory that others write, as /tmp, somebody may have made what we would take for ours."""
    foreign = left(killed, tmp_path / "out")
    os.chmod(foreign, 0o755)
    (tmp_path / ".other.partial").symlink_to(foreign)
    for name in ("out", "other"):
        assert image.pull(ref(f"{registry}/{killed[0]}"), tmp_path / name).skipped == 0
        assert tree_of(tmp_path / name) == tree_of(source)
    assert (foreign / "files/checkpoint").is_dir()


@pytest.mark.parametrize("codec", ["none", "gzip:1", "one-gzip"])
def test_every_kind_of_layer(proxy: Proxy, tmp_path: Path, codec: str) -> None:
    """Plain and gzip layers go on where they were, as zstd's do; of one that is a single piece whole layers count."""
    directory = make_checkpoint(tmp_path / "ck", pages=40 << 20)
    name = ref(f"{proxy.host}/partial/{codec.partition(':')[0]}:1")
    one = codec == "one-gzip"
    if one:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "FRAME", 64 << 20)
            image.push(directory, name, compression="gzip:1")
    else:
        image.push(directory, name, compression=codec)
    out, place = tmp_path / "out", tmp_path / ".out.partial"
    proxy.hold = HOLD // 2
    words = [sys.executable, "-m", "cryoci.cli.main", "pull", str(name), str(out)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert proxy.stalled.wait(60)
    end = time.monotonic() + 30
    while sum("whole" in line for line in marks(place)) < 3 or not (
        one or any("raw" in x for x in marks(place))
    ):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.kill()
    process.wait()
    proxy.hold = sys.maxsize
    proxy.go_on.set()
    proxy.down = 0
    pulled = image.pull(name, out)
    assert tree_of(out) == tree_of(directory)
    largest = max(layer.size for layer in image.inspect(name).layers)
    assert pulled.skipped > 0
    assert (proxy.down > largest) == one


def test_what_a_layer_is_put_together_from(tmp_path: Path) -> None:
    """The start of a tar at every length, from the files that it was unpacked to."""
    (tmp_path / "config.dump").write_bytes(b"c" * 700)
    (tmp_path / "ctr.log").write_bytes(b"")
    (tmp_path / "status").write_bytes(b"s" * 512)
    members = [
        partial.Member(name, size, tar.header(name, size))
        for name, size in (("config.dump", 700), ("ctr.log", 0), ("status", 512))
    ]
    whole = b"".join(
        m.head + (tmp_path / m.name).read_bytes() + tar.padding(m.size) for m in members
    ) + bytes(2048)
    for length in (1, 511, 512, 600, 1212, 1213, 1536, 1600, 2048, 2100, 2560, 3072, 3100, len(whole)):
        layer = partial.Layer(list(members), length)
        assert b"".join(layer.content(tmp_path)) == whole[:length], length


def test_a_killed_pull_to_a_layout_goes_on_at_its_byte(proxy: Proxy, source: Path, tmp_path: Path) -> None:
    name = ref(f"{proxy.host}/partial/layout:1")
    image.push(source, name)
    target = LayoutRef(tmp_path / "layout", "c")
    store = tmp_path / "layout/blobs/sha256"
    largest = max(image.inspect(name).layers, key=lambda layer: layer.size)

    def ready() -> bool:
        parts = [path.stat().st_size for path in store.glob(".tmp-*")]
        return len(parts) == 1 and parts[0] > HOLD - SLACK

    kill(proxy, name, str(target), ready)
    have = next(store.glob(".tmp-*")).stat().st_size
    image.copy(name, target)
    assert abs(proxy.down - (largest.size - have)) < 64 << 10
    image.pull(target, tmp_path / "out")
    assert tree_of(tmp_path / "out") == tree_of(source)
    assert not list(store.glob(".tmp-*"))


def test_a_layouts_part_is_never_believed(registry: str, tmp_path: Path) -> None:
    name = ref(f"{registry}/partial/part:1")
    image.push(make_checkpoint(tmp_path / "ck"), name)
    largest = max(image.inspect(name).layers, key=lambda layer: layer.size)
    target = LayoutRef(tmp_path / "layout", "c")
    store = target.path / "blobs/sha256"
    image.copy(name, target)
    whole = (store / largest.digest[7:]).read_bytes()
    for content in (b"other" * 1000, bytes(largest.size), bytes(largest.size + 1), b""):
        (store / largest.digest[7:]).unlink()
        (store / f".tmp-{largest.digest[7:]}").write_bytes(content)
        image.copy(name, target)
        assert (store / largest.digest[7:]).read_bytes() == whole
        assert not list(store.glob(".tmp-*"))
