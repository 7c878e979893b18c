# SPDX-License-Identifier: Apache-2.0
"""A container as its engine knows it: its state, and the overlay that its rootfs is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.errors import ConflictError, NotFoundError, ToolError
from cryoci.shim import waiting
from cryoci.shim.engines import bare
from cryoci.shim.engines.container import Overlay, overlay_at
from cryoci.shim.record import Record
from tests.unit.live_runtime import LiveRuntime, running


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    with running(tmp_path, monkeypatch) as made:
        yield made


def line(where: str, options: str, kind: str = "overlay") -> str:
    return f"62 30 0:41 / {where} rw,relatime shared:9 - {kind} overlay {options}"


@pytest.mark.parametrize(
    ("options", "upper", "lowers"),
    [
        ("rw,lowerdir=/l,upperdir=/u,workdir=/w", "/u", ["/l"]),
        ("rw,lowerdir=/l2:/l1:/l0,upperdir=/u,workdir=/w", "/u", ["/l2", "/l1", "/l0"]),
        ("rw,lowerdir+=/l2,lowerdir+=/l1,upperdir=/u", "/u", ["/l2", "/l1"]),
        (r"rw,lowerdir=/a\134:b:/c,upperdir=/u", "/u", ["/a:b", "/c"]),
        (r"rw,lowerdir=/a\040b:/c\054d,upperdir=/u\075v", "/u=v", ["/a b", "/c,d"]),
        (r"rw,lowerdir=/l\043,upperdir=/u\134134", "/u134", ["/l#"]),
        ("rw,lowerdir=/l\udcff,upperdir=/u", "/u", ["/l\udcff"]),
        ("rw,index=off,lowerdir=/l,upperdir=/u,metacopy=on", "/u", ["/l"]),
    ],
)
def test_overlay(options: str, upper: str, lowers: list[str]) -> None:
    found = overlay_at(Path("/run/rootfs"), [line("/run/rootfs", options)])
    assert found == Overlay(Path(upper), tuple(map(Path, lowers)))


@pytest.mark.parametrize(
    "mountinfo",
    [
        [],
        ["", "x", "62 30 0:41 / /run/rootfs rw - overlay", line("/run/rootfs", "rw")],
        [line("/run/rootfs/x", "lowerdir=/l,upperdir=/u")],
        [line("/run/rootfs", "lowerdir=/l")],
        [line("/run/rootfs", "lowerdir=l/AB:l/CD,upperdir=/u")],
        [line("/run/rootfs", "lowerdir=/l,upperdir=CD/diff")],
        [line("/run/rootfs", "lowerdir=/l,upperdir=/u"), line("/run/rootfs", "rw", "tmpfs")],
    ],
    ids=["nothing", "damaged", "elsewhere", "read-only", "relative lower", "relative upper", "hidden"],
)
def test_no_overlay(mountinfo: list[str]) -> None:
    assert overlay_at(Path("/run/rootfs"), mountinfo) is None


def test_the_latest_mount_counts() -> None:
    lines = [line("/r", "lowerdir=/old,upperdir=/o"), line("/r", "lowerdir=/new,upperdir=/n")]
    assert overlay_at(Path("/r"), lines) == Overlay(Path("/n"), (Path("/new"),))


@given(st.lists(st.text() | st.from_regex(r"[ /\\:,=\-a0-7]{0,30}") | st.builds(line, st.text(), st.text())))
def test_any_mountinfo(lines: list[str]) -> None:
    found = overlay_at(Path("/"), lines)
    assert found is None or (found.upper.is_absolute() and all(p.is_absolute() for p in found.lowers))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_real_overlay_with_hard_names(tmp_path: Path) -> None:
    place = tmp_path / "a b,c"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)
    try:
        lower, upper, work, merged = (place / name for name in ("l:o\\w", "up er", "work", "me\trged"))
        for path in (lower, upper, work, merged):
            path.mkdir()
        escaped = [
            str(p).replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")
            for p in (lower, upper, work)
        ]
        options = "lowerdir={},upperdir={},workdir={}".format(*escaped)
        made = subprocess.run(
            ["mount", "-i", "-t", "overlay", "-o", options, "overlay", str(merged)], capture_output=True
        )
        if made.returncode != 0:
            pytest.skip(f"mount(8) of this host does not take such names: {made.stderr.decode().strip()}")
        try:
            assert overlay_at(merged) == Overlay(upper, (lower,))
        finally:
            subprocess.run(["umount", str(merged)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_state(live: LiveRuntime) -> None:
    container = live.container()
    assert container.status == "running"
    assert container.state()["id"] == "web"
    container.must_run()
    live.set_status("stopped")
    with pytest.raises(ConflictError, match="web is stopped") as caught:
        container.must_run()
    assert caught.value.hint == "start it first"
    live.set_status("gone")
    with pytest.raises(NotFoundError, match="container does not exist"):
        container.state()


def test_the_runtime_itself_is_asked_but_for_who_waits_for_its_start(live: LiveRuntime) -> None:
    """What `create` has restored is paused for its runtime, and created for cryoci-runtime."""
    container, record = live.container(), Record(None, "web")
    live.set_status("paused")
    with container.known():
        assert container.status == "paused"
        waiting.mark(record.directory, "image")
        assert container.status == "created"
        os.unlink(f"{record.directory}/{waiting.NAME}")
    assert container.status == "paused"
    assert not os.path.exists(record.directory)  # a question leaves none
    gone = live.container(runtime="/nonexistent")  # uninstalled: cryoci-runtime finds another
    assert gone.status == "paused"


def test_call_carries_what_was_said(live: LiveRuntime) -> None:
    live.wish(pause={"status": 3, "say": "no freezer"})
    with pytest.raises(ToolError, match="no freezer") as caught:
        live.container().call("pause")
    assert "launcher.py pause web" in caught.value.message
    assert live.container().call("pause", check=False).returncode == 3


def test_adoption_is_temporary(live: LiveRuntime) -> None:
    """cryoci-runtime learns for one call which runtime made the container; its own record is not touched."""
    container = live.container()
    record = Record(None, "web")
    with container.known():
        with container.known():
            assert os.path.exists(f"{record.directory}/runtime")
        assert os.path.exists(f"{record.directory}/runtime")
    assert not os.path.exists(record.directory)
    container.call("pause")
    assert not record.exists
    record.save("/usr/bin/runc", {}, "")
    with container.known():
        pass
    assert record.exists


def test_an_adoption_that_was_killed_is_taken_over(live: LiveRuntime) -> None:
    container, record = live.container(), Record(None, "web")
    record.save("/usr/bin/runc", {"adopted": True}, "")
    with container.known():
        assert record.exists
    assert not record.exists


_ADOPTER = """
import sys, threading
from cryoci.shim.engines.adopted import adopted
from cryoci.shim.record import Record
def many():
    for _ in range(40):
        with adopted(None, "web", "/usr/bin/runc", "/b"):
            found = Record(None, "web").load()
            if found is None or found.facts["runtime"] != "/usr/bin/runc":
                wrong.append(found)
wrong = []
threads = [threading.Thread(target=many) for _ in range(3)]
for one in threads: one.start()
for one in threads: one.join()
sys.exit(len(wrong))
"""


def test_who_adopts_a_container_at_once_shares_its_record(live: LiveRuntime) -> None:
    """Nobody finds it gone because another is done with it, and the last one removes it."""
    record = Record(None, "web")
    racers = [subprocess.Popen([sys.executable, "-c", _ADOPTER]) for _ in range(3)]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0]
    assert not os.path.exists(record.directory)


def test_bare_find(live: LiveRuntime, tmp_path: Path) -> None:
    found = bare.find("web", None)
    assert found is not None
    assert (found.engine, found.id, found.runtime) == ("runc", "web", str(live.program))
    assert found.rootfs == live.bundle / "rootfs"
    assert found.dumps["config.dump"] == {"id": "web", "name": "web", "runtime": "runc"}
    assert bare.find("../web", None) is None
    live.set_status("gone")
    assert bare.find("web", None) is None


def test_bare_find_without_a_bundle(live: LiveRuntime) -> None:
    (live.bundle / "config.json").unlink()
    with pytest.raises(NotFoundError, match="bundle of container web is gone"):
        bare.find("web", None)


def test_a_borrowed_container_keeps_its_journal(live: LiveRuntime) -> None:
    """What a plain runtime has made gets a record for each call; a journal of cryoci's own stays in between."""
    journal = Path(Record(None, "web").directory) / "gpu.json"
    journal.parent.mkdir(parents=True)
    journal.write_text("{}")
    assert live.container().status == "running"
    assert journal.read_text() == "{}" and not Record(None, "web").exists
