# SPDX-License-Identifier: Apache-2.0

"""Memory straight into a layout or registry, and back from there: sink, supply, the image that has it meanwhile."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.errors import (
    CheckpointError,
    ConflictError,
    CryociError,
    ImageError,
    IntegrityError,
    RestoreError,
    SpaceError,
)
from cryoci.ociimage import image, reference
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.shim import paths
from cryoci.shim.engines import processes
from cryoci.shim.engines.checkpoint import checkpoint as taken
from cryoci.shim.engines.options import DumpOptions
from cryoci.shim.memory import capture, fill, index, journal, repair, sink, supply
from cryoci.shim.memory.calls import PAGE
from cryoci.shim.memory.find import Area as Found
from cryoci.shim.memory.find import Process
from cryoci.shim.memory.journal import Journal, Member
from cryoci.shim.memory.settings import Settings
from cryoci.shim.record import Record
from cryoci.uses.straight import SOCKET, Stored, Straight, straight
from tests.unit.images import make_checkpoint, no_credentials, registry, tree_of  # noqa: F401
from tests.unit.live_runtime import LiveRuntime, running
from tests.unit.test_memory_format import PAGES, Area

pytestmark = [
    pytest.mark.usefixtures("no_credentials"),
    pytest.mark.skipif(os.geteuid() != 0, reason="records are root's"),
]
SIZE = PAGES * PAGE


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    with running(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def area() -> Iterator[Area]:
    made = Area()
    made.map.write(random.Random(3).randbytes(SIZE // 2))  # the rest is absent
    yield made
    del made._anchor
    made.map.close()


@pytest.fixture(params=["layout", "registry"])
def goal(request: pytest.FixtureRequest, tmp_path: Path) -> LayoutRef | RegistryRef:
    text = f"oci:{tmp_path}/layout:web"
    if request.param == "registry":
        text = f"{request.getfixturevalue('registry')}/straight/{os.urandom(4).hex()}:1"
    found = reference.parse(text)
    assert isinstance(found, LayoutRef | RegistryRef)
    return found


def process(area: Area) -> Process:
    return Process(os.getpid(), 7, 0, (Found(area.start, area.start + SIZE, SIZE // 2),))


def captured(made: Straight, area: Area, directory: Path) -> tuple[index.Index, str]:
    """What the runtime does."""
    directory.mkdir(parents=True, exist_ok=True)
    one = sink.Sink(made.path)
    try:
        settings = Settings(chunk=1 << 20, threads=2)
        found = capture.capture([process(area)], str(directory), settings, sink=one)
        return found, one.seal(str(directory))
    finally:
        one.close()


def test_memory_goes_there_and_comes_back_with_no_file_here(
    live: LiveRuntime, area: Area, goal: LayoutRef | RegistryRef, tmp_path: Path
) -> None:
    before = bytes(area.map)
    directory = make_checkpoint(tmp_path / "c")
    with straight(live.container(), goal, "zstd:1", None) as made:
        found, source = captured(made, area, directory / "checkpoint")
        assert [p.name for p in (directory / "checkpoint").glob("cryoci-memory*")] == [index.NAME]
        assert len(made.layers) == len(found.chunks) >= 3
        area.map[:] = bytes(SIZE)
        stored = Stored(source, None)
        assert index.parse(stored.index()) == found
        assert fill.fill(found, "/nowhere", {7: os.getpid()}, 2, source=stored) == SIZE // 2
        assert bytes(area.map) == before
        assert 0 < stored.largest <= stored.size
        assert (made.supplier(source).stays, Stored(source, None).stays) == (True, False)
        result = image.push(directory, goal, here=made.layers)
    assert result.raw_size > SIZE // 2 and made.notes == []
    assert not os.path.exists(made.path)
    with pytest.raises(CryociError):
        Stored(source, None)  # the image is there now, and has the layers
    image.pull(goal, tmp_path / "back")
    pulled = tree_of(tmp_path / "back")
    assert {f"checkpoint/{key.name}" for key, _ in found.chunks} <= pulled.keys()
    assert {name: pulled[name] for name in tree_of(directory)} == tree_of(directory)
    area.map[:] = bytes(SIZE)
    fill.fill(found, str(tmp_path / "back/checkpoint"), {7: os.getpid()}, 2)
    assert bytes(area.map) == before


def test_what_a_journal_names_is_kept_by_collections(live: LiveRuntime, area: Area, tmp_path: Path) -> None:
    goal = LayoutRef(tmp_path / "layout", "web")
    record = Record(None, "web")
    with pytest.raises(KeyboardInterrupt):
        with straight(live.container(), goal, "zstd:1", None) as made:
            _, source = captured(made, area, tmp_path / "c")
            Journal("dropping", str(tmp_path / "c"), "/x", False, (), source=source).write(record)
            raise KeyboardInterrupt
    assert Layout(goal.path).collect() == 0
    before = bytes(area.map)
    area.map[:] = bytes(SIZE)
    stored = Stored(source, None)
    fill.fill(index.parse(stored.index()), "/nowhere", {7: os.getpid()}, 1, source=stored)
    assert bytes(area.map) == before
    stored.forget()
    assert Layout(goal.path).names() == []
    assert list((goal.path / "blobs/sha256").iterdir()) == []


def test_a_blob_that_is_damaged_is_no_memory(live: LiveRuntime, area: Area, tmp_path: Path) -> None:
    goal = LayoutRef(tmp_path / "layout", "web")
    with straight(live.container(), goal, "none", None) as made:
        found, source = captured(made, area, tmp_path / "c")
        blob = goal.path / "blobs/sha256" / made.layers[0].descriptor.digest.removeprefix("sha256:")
        data = bytearray(blob.read_bytes())
        data[-3000] ^= 1
        blob.write_bytes(data)
        with pytest.raises(IntegrityError):
            fill.fill(found, "/nowhere", {7: os.getpid()}, 2, source=Stored(source, None))
        (tmp_path / "b").mkdir()
        shutil.copy(tmp_path / "c" / index.NAME, tmp_path / "b")
        with pytest.raises(IntegrityError):
            supply.bring(Stored(source, None), str(tmp_path / "b"))
        assert not [p for p in (tmp_path / "b").iterdir() if p.name.endswith((".new",))]
        blob.unlink()
        with pytest.raises(ImageError):
            Stored(source, None).fetch(next(iter(made.layers[0].files)).partition("/")[2], 1)


def test_all_of_it_can_be_brought_to_a_directory(live: LiveRuntime, area: Area, tmp_path: Path) -> None:
    before = bytes(area.map)
    with straight(live.container(), LayoutRef(tmp_path / "layout", "web"), "zstd:1", None) as made:
        found, source = captured(made, area, tmp_path / "c")
        supply.bring(Stored(source, None), str(tmp_path / "c"))
    area.map[:] = bytes(SIZE)
    fill.fill(found, str(tmp_path / "c"), {7: os.getpid()}, 2)
    assert bytes(area.map) == before


def test_a_store_that_fails_is_said_and_one_that_is_gone_too(
    live: LiveRuntime, area: Area, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise SpaceError("no space left", hint="make room")

    with straight(live.container(), LayoutRef(tmp_path / "layout", "web"), "zstd:1", None) as made:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made.store, "put_blob", full)
            with pytest.raises(CheckpointError, match="no space left") as caught:
                captured(made, area, tmp_path / "c")
        assert caught.value.hint == "make room"
        assert isinstance(made.error, SpaceError)
        assert list((tmp_path / "c").iterdir()) == []
        one = sink.Sink(made.path)
        made.close()
        with pytest.raises(CheckpointError, match="could not be stored"):
            one.seal(str(make_index(tmp_path / "d")))


def make_index(directory: Path) -> Path:
    directory.mkdir()
    index.write(str(directory), {}, ())
    return directory


def test_who_has_no_supplier_or_cannot_reach_it_is_told_where_the_memory_is(tmp_path: Path) -> None:
    source = f"oci:{tmp_path}/gone@sha256:{'a' * 64}"
    with pytest.raises(RestoreError, match="the memory of container web is in oci:") as caught:
        supply.supplied(source, None, "web")
    assert caught.value.hint == "run `cryoci repair web`"
    with pytest.raises(RestoreError, match="which cannot be read") as caught:
        supply.supplied(source, lambda text: Stored(text, None), "web")
    assert "cryoci repair web" in str(caught.value.hint)
    with pytest.raises(ImageError):
        Stored(f"oci:{tmp_path}/gone:tag", None)


def test_a_journal_with_a_source_is_of_a_version_that_older_ones_refuse(live: LiveRuntime) -> None:
    record = Record(None, "web")
    note = Journal("dropping", "/x", "/y", True, (Member(1, 2, 3),), source="oci:/l@sha256:" + "a" * 64)
    note.write(record)
    path = Path(record.directory) / journal.NAME
    assert json.loads(path.read_text())["version"] == 2
    assert journal.read(record) == note
    Journal("dropping", "/x", "/y", True, ()).write(record)
    assert json.loads(path.read_text()).keys() == {
        "version", "state", "directory", "freezer", "frozen", "members", "owner"
    }  # fmt: skip


AREAS = st.lists(st.tuples(st.integers(1, 400), st.integers(0, 100)), min_size=1, max_size=120)


@given(AREAS, st.none() | st.integers(1, 4096), st.none() | st.integers(1, 16))
def test_chunks_fit_the_layers_and_the_budget(
    areas: list[tuple[int, int]], budget: int | None, threads: int | None
) -> None:
    at = 1 << 20
    made: list[Found] = []
    for mib, gap in areas:
        at += gap << 20
        made.append(Found(at, at + (mib << 20), mib << 20))
        at += mib << 20
    settings = Settings(threads=threads, budget=budget << 20 if budget else None)
    one = Process(1, 1, 0, tuple(made))
    try:
        chosen, plan = sink.arrange([one], settings)
    except SpaceError as e:
        assert budget is not None and f"budget={budget}M" not in str(e.hint)
        return
    keys = [key for process in chosen for key in capture.keys(process, plan.settings.chunk)]
    assert 0 < len(keys) <= sink.MOST
    largest = max(key.pages * PAGE for key in keys)
    room = settings.budget or max(sink.BUDGET, plan.settings.chunk)
    assert largest <= room
    assert plan.settings.workers == 1 or plan.settings.workers * largest <= room
    assert threads is None or plan.settings.workers <= threads
    left = len(made) - sum(len(process.areas) for process in chosen)
    assert bool(left) == ("left to CRIU" in plan.why["chunk"])
    if left:  # the smallest
        kept = min(area.resident for process in chosen for area in process.areas)
        taken_ = {area.start for process in chosen for area in process.areas}
        assert all(area.resident <= kept for area in made if area.start not in taken_)


@pytest.mark.parametrize("source", ["", "oci:/l@sha256:" + "a" * 64])
def test_the_only_copy_of_memory_outlives_a_failed_checkpoint(
    live: LiveRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    directory, record = tmp_path / "made/checkpoint", Record(None, "web")

    def cannot(record: Record, supplier: object = None) -> None:
        if journal.read(record) is not None:
            raise RestoreError("it cannot be put back")

    monkeypatch.setattr(repair, "repair", cannot)
    with pytest.raises(CheckpointError, match="it cannot be put back"):
        with taken(live.container(), directory, DumpOptions()):
            Journal("dropping", str(directory / "checkpoint"), "/x", True, (), source=source).write(record)
            raise ConflictError("the push failed")
    held = Path(paths.container_directory(None, "web")) / processes.HELD
    assert held.exists()  # so that `cryoci repair` thaws it
    assert not directory.exists()
    found = journal.read(record)
    assert found is not None
    assert (Path(found.directory) / "inventory.img").exists() == (source == "")
    assert not Path(found.directory).is_relative_to(tmp_path / "made") or source


def test_the_socket_goes_with_the_record() -> None:
    from cryoci.shim import remains

    assert SOCKET in remains._RECORD
