# SPDX-License-Identifier: Apache-2.0
"""Archives that lie in their headers, and what they are made with."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryoci.ociimage import tar
from tests.unit.criu_images import image, message

Members = list[tuple[tarfile.TarInfo, bytes]]
GOOD_NAME = "config.dump"
ESCAPE = "\x1b[31m"


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A tar member; `fields` are those of TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def pack(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of them."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form, errors="surrogateescape") as out:
        for info, data in members:
            out.addfile(info, io.BytesIO(data) if data else None)
    return packed.getvalue()


def raw(
    kind: bytes, name: bytes = b"config.dump", size: int = 0, link: bytes = b"", data: bytes = b""
) -> bytes:
    """A header that tarfile would not write, with its data."""
    block = bytearray(tar.header("x", 0))
    block[0:100] = name[:100].ljust(100, b"\0")
    block[124:136] = b"%011o\0" % size if size < 8 << 30 else b"\x80" + size.to_bytes(11, "big")
    block[156:157] = kind
    block[157:257] = link.ljust(100, b"\0")
    return seal(bytes(block)) + data + tar.padding(len(data))


def seal(block: bytes) -> bytes:
    """The header with a right checksum."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block[:512]) + block[156:]


def pax(**records: str) -> bytes:
    """A PAX header; dots of a key are written as two underscores."""
    body = b""
    for key, value in records.items():
        text = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(text) + 1
        while length != len(str(length)) + len(text):
            length = len(str(length)) + len(text)
        body += str(length).encode() + text
    return raw(b"x", b"pax", len(body), data=body)


CONFIG: dict[str, Any] = {
    "id": "ab" * 32,
    "name": "victim",
    "rootfsImageID": "cd" * 32,
    "rootfsImageName": "localhost/base:1",
    "runtime": "runc",
}
SPEC: dict[str, Any] = {"annotations": {"io.container.manager": "libpod"}, "mounts": [], "linux": {}}


def whole(**changes: bytes | None) -> dict[str, bytes]:
    """The files of a good small checkpoint; `changes` replace, add or remove (None), `/` written as `__`."""
    words = b"app\0A=" + ESCAPE.encode() + b"\0"
    folder = Path("checkpoint")
    files: dict[str, bytes] = {
        "config.dump": json.dumps(CONFIG).encode(),
        "spec.dump": json.dumps(SPEC).encode(),
        "rootfs-diff.tar": pack([member("etc/new", b"x")]),
        "deleted.files": b'["/old"]',
    }
    for name, data in _images(words).items():
        files[str(folder / name)] = data
    for name, change in changes.items():
        key = name.replace("__", "/").replace("DASH", "-").replace("DOT", ".")
        if change is None:
            files.pop(key)
        else:
            files[key] = change
    return files


def _images(words: bytes) -> dict[str, bytes]:
    page = words.ljust(4096, b"\0")
    return {
        "inventory.img": image("inventory", message(f1=2)),
        "pstree.img": image("pstree", message(f1=1, f2=0, f3=1, f4=1, f5=[1])),
        "core-1.img": image("core", message(f1=1, f3=message(f1=1, f6=f"n{ESCAPE}"), f4=message(f2=2))),
        "mm-1.img": image(
            "mm", message(f8=0x1000, f9=0x1004, f10=0x1004, f11=0x1010, f14=[message(f1=0x1000, f2=0x2000)])
        ),
        "pagemap-1.img": image("pagemap", message(f1=1), message(f1=0x1000, f2=1, f4=4)),
        "pages-1.img": page,
        "files.img": image("files", message(f1=1, f2=9, f3=message(f6=f"/{ESCAPE}"))),
        "fdinfo-2.img": image("fdinfo", message(f1=9, f3=1, f4=0)),
    }


def members_of(files: dict[str, bytes]) -> Members:
    """Them as tar members."""
    return [member(name, data) for name, data in sorted(files.items())]


def _tar(*more: tuple[tarfile.TarInfo, bytes]) -> Callable[[], bytes]:
    return lambda: pack([*members_of(whole()), *more])


def _raw(*more: bytes, end: bytes = tar.END) -> Callable[[], bytes]:
    return lambda: (
        pack(members_of(whole())).rstrip(b"\0").ljust(512, b"\0")[:0] + _open_end() + b"".join(more) + end
    )


def _open_end() -> bytes:
    """The good archive without its end, so that more can follow."""
    result = b""
    for name, data in sorted(whole().items()):
        result += tar.header(name, len(data)) + data + tar.padding(len(data))
    return result


def _zip_bomb() -> bytes:
    """64 MB that say so: small on the wire, and holes on the disk."""
    head = gzip.compress(_open_end() + tar.header("checkpoint/pages-9.img", 64 << 20))
    return head + gzip.compress(bytes(64 << 20)) + gzip.compress(tar.END)


S, L, D = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "dot-dot": _tar(member("../evil", b"x")),
    "dot-dot-inside": _tar(member("checkpoint/../../evil", b"x")),
    "dot-dot-folder": _tar(member("checkpoint/..", type=D)),
    "absolute": _tar(member("/etc/cron.d/evil", b"x")),
    "double-slash": _tar(member("checkpoint//evil", b"x")),
    "dots": _tar(member("././evil", b"x")),
    "backslashes": _tar(member("..\\..\\evil", b"x")),
    "deep": _tar(member("checkpoint/a/b", b"x")),
    "deep-folder": _tar(member("checkpoint/a", type=D)),
    "unknown": _tar(member("evil", b"x")),
    "hidden": _tar(member("checkpoint/.ssh", b"x")),
    "bad-volume": _tar(member("volumes/x.sh", b"x")),
    "volume-out": _tar(member("volumes/../x.tar", b"x")),
    "case": _tar(member("CONFIG.DUMP", b"x")),
    "case-folder": _tar(member("Checkpoint/x", b"x")),
    "unicode-dots": _tar(member("checkpoint/\u2025/evil", b"x")),
    "fullwidth-slash": _tar(member("checkpoint\uff0fevil", b"x")),
    "control": _tar(member(f"checkpoint/{ESCAPE}", b"x")),
    "newline": _tar(member("checkpoint/a\nb", b"x")),
    "not-utf-8": _tar(member("checkpoint/\udcff", b"x")),
    "long": _tar(member("checkpoint/" + "n" * 5000, b"x")),
    "empty-name": _raw(raw(b"0", b"")),
    "blank-name": _raw(raw(b"0", b" ")),
    "nul-in-pax-path": _raw(pax(path="a\0b"), raw(b"0")),
    "symlink": _tar(member("stats-dump", type=S, linkname="/etc/shadow")),
    "symlink-log": _tar(member("ctr.log", type=S, linkname="/etc/shadow")),
    "symlink-then-file": _tar(member("volumes", type=S, linkname="/tmp"), member("volumes/evil.tar", b"x")),
    "two-symlinks": _tar(member("s", type=S, linkname="."), member("t", type=S, linkname="s/..")),
    "parent-elsewhere": _tar(member("checkpoint/parent", type=S, linkname="/etc")),
    "parent-to-itself": _tar(member("checkpoint/parent", type=S, linkname="parent")),
    "parent-twice": _tar(*[member("checkpoint/parent", type=S, linkname="../pre-checkpoint")] * 2),
    "parent-without-target": _tar(member("checkpoint/parent", type=S, linkname="../pre-checkpoint")),
    "through-parent": _tar(
        member("checkpoint/parent", type=S, linkname="../pre-checkpoint"),
        member("checkpoint/parent/x", b"x"),
    ),
    "hardlink": _tar(member("stats-dump", type=L, linkname="config.dump")),
    "hardlink-out": _tar(member("stats-dump", type=L, linkname="/etc/passwd")),
    "hardlink-with-data": _raw(raw(b"1", size=600, link=b"spec.dump", data=b"x" * 600)),
    "character-device": _tar(member("stats-dump", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "block-device": _tar(member("stats-dump", type=tarfile.BLKTYPE, devmajor=8)),
    "fifo": _tar(member("stats-dump", type=tarfile.FIFOTYPE)),
    "setuid": lambda: pack([(_mode(i, 0o6777), d) for i, d in members_of(whole())]),
    "no-mode": lambda: pack([(_mode(i, 0), d) for i, d in members_of(whole())]),
    "folder-of-all-modes": _tar(member("volumes", type=D, mode=0o7777, uid=12345)),
    "capabilities": _raw(pax(SCHILY__xattr__security__capability="x"), raw(b"0", b"stats-dump")),
    "overlay-xattr": _raw(pax(SCHILY__xattr__trusted__overlay__opaque="y"), raw(b"0", b"stats-dump")),
    "acl": _raw(pax(SCHILY__acl__access="user::rwx"), raw(b"0", b"stats-dump")),
    "duplicate": _tar(member("config.dump", b"{}")),
    "duplicate-by-dot": _tar(member("./config.dump", b"{}")),
    "folder-then-file": _tar(member("volumes", type=D), member("volumes", b"x")),
    "pax-path-out": _raw(pax(path="../evil"), raw(b"0", b"stats-dump", 1, data=b"x")),
    "pax-size-lie": _raw(pax(size="99999999"), raw(b"0", b"stats-dump", 1, data=b"x")),
    "pax-size-negative": _raw(pax(size="-1"), raw(b"0", b"stats-dump", 1, data=b"x")),
    "pax-huge": _raw(raw(b"x", b"pax", 1 << 33)),
    "pax-flood": _raw(*[pax(comment="x" * 60000)] * 20, raw(b"0", b"stats-dump")),
    "pax-malformed": _raw(raw(b"x", b"pax", 9, data=b"99 path=a")),
    "pax-global-path": _raw(raw(b"g", b"pax", 18, data=b"18 path=../../evil\n"), raw(b"0", b"stats-dump")),
    "pax-then-end": _raw(pax(path="stats-dump")),
    "gnu-long-name-out": _raw(raw(b"L", b"././@LongLink", 10, data=b"../../evil"), raw(b"0")),
    "gnu-long-link": _raw(raw(b"K", b"././@LongLink", 11, data=b"/etc/shadow"), raw(b"2", b"stats-dump")),
    "gnu-sparse": _raw(raw(b"S", b"stats-dump")),
    "pax-sparse": _raw(pax(GNU__sparse__major="1", GNU__sparse__name="../evil"), raw(b"0", b"stats-dump")),
    "pax-sparse-size": _raw(pax(GNU__sparse__realsize=str(1 << 60)), raw(b"0", b"stats-dump")),
    "huge-size": _raw(raw(b"0", b"stats-dump", 1 << 49)),
    "absurd-size": _raw(raw(b"0", b"stats-dump", (1 << 80) - 1)),
    "negative-size": _raw(
        seal(raw(b"0", b"stats-dump")[:124] + b"-0000000001\0" + raw(b"0", b"stats-dump")[136:])
    ),
    "wrong-checksum": lambda: b"\1" + pack(members_of(whole()))[1:],
    "multi-volume": _raw(raw(b"M", b"stats-dump")),
    "volume-label": _raw(raw(b"V", b"label")),
    "unknown-type": _raw(raw(b"Z", b"stats-dump")),
    "contiguous": _raw(raw(b"7", b"stats-dump", 1, data=b"x")),
    "cut-in-header": lambda: pack(members_of(whole()))[:700],
    "cut-in-data": lambda: pack(members_of(whole()))[: 512 + 10],
    "no-end": _raw(end=b""),
    "behind-the-end": lambda: pack(members_of(whole())) + pack([member("../evil", b"x")]),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(10240),
    "gzip-bomb": _zip_bomb,
    "gzip-in-gzip": lambda: gzip.compress(gzip.compress(pack(members_of(whole())))),
    "gzip-cut": lambda: gzip.compress(pack(members_of(whole())))[:-20],
    "gzip-junk-behind": lambda: gzip.compress(pack(members_of(whole()))) + b"junk" * 9,
    "zstd-window": lambda: b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x01\x00\x00",
    "zstd-skippable-flood": lambda: struct.pack("<II", 0x184D2A50, 0) * 20000,
    "zstd-skippable-huge": lambda: struct.pack("<II", 0x184D2A50, 0xFFFFFFFF) + b"x",
    "zstd-reserved": lambda: b"\x28\xb5\x2f\xfd\x08" + bytes(20),
    "no-inventory": lambda: pack(members_of(whole(checkpoint__inventoryDOTimg=None))),
}


def _mode(info: tarfile.TarInfo, mode: int) -> tarfile.TarInfo:
    info.mode, info.uid, info.gid, info.uname = mode, 4242, 4242, "nobody"
    return info
