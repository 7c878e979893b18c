# SPDX-License-Identifier: Apache-2.0
"""Hostile archives: nothing outside the directory, nothing unexpected inside it, no endless growth."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryoci.errors import ImageError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd
from cryoci.ociimage import archive, extract, inflate, layers, parallel, tar


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def pack(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as out:
        for info, data in members:
            out.addfile(info, io.BytesIO(data) if data else None)
    return packed.getvalue()


def unpack(data: bytes, directory: Path, chunk: int = 1000) -> None:
    directory.mkdir(exist_ok=True)
    with extract.Extractor(directory) as extractor:
        extractor.extract(data[i : i + chunk] for i in range(0, len(data), chunk))


@pytest.fixture(params=[False, True], ids=["with-tarsafe", "alone"])
def big(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the archive counts as too large for tarsafe: our own rules must hold without it."""
    if request.param:
        monkeypatch.setattr(extract, "SMALL", -1)
    return bool(request.param)


ATTACKS: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
    "parent": [member("../evil", b"x")],
    "inner-parent": [member("checkpoint/../../evil", b"x")],
    "absolute": [member("/etc/evil", b"x")],
    "double-dot-slash": [member("././config.dump", b"x")],
    "deep": [member("checkpoint/a/b", b"x")],
    "unknown-name": [member("evil", b"x")],
    "unknown-folder": [member("evil", type=tarfile.DIRTYPE)],
    "dot-file": [member("checkpoint/.bashrc", b"x")],
    "whiteout": [member(".wh.config.dump")],
    "not-a-volume": [member("volumes/x.sh", b"x")],
    "empty-name": [member("checkpoint/", b"x")],
    "symlink": [member("config.dump", type=tarfile.SYMTYPE, linkname="/etc/shadow")],
    "symlink-folder": [
        member("checkpoint", type=tarfile.SYMTYPE, linkname="/tmp"),
        member("checkpoint/a", b"x"),
    ],
    "parent-elsewhere": [member("checkpoint/parent", type=tarfile.SYMTYPE, linkname="/etc")],
    "parent-as-file": [member("checkpoint/parent", b"x")],
    "two-symlinks": [
        member("s", type=tarfile.SYMTYPE, linkname="."),
        member("t", type=tarfile.SYMTYPE, linkname="s/.."),
        member("t/evil", b"x"),
    ],
    "hardlink": [
        member("config.dump", b"x"),
        member("spec.dump", type=tarfile.LNKTYPE, linkname="config.dump"),
    ],
    "hardlink-out": [member("config.dump", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
    "character-device": [member("config.dump", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "block-device": [member("config.dump", type=tarfile.BLKTYPE)],
    "fifo": [member("config.dump", type=tarfile.FIFOTYPE)],
    "duplicate": [member("config.dump", b"x"), member("config.dump", b"y")],
    "duplicate-by-dot": [member("config.dump", b"x"), member("./config.dump", b"y")],
    "file-for-folder": [member("checkpoint", b"x")],
    "control-characters": [member("checkpoint/a\x1b[31m", b"x")],
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused(name: str, tmp_path: Path, big: bool) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    with pytest.raises(ImageError):
        unpack(pack(*ATTACKS[name]), tmp_path / "victim/out")
    assert set(os.listdir(tmp_path)) == {"victim"} and set(os.listdir(victim)) == {"out"}
    assert not any(p.is_symlink() for p in victim.rglob("*"))


def test_modes_and_owners_are_ours(tmp_path: Path) -> None:
    unpack(pack(member("config.dump", b"x", mode=0o6777, uid=1000, gid=1000)), tmp_path / "out")
    info = (tmp_path / "out/config.dump").stat()
    assert stat.S_IMODE(info.st_mode) == 0o600 and info.st_uid == os.getuid()


def test_dialects(tmp_path: Path) -> None:
    name = "checkpoint/" + "n" * 200 + ".img"
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        unpack(
            pack(member("./", type=tarfile.DIRTYPE), member(name, b"data"), form=form),
            tmp_path / str(number),
        )
        assert (tmp_path / str(number) / name).read_bytes() == b"data"


def test_podmans_link_is_made_anew(tmp_path: Path, big: bool) -> None:
    link = member("checkpoint/parent", type=tarfile.SYMTYPE, linkname="../pre-checkpoint")
    unpack(pack(link), tmp_path / "out")
    assert os.readlink(tmp_path / "out/checkpoint/parent") == "../pre-checkpoint"


def test_zeros_become_holes(tmp_path: Path) -> None:
    data = bytes(8 << 20) + b"x" * 100 + bytes(8 << 20) + os.urandom(300_000) + bytes(5)
    unpack(pack(member("checkpoint/pages-1.img", data)), tmp_path / "out", chunk=777_777)
    file = tmp_path / "out/checkpoint/pages-1.img"
    assert file.read_bytes() == data and file.stat().st_blocks * 512 < 2 << 20


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1 << 20])
def test_truncation_is_seen_everywhere(size: int, tmp_path: Path) -> None:
    data = pack(member("config.dump", os.urandom(size)), member("spec.dump", b"y"))
    end = len(data.rstrip(b"\0"))
    for number, cut in enumerate({1, 100, 512, 513, 512 + size // 2, end // 2, end - 1}):
        with pytest.raises(ImageError):
            unpack(data[:cut], tmp_path / str(number))


def corrupt(data: bytes, offset: int, new: bytes) -> bytes:
    block = bytearray(data)
    block[offset : offset + len(new)] = new
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


@pytest.mark.parametrize(
    ("offset", "new"),
    [
        (124, b"77777777777\0"),
        (124, b"\x80" + b"\xff" * 11),
        (124, b"-0000000001\0"),
        (124, b"zzzzzzzzzzz\0"),
        (156, b"S"),
        (156, b"x"),
        (156, b"L"),
        (156, b"V"),
        (0, b"\xff\xfe"),
    ],
)
def test_headers_that_lie(offset: int, new: bytes, tmp_path: Path, big: bool) -> None:
    with pytest.raises(ImageError):
        unpack(corrupt(pack(member("config.dump", b"x" * 600)), offset, new), tmp_path / "out")


def test_wrong_checksum(tmp_path: Path) -> None:
    data = bytearray(pack(member("config.dump", b"x")))
    data[0] ^= 1
    with pytest.raises(ImageError, match="checksum"):
        unpack(bytes(data), tmp_path / "out")


def test_huge_pax_header_is_not_allocated(tmp_path: Path) -> None:
    head = tar.header("config.dump", 1)
    with pytest.raises(ImageError, match="extended header"):
        unpack(corrupt(corrupt(head, 124, b"77777777777\0"), 156, b"x") + bytes(1024), tmp_path / "out")


@given(st.binary(max_size=3000))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    try:
        entries = list(tar.Reader([data]))
    except ImageError:
        return
    assert not entries


@given(st.integers(0, 5000), st.integers(0, 255))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte(tmp_path: Path, where: int, value: int) -> None:
    data = bytearray(pack(member("config.dump", b"x" * 700), member("n" * 150), member("spec.dump", b"z")))
    data[where % len(data)] = value
    reader = tar.Reader([bytes(data)])
    try:
        for entry in reader:
            assert sum(len(piece) for piece in reader.data()) == entry.size
    except ImageError:
        pass


def open_all(data: bytes, limit: int = 1 << 30, chunk: int = 5000) -> bytes:
    def chunks() -> Iterator[bytes]:
        for i in range(0, len(data), chunk):
            yield data[i : i + chunk]

    with parallel.Threads("test", workers=2) as pool:
        return b"".join(inflate.inflate(inflate.ahead(chunks()), pool, limit=limit))


def frame(data: bytes) -> bytes:
    return layers.Compression().compressor()(memoryview(data))


def skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A51, len(data)) + data


FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "one": zstd.compress,
    "frames": lambda d: b"".join(frame(d[i : i + 70_000]) for i in range(0, len(d), 70_000)),
    "no-size": lambda d: (c := zstd.ZstdCompressor()).compress(d) + c.flush(),
    "checksum": lambda d: zstd.compress(d, options={zstd.CompressionParameter.checksum_flag: 1}),
    "skippable": lambda d: skippable(b"abc") + zstd.compress(d) + skippable(b""),
    "gzip": gzip.compress,
    "gzips": lambda d: gzip.compress(d[:999]) + gzip.compress(d[999:]),
    "plain": bytes,
}  # fmt: skip


@pytest.mark.parametrize("how", FRAMES)
@pytest.mark.parametrize(
    "content", [b"", b"x", os.urandom(300_000) + bytes(300_000), bytes(40 << 20)], ids=len
)
def test_every_codec(how: str, content: bytes) -> None:
    data = FRAMES[how](content)
    assert open_all(data, chunk=len(data) // 7 + 1) == content
    if content and how != "plain":
        for cut in (len(data) - 1, len(data) // 2):
            if how == "skippable" and cut == len(data) - 1:
                continue  # only the last, empty, skippable frame is cut
            with pytest.raises(ImageError):
                open_all(data[:cut])


@pytest.mark.parametrize("how", ["one", "frames", "no-size", "gzip"])
def test_bombs_stop_at_the_limit(how: str) -> None:
    data = FRAMES[how](bytes(60 << 20))
    assert len(data) < 100_000
    with pytest.raises(ImageError, match="more than the 1000000 bytes"):
        open_all(data, limit=1_000_000)


def test_frame_that_understates_its_size() -> None:
    # RLE blocks: 4 bytes make 128 KiB; the header promises 1 KiB in all
    head = b"\x28\xb5\x2f\xfd" + bytes([0b0110_0000]) + struct.pack("<H", 1024 - 256)
    block = struct.pack("<I", (131072 << 3 | 1 << 1))[:3] + b"\0"
    last = struct.pack("<I", (131072 << 3 | 1 << 1 | 1))[:3] + b"\0"
    with pytest.raises(ImageError):
        open_all(head + block * 1000 + last)


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_as_zstd(data: bytes, header: bool) -> None:
    try:
        open_all((b"\x28\xb5\x2f\xfd" if header else b"\x1f\x8b") + data, limit=1 << 20)
    except ImageError:
        pass


def test_names() -> None:
    for name in ("config.dump", "checkpoint/pages-1.img", "volumes/a_b.tar", "artifacts/x", "rootfs.tar"):
        assert archive.allowed(name)
    for name in (
        "",
        "x",
        "checkpoint",
        "checkpoint/",
        "checkpoint/a/b",
        "checkpoint/..",
        "volumes/a",
        "../config.dump",
    ):
        assert not archive.allowed(name)
