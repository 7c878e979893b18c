# SPDX-License-Identifier: Apache-2.0
"""How memory moves is chosen from what the node has, is the same bytes either way, and is written down."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import ConfigError, SpaceError
from cryoci.shim import config, remains
from cryoci.shim.memory import calls, chunk, dump, index, placement, prefetch, sums
from cryoci.shim.memory.calls import PAGE
from cryoci.shim.memory.find import Area as Found
from cryoci.shim.memory.find import Process
from cryoci.shim.memory.settings import Settings
from cryoci.shim.record import Record
from tests.unit.test_memory_format import PAGES, Area

GIB = 1 << 30
RATES = {"buffered": 1.0, "direct": 1.9}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setenv("CRYOCI_RUN", str(tmp_path / "run"))
    made = Record(None, "c")
    made.make()
    return made


@pytest.fixture
def disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made:
        yield Path(made)


@pytest.fixture
def memory() -> Iterator[str]:
    path = f"/dev/shm/cryoci-test-{os.getpid()}"
    os.mkdir(path)
    yield path
    for name in os.listdir(path):
        os.unlink(f"{path}/{name}")
    os.rmdir(path)


@pytest.mark.parametrize(
    ("rates", "spare", "chosen", "because"),
    [
        (RATES, 8 * GIB, "direct", "1.90 GB/s direct, 1.00 through"),
        ({"buffered": 1.0, "direct": 1.2}, 8 * GIB, "buffered", "1.20 GB/s direct"),
        ({"buffered": 1.0, "direct": 1.2}, GIB, "direct", "memory is short"),
        ({"buffered": 1.0, "direct": 0.7}, GIB, "buffered", "0.70 GB/s direct"),
        ({"buffered": 1.0, "direct": 0.0}, GIB, "buffered", "no O_DIRECT"),
    ],
)
def test_a_capture_goes_past_the_page_cache_where_that_was_faster(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[str, float],
    spare: int,
    chosen: str,
    because: str,
) -> None:
    monkeypatch.setattr(placement, "measure", lambda directory: rates)
    monkeypatch.setattr(placement, "available_memory", lambda: spare)
    monkeypatch.setattr(placement, "file_system", lambda directory: "ext4")
    plan = placement.for_capture(str(tmp_path), 4 * GIB, Settings())
    assert plan.settings.write == chosen and because in plan.why["write"]
    assert plan.seen["direct GB/s"] == rates["direct"]
    back = placement.for_capture(str(tmp_path), 4 * GIB, Settings(), returns=True)
    if spare > 4 * GIB:
        assert back.settings.write == "buffered" and "comes back" in back.why["write"]
    else:
        assert back == plan
    small = placement.for_capture(str(tmp_path), placement.WORTH - 1, Settings())
    assert small.settings.write == "buffered" and "direct GB/s" not in small.seen


def test_memory_is_never_measured_and_what_is_configured_counts(memory: str, tmp_path: Path) -> None:
    plan = placement.for_capture(memory, 4 * GIB, Settings(write="direct", threads=3, digest=sums.NONE))
    assert (plan.settings.write, plan.settings.threads, plan.settings.digest) == ("buffered", 3, sums.NONE)
    assert plan.why["write"] == "tmpfs is the page cache" and plan.why["threads"] == "as configured"
    assert "threads 3: as configured" in plan.text and "digest none" in plan.text
    assert placement.for_capture(memory, 1, Settings()).settings.threads == 1  # one file
    forced = placement.for_capture(str(tmp_path), 1, Settings(write="direct"))
    assert forced.settings.write in ("direct", "buffered")
    if forced.settings.write == "buffered":
        assert "O_DIRECT" in forced.why["write"] or "page cache" in forced.why["write"]


def test_the_measurement_writes_both_ways_and_leaves_nothing(tmp_path: Path) -> None:
    rates = placement.measure(str(tmp_path))
    assert rates["buffered"] > 0 and set(rates) == {"buffered", "direct"}
    assert os.listdir(tmp_path) == []
    assert placement.measure(str(tmp_path / "missing")) == {"buffered": 0.0, "direct": 0.0}


@pytest.mark.parametrize("kind", ["whole", "mixed", "empty"])
def test_direct_writes_are_the_same_bytes(tmp_path: Path, kind: str) -> None:
    area = Area()
    dice = random.Random(kind)
    for page in range(PAGES):
        if kind == "whole" or (kind == "mixed" and dice.random() < 0.6):
            area.map[page * PAGE : page * PAGE + 9] = dice.randbytes(9)
        elif kind == "mixed" and dice.random() < 0.5:
            area.map[page * PAGE] = 0  # present, and zero
    files = []
    for direct in (False, True):
        where = tmp_path / str(direct)
        where.mkdir()
        pagemap, fd = os.open("/proc/self/pagemap", os.O_RDONLY), os.open(where, os.O_RDONLY)
        try:
            told: list[int] = []
            written = chunk.capture(
                fd,
                chunk.Key(7, area.start, PAGES),
                os.getpid(),
                pagemap,
                chunk.Buffer(),
                kind=sums.SHA256,
                direct=direct,
                passed=told.append,
            )
        finally:
            os.close(pagemap)
            os.close(fd)
        assert sum(told) >= written.stored
        files.append((written, (where / written.key.name).read_bytes()))
    assert files[0] == files[1]
    del area._anchor


def test_what_was_chosen_is_kept_for_debug_and_outlives_the_record(record: Record, tmp_path: Path) -> None:
    Path(record.directory, "runtime").write_text("/usr/bin/runc")
    placement.for_capture(str(tmp_path), 1, Settings(threads=5)).keep(record, "capture")
    placement.for_fill(1, Settings()).keep(record, "fill")
    kept = json.loads(Path(record.directory, placement.NAME).read_text())
    assert kept["capture"]["chosen"] == {"threads": 5, "write": "buffered", "digest": "sha256"}
    assert kept["fill"]["why"]["threads"]
    remains.remove(record.directory)
    assert os.listdir(record.directory) == [placement.NAME]


def test_a_directory_in_memory_needs_that_memory(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(1, 1, 1, (Found(PAGE, 9 * PAGE, 2 << 20),))
    dump._check_space([process], memory)
    monkeypatch.setattr(placement, "available_memory", lambda: 1 << 20)
    with pytest.raises(SpaceError, match="is memory, of which this node has 1 MiB left"):
        dump._check_space([process], memory)


def test_configuration_of_it_is_checked() -> None:
    parsed = config.parse({"memory": {"write": "direct", "prefetch": False, "threads": 2}}).memory
    assert (parsed.write, parsed.prefetch, parsed.threads) == ("direct", False, 2)
    for wrong in ({"write": "fast"}, {"write": True}, {"prefetch": "no"}, {"threads": 0}, {"threads": True}):
        with pytest.raises(ConfigError):
            config.parse({"memory": wrong})


def test_options_of_one_checkpoint_go_over_the_configuration() -> None:
    before = config.parse({"memory": {"engine": "parallel", "chunk": "4M", "digest": "xxh3"}}).memory
    assert before.changed("threads=3") == dataclasses.replace(before, threads=3)
    after = before.changed("engine=criu,write=direct,prefetch=false,chunk=8M,digest=none")
    assert after == Settings(chunk=8 << 20, write="direct", prefetch=False, digest=sums.NONE)
    for wrong in ("threads=many", "threads=0", "speed=9", "write", "prefetch=1", ""):
        with pytest.raises(ConfigError):
            before.changed(wrong)


def images(directory: Path, mib: int) -> list[Path]:
    """Chunk files of random pages, and their index."""
    directory.mkdir()
    keys = [chunk.Key(1, GIB + n * (1 << 20), 256) for n in range(mib)]
    for key in keys:
        (directory / key.name).write_bytes(bytes(chunk.data_offset(256)) + os.urandom(1 << 20))
    index.write(str(directory), {1: [(GIB, mib << 20)]}, [(key, "") for key in keys])
    return [directory / key.name for key in keys]


def in_cache(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return calls.cached(fd, 0, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def evict(paths: list[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def test_files_are_read_ahead_within_the_budget(
    record: Record, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = images(disk / "i", 96)
    directory = str(disk / "i")
    evict(paths)
    assert not any(map(in_cache, paths)), "/var/tmp must be on a disk"
    with prefetch.ahead(record, directory, Settings(prefetch=False)):
        pass
    assert not any(map(in_cache, paths))
    monkeypatch.setattr(placement, "available_memory", lambda: 1 << 40)
    started: list[prefetch._Reader] = []
    start = prefetch._start

    def spy(*words: object) -> prefetch._Reader | None:
        reader = start(*words)  # type: ignore[arg-type]
        assert reader is not None
        started.append(reader)
        reader._thread.join()  # let it read all that it may
        return reader

    monkeypatch.setattr(prefetch, "_start", spy)
    with prefetch.ahead(record, directory, Settings()):
        assert all(map(in_cache, paths))
    evict(paths)
    monkeypatch.setattr(placement, "available_memory", lambda: (96 + 2 * 70) << 20)
    with prefetch.ahead(record, directory, Settings()):
        read = sum(map(in_cache, paths))
        assert 60 <= read <= 80  # the kernel reads a little further
    kept = json.loads(Path(record.directory, placement.NAME).read_text())
    assert kept["prefetch"]["why"]["prefetch"].startswith("70 of 96 MiB")


def test_a_broken_checkpoint_is_left_to_the_fill(record: Record, tmp_path: Path) -> None:
    (tmp_path / index.NAME).write_text("{")
    with prefetch.ahead(record, str(tmp_path), Settings()):
        pass
    assert prefetch.budget(10, 5) == 0
    assert prefetch.budget(10, 16) == 3
    assert prefetch.budget(10, 100) == 10
