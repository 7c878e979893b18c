# SPDX-License-Identifier: Apache-2.0
"""CRIU's images and protocol buffers: read right, and refused when they are damaged."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.errors import CryociError, ImageError, NotFoundError, UsageError
from cryoci.ociimage.criu import memory, processes
from cryoci.ociimage.criu.image import DirectoryImages, messages
from cryoci.protobuf import Message
from tests.unit.criu_images import image, message, number, process, write


def test_fields() -> None:
    data = message(f1=7, f2="text", f3=[1, 300], f4=[message(f1=1), message(f1=2)])
    data += number(6 << 3 | 2) + number(3) + number(1) + number(300)  # packed
    data += number(7 << 3 | 1) + bytes(8) + number(8 << 3 | 5) + b"\x01\0\0\0"
    found = Message(data)
    assert (found.number(1), found.text(2), found.numbers(3)) == (7, "text", [1, 300])
    assert [m.number(1) for m in found.messages(4)] == [1, 2]
    assert found.numbers(6) == [1, 300] and found.number(7) == 0 and found.number(8) == 1
    assert found.number(99, 5) == 5 and found.data(99) == b"" and 99 not in found
    with pytest.raises(ImageError):
        found.number(2)
    with pytest.raises(ImageError):
        found.data(1)
    with pytest.raises(ImageError):
        found.messages(1)


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",
        b"\xff" * 20,
        b"\x0a\xff\xff\xff\xff\xff\x7f",
        b"\x0a\x05abc",
        b"\x0b",
        b"\x0f",
        b"\x00\x01",
        b"\x09\0\0",
    ],
)
def test_damaged_messages(data: bytes) -> None:
    with pytest.raises(ImageError):
        Message(data)


@given(st.binary(max_size=200))
def test_any_message(data: bytes) -> None:
    try:
        found = Message(data)
        for i in range(20):
            found.numbers(i)
            found.messages(i)
    except ImageError:
        pass


def test_framing() -> None:
    good = image("pstree", message(f1=1), message(f1=2))
    assert [m.number(1) for m in messages(good, "pstree", "x")] == [1, 2]
    for bad in (b"", good[:4], b"\0" * 8 + good[8:], good[:-1], good + b"\1", good + b"\xff\xff\xff\xff"):
        with pytest.raises(ImageError):
            list(messages(bad, "pstree", "x"))
    with pytest.raises(ImageError, match="kind core"):
        list(messages(good, "core", "x"))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Process 1 with a child 2: a file, a listening socket, two unix sockets and a pipe."""
    process(
        tmp_path,
        1,
        memory={0x10000: b"hello secret", 0x40000: b"\0run\0me\0A=1\0"},
        words=(0x40001, 0x40008, 0x40008, 0x4000C),
    )
    process(tmp_path, 2, name="child")
    inet = message(
        f2=20, f3=2, f4=1, f5=6, f6=10, f7=80, f8=0, f11=[0x0100007F], f12=[0], f14=message(f1=1, f2=2)
    )
    six = message(
        f2=21, f3=10, f4=1, f5=6, f6=1, f7=81, f8=9, f11=[0, 0, 0, 0x01000000], f12=[0, 0, 0, 0x01000000]
    )
    unix = message(f2=30, f3=1, f4=1, f8=31, f11=b"\0abstract")
    other = message(f2=31, f3=1, f4=1, f8=30, f11=b"/run/s\0")
    files = [
        message(f1=1, f2=7, f3=message(f6="/bin/app", f10=0o100755)),
        message(f1=1, f2=8, f3=message(f6="/work")),
        message(f1=1, f2=9, f3=message(f6="/", f10=0o040755)),
        message(f1=1, f2=10, f3=message(f6="/log", f3=42)),
        message(f1=4, f2=11, f4=inet),
        message(f1=4, f2=12, f4=six),
        message(f1=5, f2=13, f16=unix),
        message(f1=5, f2=14, f16=other),
        message(f1=2, f2=15, f18=message(f1=15, f2=77)),
    ]
    kinds = {10: 1, 11: 4, 12: 4, 13: 5, 14: 5, 15: 2, 99: 42}
    infos = [message(f1=i, f3=kind, f4=n) for n, (i, kind) in enumerate(kinds.items())]
    return write(
        tmp_path,
        pstree=image("pstree", message(f1=1, f2=0, f3=1, f4=1, f5=[1, 3]), message(f1=2, f2=1, f5=[2])),
        files=image("files", *files),
        fdinfo_2=image("fdinfo", *infos),
        mountpoints_1=image("mountpoints", message(f1=5, f2=1, f4=0, f7="./data", f8="tmpfs", f9="", f13=1)),
        utsns_1=image("utsns", message(f1="host")),
        inventory=image("inventory", message(f1=2)),
    )


def test_processes(two: Path) -> None:
    images = DirectoryImages(two)
    first, second = processes.read(images)
    assert (first.pid, first.name, first.threads, first.state) == (1, "app", (1, 3), "running")
    assert (first.uid, first.gid, first.capabilities, first.machine) == (1000, 100, 1 << 32 | 0x20, "x86_64")
    assert (first.program, first.directory, first.root, first.root_mode) == (
        "/bin/app",
        "/work",
        "/",
        0o040755,
    )
    assert first.memory.stored == 8192 and first.memory.virtual == 8192 and first.memory.heap == 0x2000
    assert first.cpu == ("avx",) and second.parent == 1 and second.name == "child"
    whats = [(f.fd, f.kind, f.what) for f in first.files]
    assert whats == [
        (0, "file", "/log"),
        (1, "inet socket", "tcp 127.0.0.1:80 -> 0.0.0.0:0"),
        (2, "inet socket", "tcp6 [::1]:81 -> [::1]:9"),
        (3, "unix socket", "@abstract"),
        (4, "unix socket", "/run/s"),
        (5, "pipe", "pipe:[77]"),
        (6, "type 42", ""),
    ]
    assert first.files[0].position == 42
    assert [(s.protocol, s.state, s.source, s.destination) for s in first.sockets] == [
        ("tcp", "listen", "127.0.0.1:80", "0.0.0.0:0"),
        ("tcp6", "established", "[::1]:81", "[::1]:9"),
        ("unix stream", "established", "@abstract", "/run/s"),
        ("unix stream", "established", "/run/s", "@abstract"),
    ]
    assert [(p, [c.pid for c in cs]) for p, cs in processes.children([first, second]).items()] == [
        (0, [1]),
        (1, [2]),
    ]
    (mount,) = processes.mounts(images)
    assert (mount.place, mount.type, mount.external) == ("/data", "tmpfs", True)
    assert processes.hostname(images) == "host" and processes.statistics(images) is None


def test_memory(two: Path) -> None:
    held = memory.Memory(two, DirectoryImages(two), 1)
    assert held.read(0x10000, 0x10005) == b"hello" and held.read(0x50000, 0x50003) == b"\0\0\0"
    assert (
        held.read(*held.layout.arguments) == b"run\0me\0" and held.read(*held.layout.environment) == b"A=1\0"
    )
    (match,) = held.find(re.compile(b"secret"), context=6, overlap=4096)
    assert (match.address, match.before, match.found, match.area) == (0x10006, b"hello ", b"secret", "heap")
    with pytest.raises(NotFoundError):
        memory.Memory(two, DirectoryImages(two), 9)
    os.truncate(two / "checkpoint/pages-1.img", 100)
    with pytest.raises(ImageError, match="cut off"):
        list(held.pieces())


def test_matches_across_pieces_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PIECE", 4096)
    data = b"x" * 4090 + b"NEEDLENEEDLE" + b"y" * 4090
    process(tmp_path, memory={0x10000: data, 0x13000: b"zNEEDLE", 0x90000: b"EDLE"})
    held = memory.Memory(tmp_path, DirectoryImages(tmp_path), 1)
    found = [m.address for m in held.find(re.compile(b"NEEDLE"), context=0, overlap=64)]
    assert found == [0x10000 + 4090, 0x10000 + 4096, 0x13001]
    texts = [m.found for m in held.find(re.compile(rb"[a-zA-Z]{6,64}"), context=0, overlap=64)]
    assert b"".join(texts) == data + b"zNEEDLE"  # long texts come in parts, none is lost


def test_pages_of_the_parent(tmp_path: Path) -> None:
    process(tmp_path, memory={0x10000: b"new"})
    (tmp_path / "pre-checkpoint").mkdir()
    older = image("pagemap", message(f1=5), message(f1=0x20000, f2=1, f4=4), message(f1=0x30000, f2=4, f4=4))
    (tmp_path / "pre-checkpoint/pagemap-1.img").write_bytes(older)
    (tmp_path / "pre-checkpoint/pages-5.img").write_bytes(
        b"A" * 4096 + b"".join(bytes([c]) * 4096 for c in b"BCDE")
    )
    newer = image(
        "pagemap", message(f1=1), message(f1=0x10000, f2=1, f4=4), message(f1=0x31000, f2=2, f3=1, f4=1)
    )
    write(tmp_path, pagemap_1=newer)
    held = memory.Memory(tmp_path, DirectoryImages(tmp_path), 1)
    assert [(run.start, run.count) for run in held.runs] == [(0x10000, 1), (0x31000, 2)]
    assert held.read(0x31000, 0x31002) == b"CC" and held.read(0x20000, 0x20001) == b"\0"


def test_lies(two: Path) -> None:
    lies = {
        "pagemap_1": image("pagemap", message(f1=1), message(f1=0x10001, f2=1, f4=4)),
        "pagemap_2": image("pagemap", message(f1=1), message(f1=1 << 63, f5=1 << 60, f4=4)),
        "mm_1": image("mm", message(f14=[message(f1=9, f2=1)])),
        "pstree": image("pstree", message(f1=1), message(f1=1)),
    }
    for name, data in lies.items():
        path = two / "checkpoint" / f"{name.replace('_', '-')}.img"
        before = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(ImageError):
            processes.read(DirectoryImages(two))
        path.write_bytes(before)


def test_any_bytes_in_any_image(two: Path) -> None:
    rounds = 0

    @given(
        st.sampled_from(sorted(p.name for p in (two / "checkpoint").iterdir())),
        st.integers(0, 400),
        st.binary(max_size=8),
    )
    def one(name: str, at: int, junk: bytes) -> None:
        nonlocal rounds
        rounds += 1
        path = two / "checkpoint" / name
        before = path.read_bytes()
        path.write_bytes(before[:at] + junk + before[at + len(junk) :])
        try:
            images = DirectoryImages(two)
            processes.read(images)
            processes.mounts(images)
            list(memory.Memory(two, images, 1).pieces())
        except CryociError:
            pass
        finally:
            path.write_bytes(before)

    one()
    assert rounds >= 100


def test_ranges() -> None:
    assert memory.parse_range("7f00-7f10") == (0x7F00, 0x7F10) == memory.parse_range("0x7f00+16")
    for bad in ("", "x", "10-10", "20-10", "0-1ffffffffffffffff", "-5"):
        with pytest.raises(UsageError):
            memory.parse_range(bad)
