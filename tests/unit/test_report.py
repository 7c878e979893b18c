# SPDX-License-Identifier: Apache-2.0
"""--report: one page of one operation, its memory map, and what a hostile checkpoint may not do to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from cryoci.cli import main
from cryoci.errors import CryociError, ImageError, NotFoundError, UsageError
from cryoci.ociimage import contents, reference
from cryoci.ociimage.compat import Node
from cryoci.ociimage.criu import areas
from cryoci.ociimage.criu.memory import Area
from cryoci.page import text
from cryoci.timeline import Recorded, Step
from cryoci.uses import memory_map, report, reporting
from cryoci.uses.report_page import page
from tests import pages
from tests.unit import criu_images as made
from tests.unit.criu_images import image, message
from tests.unit.live_runtime import LiveRuntime, stored

HOSTILE = '"><script>document.title="taken"</script><img src=http://x.example/a onerror=alert(1)>\u202e\x1b[31m</td>'
CHUNK = 0x7E0000000000  # 512 pages out of band, 100 of them stored
UUID = "GPU-00000000-1111-2222-3333-444444444444"
NODE = Node("x86_64", "6.1.0", frozenset(), "4.2.1", "v2")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two processes, one of a hostile name: memory of every kind, a chunk out of band, one GPU."""
    place = tmp_path / "ckpt"
    made.process(place, 1, memory={0x400000: b"a" * 8192, 0x10000000: b"x" * 4096}, name="server")
    made.process(place, 7, memory={0x500000: b"q" * 4096}, name=HOSTILE)
    vmas = [
        message(f1=0x400000, f2=0x600000, f5=5, f6=0x2, f7=1),  # a file, 2 pages of it private by now
        message(f1=0x10000000, f2=0x10004000, f5=3, f6=0x22, f7=1 | 1 << 5),  # heap, 1 of 4 pages
        message(f1=CHUNK, f2=CHUNK + (2 << 20), f5=3, f6=0x22, f7=1),
        message(f1=0x7F0000000000, f2=0x7F0000002000, f5=3, f6=0x21, f7=1),  # shared
        message(f1=0x7FFD00000000, f2=0x7FFD00002000, f5=5, f6=0x22, f7=1 | 1 << 3),  # vdso
    ]
    tree = image("pstree", message(f1=1, f3=1, f4=1, f5=[1, 2]), message(f1=7, f2=1, f5=[7]))
    files = image("files", *(message(f1=1, f2=i, f3=message(f6=f"/{i}{HOSTILE}")) for i in (7, 8, 9)))
    made.write(
        place,
        mm_1=image("mm", message(f12=7, f14=vmas)),
        pstree=tree,
        files=files,
        fdinfo_2=image("fdinfo"),
        inventory=image("inventory", message(f1=2)),
    )
    folder = place / "checkpoint"
    index: dict[str, object] = {"version": 1, "page_size": 4096}
    index["processes"] = [{"pid": 1, "areas": [[f"{CHUNK:x}", f"{CHUNK + (2 << 20):x}"]]}]
    index["chunks"] = [[1, f"{CHUNK:x}", 512, "a" * 64]]
    (folder / "cryoci-memory.json").write_text(json.dumps(index))
    (folder / f"cryoci-memory-1-{CHUNK:x}.img").write_bytes(bytes(4096 + 100 * 4096))
    gpu = {"uuid": UUID, "name": f"H200 {HOSTILE}", "index": 0, "minor": 0, "capability": "9.0"}
    task = {"pid": 4, "start": 3, "inner": 1, "comm": HOSTILE, "vram": {UUID: 10**400}}
    dump = {"version": 1, "engine": "driver", "driver": HOSTILE, "cuda": 13000}
    dump |= {"gpus": [{**gpu, "memory": 100 << 30}], "tasks": [task], "devices": [HOSTILE]}
    (folder / "gpu.dump").write_text(json.dumps(dump))
    config = {"id": HOSTILE, "name": HOSTILE, "rootfsImageName": HOSTILE, "runtime": HOSTILE}
    (place / "config.dump").write_text(json.dumps(config))
    (place / "spec.dump").write_text(json.dumps({"annotations": {"io.container.manager": "libpod"}}))
    return place


def operation(**more: object) -> reporting.Operation:
    steps = [Step("dump", "span", 0.1, 0.7, 0), Step(f"runc {HOSTILE}", "call", 0.2, 0.5, 1, 4_000_000)]
    done = reporting.Operation(f"cryoci checkpoint {HOSTILE}", recorded=Recorded(steps, 0.9), ended=1.79e9)
    done.seconds, done.warnings, done.made = {"dump": 0.7}, [f"a hook: {HOSTILE}"], [("id", HOSTILE)]
    for name, value in more.items():
        setattr(done, name, value)
    return done


def test_memory_map(checkpoint: Path) -> None:
    held = report.look(reference.DirectoryRef(checkpoint))
    first = held.maps[0]
    assert held.problems == () and (first.pid, first.name) == (1, "server")
    seen = {one.kind: (one.size, one.stored, one.apart, one.rest, one.rest_is) for one in first.regions}
    assert seen == {
        "file": (0x200000, 8192, 0, 0x200000 - 8192, "file"),
        "heap": (16384, 4096, 0, 12288, "zero"),
        "anonymous": (2 << 20, 0, 409600, (2 << 20) - 409600, "zero"),
        "shared": (8192, 0, 0, 8192, "shared"),
        "vdso": (8192, 0, 0, 8192, "kernel"),
    }
    assert (first.stored, first.apart) == (12288, 409600)
    assert [kind for kind, _ in first.kinds()][:2] == ["anonymous", "file"]


def test_the_same_map_of_an_image(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYOCI_STORE", str(tmp_path / "store"))
    (checkpoint / "config.dump").write_text(json.dumps({"id": "ab" * 32, "name": "web"}))
    done = CliRunner().invoke(main.cli, ["push", str(checkpoint), "web:1"])
    assert done.exit_code == 0, done.exception
    local, there = report.look(reference.parse("web:1")), report.look(reference.DirectoryRef(checkpoint))
    assert local.maps == there.maps and local.gpus == there.gpus
    found = pages.check(page(reporting.Operation("x", ended=1.0), local, ""))
    assert "largest first" in found.text and "metadata" in found.text


def test_pages_of_a_push_and_a_pull(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRYOCI_STORE", str(tmp_path / "store"))
    (checkpoint / "config.dump").write_text(json.dumps({"id": "ab" * 32, "name": "web"}))
    target, steps = tmp_path / "page.html", tmp_path / "steps.json"
    for words in (["push", str(checkpoint), "web:1"], ["pull", "web:1", str(tmp_path / "copy")]):
        done = CliRunner().invoke(main.cli, [*words, "--report", str(target), "--timeline", str(steps)])
        assert done.exit_code == 0, done.exception
        found = pages.check(target.read_text())
        assert (
            f"cryoci {words[0]}" in found.text and "server" in found.text and "largest first" in found.text
        )
        (step,) = [one for one in json.loads(steps.read_text())["steps"] if one["name"] == words[0]]
        assert step["bytes"] > 0
        target.unlink()
    done = CliRunner().invoke(main.cli, ["pull", "none:1", str(tmp_path / "x"), "--report", str(target)])
    assert done.exit_code != 0 and "Why it failed" in pages.check(target.read_text()).text


def test_areas_and_spans_in_one_pass() -> None:
    mapped = [Area(a, b, "rw-", "anonymous", False) for a, b in ((0, 10), (10, 20), (30, 40))]
    assert areas.stored(mapped, [(35, 50, 15), (5, 15, 10), (20, 25, 5)]) == [5, 5, 5]
    assert areas.stored(mapped, [(0, 40, 4)]) == [1, 1, 1] and areas.stored([], [(1, 2, 1)]) == []
    with pytest.raises(ImageError, match="overlap"):
        areas.stored(mapped, [(0, 10, 10), (9, 12, 3)])
    with pytest.raises(ImageError, match="overlap"):
        areas.stored([*mapped, Area(35, 45, "rw-", "anonymous", False)], [])


def test_the_page(checkpoint: Path) -> None:
    held = report.look(reference.DirectoryRef(checkpoint), node=NODE)
    found = pages.check(page(operation(), held, ""))
    ids = found.values("id")
    for name in ("warnings", "timeline", "sizes", "processes", "memory", "gpus", "node", "versions"):
        assert name in ids
    for words in ("server", "done, ", "410 kB out of band", "9.0", "0.90 s"):
        assert words in found.text, words
    assert "\u202e" not in found.text and "\x1b" not in found.text
    assert 'document.title="taken"' in found.text  # shown, not obeyed


def test_the_page_of_a_failure() -> None:
    failed = operation(error=f"it failed: {HOSTILE}", hint="repair it")
    found = pages.check(page(failed, None, "oci:x could not be looked at: gone"))
    assert "failed" in found.text and "repair it" in found.text and "failure" in found.values("id")
    assert "could not be looked at: gone" in found.text


@pytest.mark.parametrize(
    "name", ["cryoci-memory.json", "gpu.dump", "mm-1.img", "pagemap-1.img", "pstree.img"]
)
def test_damaged_parts_are_warnings(checkpoint: Path, name: str) -> None:
    (checkpoint / "checkpoint" / name).write_bytes(b"\0" * 40)
    held = report.look(reference.DirectoryRef(checkpoint))
    assert held.problems or held.report.problems
    assert "warnings" in pages.check(page(operation(), held, "")).values("id")


def test_many_processes_and_areas(tmp_path: Path) -> None:
    pids = range(1, 701)
    for pid in pids:
        made.process(tmp_path, pid, memory={0x10000 * i: b"x" for i in range(1, 4)}, name=f"worker{pid}")
    vmas = [message(f1=i << 16, f2=(i << 16) + 4096, f5=3, f6=0x22, f7=1) for i in range(1, 1001)]
    tree = image("pstree", *(message(f1=pid, f2=pid - 1, f5=[pid]) for pid in pids))
    made.write(
        tmp_path,
        mm_1=image("mm", message(f14=vmas)),
        pstree=tree,
        files=image("files"),
        fdinfo_2=image("fdinfo"),
        inventory=image("inventory", message(f1=2)),
    )
    source = page(operation(), report.look(reference.DirectoryRef(tmp_path)), "")
    found = pages.check(source)
    assert "200 more are not shown" in found.text and "636 more processes" in found.text
    assert len(source) < 2_000_000


def test_text_is_bounded_and_harmless() -> None:
    assert text("a" * 1000) == "a" * 399 + "\u2026" and text("\udc80\x00\n") == "\ufffd" * 3
    assert text('<&">') == "&lt;&amp;&quot;&gt;"


# -- the option


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    with stored(tmp_path, monkeypatch) as runtime:
        yield runtime


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="checkpoint and restore need root")


@root_only
def test_of_a_checkpoint_and_a_restore(live: LiveRuntime, tmp_path: Path) -> None:
    first, second = tmp_path / "dump.html", tmp_path / "restore.html"
    words = ["checkpoint", "web", "--report", str(first), "--timeline", str(tmp_path / "t.json")]
    done = CliRunner().invoke(main.cli, words)
    assert done.exit_code == 0, done.exception
    found = pages.check(first.read_text())
    assert "cryoci checkpoint web" in found.text and {"timeline", "sizes", "versions"} <= set(
        found.values("id")
    )
    assert "runc" in found.text and "metadata" in found.text and "freeze" in found.text
    assert first.stat().st_mode & 0o777 == 0o600 and json.loads((tmp_path / "t.json").read_text())["steps"]
    done = CliRunner().invoke(main.cli, ["restore", "web", "--detach", "--report", str(second)])
    assert done.exit_code == 0, done.exception
    found = pages.check(second.read_text())
    assert "restored as" in found.text and "fetch" in found.text
    assert list((tmp_path / "scratch").iterdir()) == []


@root_only
def test_of_a_failure(live: LiveRuntime, tmp_path: Path) -> None:
    live.wish(
        checkpoint={"status": 1, "log": "(00.1) Error (criu/files-reg.c:1): Can't lookup mount=1 for fd=3\n"}
    )
    target = tmp_path / "dump.html"
    done = CliRunner().invoke(main.cli, ["checkpoint", "web", "--report", str(target)])
    assert isinstance(done.exception, CryociError)
    found = pages.check(target.read_text())
    assert "failed" in found.text and text(done.exception.message)[:40] in target.read_text()
    assert live.status == "running"


@root_only
def test_bad_targets_are_refused_before_anything_is_done(live: LiveRuntime, tmp_path: Path) -> None:
    def error(*words: str) -> BaseException | None:
        return CliRunner().invoke(main.cli, words).exception

    assert isinstance(error("checkpoint", "web", "--report", "x.pdf"), UsageError)
    assert isinstance(error("checkpoint", "web", "--report", f"{tmp_path}/no/x.html"), NotFoundError)
    assert isinstance(error("inspect", "a", "b", "--report", "x.html"), UsageError)
    assert "checkpoint" not in live.verbs


@root_only
def test_a_report_that_cannot_be_written_fails_nothing(live: LiveRuntime, tmp_path: Path) -> None:
    (tmp_path / "taken.html").mkdir()
    done = CliRunner().invoke(main.cli, ["checkpoint", "web", "--report", str(tmp_path / "taken.html")])
    assert done.exit_code == 0, done.exception
    assert "no report" in done.output and live.status == "gone"


def test_of_an_image_alone(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.html"
    done = CliRunner().invoke(main.cli, ["inspect", str(checkpoint), "--report", str(target)])
    assert done.exit_code == 0, done.exception
    assert done.output == f"wrote {target}\n"
    assert "timeline" not in pages.check(target.read_text()).values("id")


# -- in a browser


class Tags(HTMLParser):
    """The tags of a document as the browser gives it back."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)


@pytest.mark.skipif(pages.browser() is None, reason="no Chromium on this host: apt-get install chromium")
def test_in_chromium(checkpoint: Path, tmp_path: Path) -> None:
    """It understands every tag as it was written, runs nothing, asks nobody, and is dark for who likes it dark."""
    source = page(operation(), report.look(reference.DirectoryRef(checkpoint), node=NODE), "")
    target = tmp_path / "report.html"
    target.write_text(source)
    browser = pages.Browser(pages.browser() or "", tmp_path)
    seen, network = browser.dom(target)
    assert Tags(seen).found == Tags(source).found
    assert "<title>taken" not in seen and "x.example" not in network
    dark, light = (pages.first_pixel(browser.picture(target, name)) for name in ("dark", "light"))
    assert max(dark) < 64 and min(light) > 192


def test_contents_are_kept_for_the_map() -> None:
    assert memory_map.keep("checkpoint/cryoci-memory.json") and memory_map.keep("config.dump")
    assert not memory_map.keep("checkpoint/pages-1.img") and not contents.is_description(
        "checkpoint/x-1.img"
    )
