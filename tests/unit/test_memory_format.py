# SPDX-License-Identifier: Apache-2.0
"""shim/memory: chunks and index on real memory of this process' children, and what is refused of them."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryoci.errors import ConfigError, CryociError, ImageError, IntegrityError, UnsupportedError
from cryoci.shim import config
from cryoci.shim.memory import calls, chunk, guard, index, materialize, sums
from cryoci.shim.memory.calls import PAGE

PAGES = 600  # more than two pieces


class Area:
    """Anonymous memory of this process."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._anchor = ctypes.c_char.from_buffer(self.map)
        self.start = ctypes.addressof(self._anchor)


KINDS = list(sums.KINDS.values())


@pytest.fixture
def area() -> Iterator[Area]:
    made = Area()
    yield made
    del made._anchor
    made.map.close()


def capture(area: Area, directory: Path, *, kind: int = sums.SHA256) -> chunk.Written:
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    where = os.open(directory, os.O_RDONLY)
    try:
        key = chunk.Key(7, area.start, PAGES)
        return chunk.capture(where, key, os.getpid(), pagemap, chunk.Buffer(), kind=kind)
    finally:
        os.close(pagemap)
        os.close(where)


def fill(directory: Path, written: chunk.Written) -> None:
    where = os.open(directory, os.O_RDONLY)
    buffer = chunk.Buffer()
    try:
        with chunk.Reader(where, written.key, written.digest) as reader:
            for runs, size in reader.pieces(buffer):
                assert calls.write(os.getpid(), runs, buffer.address) == size
    finally:
        os.close(where)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from("azdh")), max_size=12), st.sampled_from(KINDS)
)
def test_what_is_captured_comes_back(tmp_path: Path, runs: list[tuple[int, str]], digest: int) -> None:
    area = Area()
    at, stored = 0, 0
    dice = random.Random(len(runs))
    for pages, kind in runs:
        pages = min(pages, PAGES - at)
        data = {"a": dice.randbytes(pages * PAGE), "z": bytes(pages * PAGE)}
        if kind in data:
            area.map[at * PAGE : (at + pages) * PAGE] = data[kind]
        elif kind == "d":  # one byte of each page, its last
            for page in range(at, at + pages):
                area.map[page * PAGE + PAGE - 1] = 1
        stored += pages * PAGE if kind in "ad" else 0
        at += pages
    before = area.map[:]
    written = capture(area, tmp_path, kind=digest)
    assert written.stored == stored
    area.map.madvise(mmap.MADV_DONTNEED)
    assert not any(area.map[:: PAGE // 2])
    fill(tmp_path, written)
    assert area.map[:] == before
    del area._anchor


def test_a_chunk_is_what_the_page_says_byte_by_byte(area: Area, tmp_path: Path) -> None:
    """docs/format.md, by its own table, without the code that reads chunks."""
    page = Path(__file__).parents[2] / "docs" / "format.md"
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.+) \|$", page.read_text(), re.MULTILINE)
    fields = [(int(at), int(size)) for at, size, _ in rows]
    assert [at for at, _ in fields] == [sum(size for _, size in fields[:n]) for n in range(len(fields))]
    area.map[5 * PAGE] = 1
    area.map[70 * PAGE] = 1
    written = capture(area, tmp_path)
    raw = (tmp_path / f"cryoci-memory-7-{area.start:x}.img").read_bytes()
    bitmap = bytearray(-(-PAGES // 8))
    bitmap[0], bitmap[8] = 1 << 5, 1 << 6
    first = -(-(96 + len(bitmap)) // PAGE) * PAGE
    pages = bytes(area.map[5 * PAGE : 6 * PAGE] + area.map[70 * PAGE : 71 * PAGE])
    digest = hashlib.sha256(pages + raw[:64] + bitmap).digest()
    numbers = [1, PAGE, 7, area.start, PAGES, 2, first, 1, 0]
    wanted = [
        b"CRYOCIMC",
        *(n.to_bytes(size, "little") for n, (_, size) in zip(numbers, fields[1:], strict=False)),
    ]
    assert [raw[at : at + size] for at, size in fields] == [*wanted, digest]
    assert raw[96 : 96 + len(bitmap)] == bitmap and raw[first:] == pages
    assert written.digest == digest.hex()


@pytest.mark.parametrize("kind", [sums.SHA256, sums.XXH3])
@pytest.mark.parametrize(
    "where", [0, 8, 12, 16, 24, 32, 40, 48, 56, 64, 95, 100, chunk.data_offset(PAGES), -1]
)
def test_a_chunk_with_one_wrong_byte_is_refused(area: Area, tmp_path: Path, where: int, kind: int) -> None:
    area.map[: 50 * PAGE] = random.Random(1).randbytes(50 * PAGE)
    written = capture(area, tmp_path, kind=kind)
    path = tmp_path / written.key.name
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises((ImageError, IntegrityError)):
        fill(tmp_path, written)


def test_a_chunk_of_another_checkpoint_or_cut_off_is_refused(area: Area, tmp_path: Path) -> None:
    area.map[: 9 * PAGE] = random.Random(1).randbytes(9 * PAGE)
    written = capture(area, tmp_path)
    with pytest.raises(IntegrityError, match="another checkpoint"):
        fill(tmp_path, chunk.Written(written.key, 0, "0" * 64))
    path = tmp_path / written.key.name
    path.write_bytes(path.read_bytes()[:-PAGE])
    with pytest.raises(ImageError, match="cut off"):
        fill(tmp_path, written)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ImageError):
        fill(tmp_path, written)


GOOD = {
    "version": 1,
    "page_size": PAGE,
    "processes": [{"pid": 1, "areas": [["10000", "20000"]]}],
    "chunks": [[1, "10000", 16, ""]],
}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"page_size": 65536},
        {"processes": [{"pid": True, "areas": []}]},
        {"processes": [{"pid": 1, "areas": [["20000", "10000"]]}]},
        {"processes": [{"pid": 1, "areas": [["10000", "20001"]]}]},
        {"processes": [{"pid": 1, "areas": [["10000", "ffffffffffff0000"]]}]},
        {"chunks": [[1, "10000", 17, ""]]},
        {"chunks": [[2, "10000", 1, ""]]},
        {"chunks": [[1, "10000", 2, ""], [1, "11000", 1, ""]]},
        {"chunks": [[1, "10000", 1, "../x"]]},
        {"chunks": [[1, 65536, 1, ""]]},
        {"chunks": [[1, "10000", 1 << 40, ""]]},
        {"chunks": 3},
    ],
)
def test_a_hostile_index_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / index.NAME
    path.write_text(json.dumps(GOOD))
    assert index.read(str(tmp_path)).size == 0x10000
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises((ImageError, UnsupportedError)):
        index.read(str(tmp_path))


@given(st.binary(max_size=300))
def test_any_bytes_as_an_index_are_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    directory = tmp_path_factory.mktemp("index")
    (directory / index.NAME).write_bytes(raw)
    with pytest.raises(CryociError):
        index.read(str(directory))


def test_the_guard_comes_off_as_it_went_on(tmp_path: Path) -> None:
    message = b"\x08\x02\x10\x01\x62\x00"
    inventory = bytes.fromhex("16313158") + len(message).to_bytes(4, "little") + message
    (tmp_path / "inventory.img").write_bytes(inventory)
    (tmp_path / "files.img").write_bytes(b"files")
    for _ in range(2):  # a second time changes nothing
        guard.arm(str(tmp_path))
        assert guard.PLUGIN in (tmp_path / "inventory.img").read_bytes()
        assert b"cryoci materialize" in (tmp_path / "files.img").read_bytes()
    guard.view(str(tmp_path), str(tmp_path / "view"))
    assert (tmp_path / "view/inventory.img").read_bytes() == inventory
    assert (tmp_path / "view/files.img").read_bytes() == b"files"
    guard.disarm(str(tmp_path))
    assert (tmp_path / "inventory.img").read_bytes() == inventory
    assert (tmp_path / "files.img").read_bytes() == b"files"
    (tmp_path / "inventory.img").write_bytes(inventory[:-1])
    with pytest.raises(ImageError):
        guard.arm(str(tmp_path))


@pytest.mark.parametrize(
    "table",
    [
        {"engine": "fast"},
        {"chunk": "3M"},
        {"threads": 0},
        {"threads": True},
        {"digest": True},
        {"digest": "md5"},
        {"treshold": 1},
        {"threshold": "a lot"},
    ],
)
def test_settings_are_checked(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="memory") as caught:
        config.parse({"memory": table})
    assert caught.value.hint


def test_settings_have_their_defaults() -> None:
    assert not config.parse({}).memory.parallel
    found = config.parse(
        {"memory": {"engine": "parallel", "threshold": "1G", "chunk": "1M", "threads": 3}}
    ).memory
    assert (found.parallel, found.threshold, found.chunk, found.threads) == (True, 1 << 30, 1 << 20, 3)


@pytest.mark.parametrize("pages", [1, 511, 512, 513, 4095, 4096, 4097, 9000])
def test_scattered_pages_are_listed_once(pages: int) -> None:
    """More regions than the kernel's buffer, or ours, holds: each page once, as PyTorch's heap has them."""
    import ctypes

    size = pages * 2 * PAGE
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    anchor = ctypes.c_char.from_buffer(area)
    start = ctypes.addressof(anchor)
    for page in range(pages):
        area[2 * page * PAGE] = 1
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        found = calls.present(pagemap, start, start + size)
    finally:
        os.close(pagemap)
    assert found == [(start + 2 * page * PAGE, PAGE) for page in range(pages)]
    del anchor


PIECES = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=12)


@given(PIECES, PIECES)
def test_pages_of_criu_count_where_a_chunk_has_none(
    entries: list[tuple[int, int]], runs: list[tuple[int, int]]
) -> None:
    def placed(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        at, found = 16, []
        for gap, pages in pieces:
            found.append((at + gap, pages))
            at += gap + pages
        return found

    old = []
    at = 0
    for first, pages in placed(entries):
        old.append(materialize._Entry(first * PAGE, pages, 4, at))
        at += pages * PAGE
    stored = [(first * PAGE, pages * PAGE) for first, pages in placed(runs)]
    taken = {start + n for start, size in stored for n in range(0, size, PAGE)}
    wanted = {e.start + n: e.at + n for e in old for n in range(0, e.pages * PAGE, PAGE)}
    left = list(materialize._outside(old, stored))
    assert [e.start for e in left] == sorted(e.start for e in left)
    assert {e.start + n: e.at + n for e in left for n in range(0, e.pages * PAGE, PAGE)} == {
        page: where for page, where in wanted.items() if page not in taken
    }


@pytest.mark.parametrize(
    ("data", "digest"),
    [(b"", "99aa06d3014798d86001c324468d497f"), (b"a", "a96faf705af16834e6c632b61e964e1f")],
)
def test_xxh3_is_that_of_others(data: bytes, digest: str) -> None:
    """Values of xxhash's own `xxh128sum`."""
    found = sums.new(sums.XXH3)
    assert found is not None
    found.update(memoryview(bytearray(data)))
    found.update(b"")
    assert found.digest().hex() == digest


def test_no_libxxhash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_library", None)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(f"{name}: not there")))
    with pytest.raises(UnsupportedError, match="libxxhash") as caught:
        sums.new(sums.XXH3)
    assert "libxxhash0" in str(caught.value.hint)
