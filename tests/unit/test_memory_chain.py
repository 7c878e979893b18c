# SPDX-License-Identifier: Apache-2.0
"""shim/memory: chunks that are shared with earlier checkpoints, and chains of directories that lean on each other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryoci.errors import ConflictError, CryociError, ImageError, IntegrityError
from cryoci.shim.memory import capture, chain, chunk, index
from cryoci.shim.memory.calls import PAGE
from cryoci.shim.memory.find import Area as Found
from cryoci.shim.memory.find import Process
from cryoci.shim.memory.parent import Parent
from cryoci.shim.memory.settings import Settings
from tests.unit.test_memory_format import PAGES, Area

START = 0x10000000
SMALL = 4  # pages of a made chunk


def made(directory: Path, contents: dict[int, bytes]) -> None:
    """Images with one process, whose chunk number N holds pages that begin with contents[N]."""
    directory.mkdir(parents=True)
    chunks = []
    for number, content in contents.items():
        key = chunk.Key(1, START + number * SMALL * PAGE, SMALL)
        pages = content.ljust(SMALL * PAGE, b"\x01")
        head = chunk._HEAD.pack(
            chunk.MAGIC, chunk.VERSION, PAGE, 1, key.start, SMALL, SMALL, chunk.data_offset(SMALL), 1, 0
        )
        bitmap = bytes([0xF])
        digest = hashlib.sha256(pages + head + bitmap)
        file = (head + digest.digest() + bitmap).ljust(chunk.data_offset(SMALL), b"\0") + pages
        (directory / key.name).write_bytes(file)
        chunks.append((key, digest.hexdigest()))
    index.write(str(directory), {1: [(START, 1 << 30)]}, chunks)


def told(directory: Path) -> dict[int, bytes]:
    """The contents that `made` was given, verified."""
    content = index.read(str(directory))
    found = {}
    buffer = chunk.Buffer()
    with chain.Places(content, str(directory)) as places:
        for key, digest in content.chunks:
            with chunk.Reader(places.of(key), key, digest) as reader:
                for _, size in reader.pieces(buffer):
                    found[(key.start - START) // SMALL // PAGE] = bytes(buffer.view[:size]).rstrip(b"\x01")
    return found


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("cryoci-memory-*")}


STEP = st.dictionaries(st.integers(0, 7), st.sampled_from([b"a", b"b", b"c"]), max_size=8)


@settings(max_examples=25, deadline=None)
@given(st.lists(STEP, min_size=2, max_size=8), st.data())
def test_a_chain_of_any_length_holds_what_was_put_in(
    tmp_path_factory: pytest.TempPathFactory, steps: list[dict[int, bytes]], data: st.DataObject
) -> None:
    base = tmp_path_factory.mktemp("chain")
    places = [base / f"c{n}" / "checkpoint" for n in range(len(steps))]
    for n, (place, step) in enumerate(zip(places, steps, strict=True)):
        made(place, step)
        if n:
            saved = chain.thin(str(place), str(places[n - 1]))
            same = [key for key in step if steps[n - 1].get(key) == step[key]]
            assert saved == len(same) * (chunk.data_offset(SMALL) + SMALL * PAGE)
            assert len(files(place)) == len(step) - len(same)
    assert [told(place) for place in places] == steps
    which = data.draw(st.integers(0, len(steps) - 1))
    chain.flatten(str(places[which]))
    for n, place in enumerate(places):  # it alone is left, and whole
        if n != which:
            place.parent.rename(base / f"gone-{n}")
    assert told(places[which]) == steps[which]
    assert json.loads((places[which] / index.NAME).read_text())["version"] == 1
    chain.flatten(str(places[which]))  # a second time changes nothing
    assert told(places[which]) == steps[which]


@pytest.fixture
def five(tmp_path: Path) -> list[Path]:
    """A chain of five, the last of which needs each of the others."""
    places = [tmp_path / f"c{n}" / "checkpoint" for n in range(5)]
    for n, place in enumerate(places):
        made(place, {number: bytes([65 + min(number, n)]) for number in range(5)})
        if n:
            chain.thin(str(place), str(places[n - 1]))
    assert sorted(set(index.read(str(places[4])).sources.values())) == ["c0", "c1", "c2", "c3"]
    return places


def test_each_link_is_needed_and_a_missing_or_altered_one_is_named(five: list[Path]) -> None:
    for n in range(4):
        five[n].parent.rename(five[n].parent.with_name("away"))
        with pytest.raises(ImageError, match=f"c{n}"):
            told(five[4])
        with pytest.raises(ImageError, match=f"c{n}"):
            chain.flatten(str(five[4]))
        five[n].parent.with_name("away").rename(five[n].parent)
    before = told(five[4])
    victim = next(key for key, name in index.read(str(five[4])).sources.items() if name == "c2")
    path = five[2] / victim.name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(IntegrityError):
        told(five[4])
    with pytest.raises(IntegrityError):
        chain.flatten(str(five[4]))
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(ImageError):
        chain.flatten(str(five[4]))
    path.unlink()
    path.write_bytes(whole)
    chain.flatten(str(five[4]))
    assert told(five[4]) == before


def test_a_source_is_no_link(five: list[Path]) -> None:
    real = five[0].parent.rename(five[0].parent.with_name("elsewhere"))
    five[0].parent.symlink_to(real)
    with pytest.raises(ImageError, match="c0"):
        told(five[4])


@pytest.mark.parametrize(
    "change",
    [
        {"sources": ["../c0"]},
        {"sources": [".."]},
        {"sources": ["/etc"]},
        {"sources": [".hidden"]},
        {"sources": ["c0\n"]},
        {"sources": [7]},
        {"sources": []},
        {"sources": "c0"},
        {"sources": None},
        {"sources": ["c"] * (index.MAX_SOURCES + 1)},
        {"chunks": [[1, f"{START:x}", SMALL, "0" * 64, 1]]},
        {"chunks": [[1, f"{START:x}", SMALL, "0" * 64, -1]]},
        {"chunks": [[1, f"{START:x}", SMALL, "0" * 64, True]]},
        {"chunks": [[1, f"{START:x}", SMALL, "0" * 64, "c0"]]},
        {"chunks": [[1, f"{START:x}", SMALL, "", 0]]},
        {"version": True},
        {"version": 3},
    ],
)
def test_a_hostile_chain_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    good = {
        "version": 2,
        "page_size": PAGE,
        "processes": [{"pid": 1, "areas": [[f"{START:x}", f"{START + (1 << 20):x}"]]}],
        "chunks": [[1, f"{START:x}", SMALL, "0" * 64, 0]],
        "sources": ["c0"],
    }
    path = tmp_path / index.NAME
    path.write_text(json.dumps(good))
    assert list(index.read(str(tmp_path)).sources.values()) == ["c0"]
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(CryociError):
        index.read(str(tmp_path))


def test_only_what_is_beside_can_be_leant_on(tmp_path: Path) -> None:
    made(tmp_path / "a/checkpoint", {0: b"a"})
    made(tmp_path / "deep/b/checkpoint", {0: b"a"})
    made(tmp_path / "raw", {0: b"a"})
    for other in ("deep/b/checkpoint", "raw", "a/checkpoint"):
        with pytest.raises(ConflictError, match="beside"):
            chain.thin(str(tmp_path / "a/checkpoint"), str(tmp_path / other))
    made(tmp_path / "rawer", {0: b"a"})
    assert chain.thin(str(tmp_path / "rawer"), str(tmp_path / "raw")) > 0
    assert told(tmp_path / "rawer") == {0: b"a"}


def take(area: Area, directory: Path, parent: Path | None = None) -> index.Index:
    directory.mkdir()
    process = Process(os.getpid(), 7, 0, (Found(area.start, area.start + PAGES * PAGE),))
    above = Parent(str(parent)) if parent else None
    try:
        return capture.capture([process], str(directory), Settings(chunk=1 << 20, threads=2), above)
    finally:
        if above:
            above.close()


def shared(directory: Path) -> set[str]:
    return {name for name in files(directory) if (directory / name).stat().st_nlink > 1}


@pytest.fixture
def area() -> Iterator[Area]:
    made = Area()
    yield made
    del made._anchor
    made.map.close()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, PAGES - 1), st.sampled_from([0, 1, 255])), max_size=6))
def test_what_did_not_change_is_linked_and_the_rest_is_written(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    base = tmp_path_factory.mktemp("parent")
    area = Area()
    for page in range(0, PAGES, 2):
        area.map[page * PAGE : (page + 1) * PAGE] = os.urandom(PAGE)
    before = take(area, base / "one")
    for page, value in changes:
        area.map[page * PAGE : page * PAGE + 8] = bytes([value]) * 8
    after = take(area, base / "two", base / "one")
    alone = take(area, base / "three")
    assert after.chunks == alone.chunks  # linked or not: the same, byte for byte
    for name in files(base / "three"):
        assert (base / "two" / name).read_bytes() == (base / "three" / name).read_bytes()
    unchanged = set(before.chunks) & set(after.chunks)
    assert shared(base / "two") == {key.name for key, _ in unchanged}
    del area._anchor


def test_a_parent_that_has_rotted_is_not_linked(area: Area, tmp_path: Path) -> None:
    area.map[:] = os.urandom(PAGES * PAGE)
    take(area, tmp_path / "one")
    names = sorted(files(tmp_path / "one"))
    flipped, cut = (tmp_path / "one" / name for name in names[:2])
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-PAGE])
    parent = Parent(str(tmp_path / "one"))
    with pytest.raises((ImageError, IntegrityError)):
        parent.verify(2)
    parent.close()
    take(area, tmp_path / "two", tmp_path / "one")
    assert shared(tmp_path / "two") == set(names[2:])
    assert len(told_bytes(tmp_path / "two")) == PAGES * PAGE


def told_bytes(directory: Path) -> bytes:
    content = index.read(str(directory))
    buffer = chunk.Buffer()
    parts = []
    with chain.Places(content, str(directory)) as places:
        for key, digest in content.chunks:
            with chunk.Reader(places.of(key), key, digest) as reader:
                parts += [bytes(buffer.view[:size]) for _, size in reader.pieces(buffer)]
    return b"".join(parts)


def test_a_second_capture_to_the_same_place_does_not_write_to_the_parent(area: Area, tmp_path: Path) -> None:
    area.map[:] = os.urandom(PAGES * PAGE)
    take(area, tmp_path / "one")
    before = told_bytes(tmp_path / "one")
    take(area, tmp_path / "two", tmp_path / "one")
    area.map[:] = os.urandom(PAGES * PAGE)
    (tmp_path / "two").rename(tmp_path / "again")
    process = Process(os.getpid(), 7, 0, (Found(area.start, area.start + PAGES * PAGE),))
    capture.capture([process], str(tmp_path / "again"), Settings(chunk=1 << 20, threads=2))
    assert told_bytes(tmp_path / "one") == before
