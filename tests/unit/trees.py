# SPDX-License-Identifier: Apache-2.0
"""What the tests of file systems share: a tree with one of everything, its picture, tars, mounts."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep, version 2


def acl(*entries: tuple[int, int, int]) -> bytes:
    """system.posix_acl_* as the kernel has it: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NAMED_USER = acl(
    (1, 6, 0xFFFFFFFF), (2, 4, 1234), (4, 4, 0xFFFFFFFF), (0x10, 4, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF)
)


def picture(top: Path) -> dict[bytes, tuple[object, ...]]:
    """All that counts of a tree: type, mode, owner, content or target, time, attributes, which names are one file."""
    seen: dict[bytes, tuple[object, ...]] = {}
    first: dict[int, bytes] = {}
    for directory, names, files in os.walk(os.fsencode(top)):
        for name in [b"", *names, *files] if directory == os.fsencode(top) else [*names, *files]:
            path = os.path.join(directory, name) if name else directory
            info = os.lstat(path)
            if stat.S_ISSOCK(info.st_mode):
                continue
            content: object = None
            if stat.S_ISREG(info.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            attributes = {
                a: os.getxattr(path, a, follow_symlinks=False)
                for a in os.listxattr(path, follow_symlinks=False)
                if not a.startswith(("trusted.", "security.selinux"))
            }
            one = first.setdefault(info.st_ino, path) if not stat.S_ISDIR(info.st_mode) else path
            seen[os.path.relpath(path, os.fsencode(top))] = (
                stat.S_IFMT(info.st_mode),
                stat.S_IMODE(info.st_mode),
                (info.st_uid, info.st_gid),
                content,
                info.st_mtime_ns // 1000_000,
                attributes,
                os.path.relpath(one, os.fsencode(top)),
            )
    return seen


def furnish(top: Path) -> None:
    """One of everything that a container's file system may hold."""
    (top / "etc").mkdir()
    (top / "etc/passwd").write_text("root:x:0:0\n")
    os.chown(top / "etc/passwd", 3000000, 70000)
    (top / "bin").mkdir()
    (top / "bin/su").write_bytes(b"\x7fELF")
    os.chown(top / "bin/su", 5, 6)
    (top / "bin/su").chmod(0o6755)
    (top / "bin/ping").write_bytes(b"ping")
    os.setxattr(top / "bin/ping", "security.capability", CAPABILITY)
    os.link(top / "bin/ping", top / "bin/ping6")
    os.setxattr(top / "bin/ping", "user.note", b"\x00\xff\n=1")
    (top / "absolute").symlink_to("/etc")
    (top / "dangling").symlink_to("nowhere/at/all")
    os.link(top / "dangling", top / "dangling-too", follow_symlinks=False)
    os.lchown(top / "dangling", 7, 8)
    os.mkfifo(top / "fifo", 0o640)
    with (top / "sparse").open("wb") as f:
        f.seek(8 << 20)
        f.write(b"end")
        f.truncate(16 << 20)
    (top / "shared").mkdir()
    (top / "shared/plain").write_text("no acl of its own")
    os.setxattr(top / "shared", "system.posix_acl_default", NAMED_USER)
    os.setxattr(top / "etc/passwd", "system.posix_acl_access", NAMED_USER)
    (top / "sticky").mkdir()
    (top / "sticky").chmod(0o1777)
    (top / "deep").joinpath(*["d" * 60] * 5).mkdir(parents=True)
    (top / "deep").joinpath(*["d" * 60] * 5, "leaf").write_text("leaf")
    (top / "-rf").write_text("dash")
    (top / "new\nline").write_text("newline")
    (top / " blank ").write_text("blank")
    (top / "gr\u00fc\u00df").write_text("utf-8")
    Path(os.fsdecode(os.fsencode(top) + b"/raw\xff\xfe")).write_text("not utf-8")
    os.mknod(top / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for path in [*top.rglob("*"), top]:
        os.utime(path, (1.5e9, 1.5e9 + 0.25), follow_symlinks=False)


def without_devices(seen: dict[bytes, tuple[object, ...]]) -> dict[bytes, tuple[object, ...]]:
    return {name: what for name, what in seen.items() if what[0] not in (stat.S_IFCHR, stat.S_IFBLK)}


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], end: bool = True) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in more.items():
        setattr(info, key, value)
    return info


class mounted:
    """A mount for the time of a with block."""

    def __init__(self, kind: str, at: Path, options: str) -> None:
        self.argv = ["mount", "-t", kind, "-o", options, kind, str(at)]
        self.at = at

    def __enter__(self) -> Path:
        made = subprocess.run(self.argv, capture_output=True)
        if made.returncode != 0:
            pytest.skip(f"this host does not mount {self.argv[2]}: {made.stderr.decode().strip()}")
        return self.at

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.at)], check=True)
