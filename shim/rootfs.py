# SPDX-License-Identifier: Apache-2.0
"""The file system of a container: what it changed, or all of it, as a tar; and back again.

Written with GNU tar (sparse files, hard links, extended attributes, ACLs), read back inside a chroot, so
that no link of a hostile archive or base image can lead out of the container's rootfs. The pair
rootfs-diff.tar + deleted.files is podman's and CRI-O's (checkpointctl lib/metadata.go); containerd's
rootfs-diff.tar is a gzipped layer whose whiteouts delete (image-spec layer.md), which is read too.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import stat
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from cryoci.command import describe, which
from cryoci.errors import ImageError, RestoreError, SpaceError, ToolError
from cryoci.shim.engines.container import Overlay

_XATTR = "SCHILY.xattr."
# What a container engine lets an image set; trusted.* belongs to the overlay, the rest to the node's LSM.
_XATTRS = ("security.capability", "user.", "system.posix_acl_access", "system.posix_acl_default")
_OVERLAY = "trusted.overlay."
_GZIP = b"\x1f\x8b"
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_DELETED_LIMIT = 64 << 20  # bytes of deleted.files


def save_diff(rootfs: Path, overlay: Overlay, mounts: Iterable[str], tar: Path, deleted: Path) -> int:
    """Write what the rw layer added or changed to `tar` and the names of what it removed to `deleted`.

    `rootfs` is where `overlay` is mounted; it is read only when the rw layer refers to lower layers (a
    directory renamed under redirect_dir, a file without data under metacopy). `mounts` are the container's
    mount destinations: what lies there is not the container's. Either file is left out when it would be
    empty. Returns the bytes of the tar. Raises ToolError, SpaceError.
    """
    hidden = _hidden(mounts)
    changed: list[str] = []
    removed: list[str] = []
    source = overlay.upper
    renamed: list[str] = []
    for name, info in _walk(overlay.upper, hidden):
        if any(name.startswith(directory + "/") for directory in renamed):
            continue
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
            removed.append(name)
            continue
        changed.append(name)
        marks = (
            _marks(overlay.upper / name) if stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode) else ()
        )
        if "metacopy" in marks or "redirect" in marks:
            source = rootfs
        if stat.S_ISDIR(info.st_mode) and "redirect" in marks:
            renamed.append(name)
            changed += [inner for inner, _ in _walk(rootfs, hidden, name)]
        if stat.S_ISDIR(info.st_mode) and ("opaque" in marks or "redirect" in marks):
            removed += _covered(rootfs if "redirect" in marks else overlay.upper, overlay, name)
    if removed:
        deleted.write_text(json.dumps(["/" + name for name in removed]))
    return _tar(source, tar, changed) if changed else 0


def save_all(rootfs: Path, mounts: Iterable[str], tar: Path) -> int:
    """Write the whole rootfs, less what other mounts hide, to `tar`; returns its bytes."""
    hidden = _hidden(mounts)
    return _tar(rootfs, tar, [".", *(name for name, _ in _walk(rootfs, hidden))])


def save_tree(directory: Path, tar: Path) -> int:
    """Write everything in `directory` (a volume, /dev/shm) to `tar`; returns its bytes."""
    return _tar(directory, tar, ["."], recurse=True)


def _hidden(mounts: Iterable[str]) -> frozenset[str]:
    return frozenset(
        name for mount in mounts if (name := os.path.normpath(mount).strip("/")) not in ("", ".")
    )


def _walk(top: Path, hidden: frozenset[str], start: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Every file below `top`/`start` in name order, directories before what they hold; sockets have no content."""
    pending = [start]
    while pending:
        directory = pending.pop()
        inner = []
        for entry in sorted(os.scandir(top / directory), key=lambda e: e.name):
            name = f"{directory}/{entry.name}" if directory else entry.name
            info = entry.stat(follow_symlinks=False)
            if name in hidden or stat.S_ISSOCK(info.st_mode):
                continue
            yield name, info
            if stat.S_ISDIR(info.st_mode):
                inner.append(name)
        pending += reversed(inner)


def _marks(path: Path) -> tuple[str, ...]:
    """What overlayfs noted on a file of the rw layer: opaque, redirect, metacopy... (overlayfs.rst)."""
    names = (name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(_OVERLAY))
    marks = tuple(name.removeprefix(_OVERLAY) for name in names)
    if "opaque" in marks and os.getxattr(path, _OVERLAY + "opaque", follow_symlinks=False) != b"y":
        return tuple(mark for mark in marks if mark != "opaque")
    return marks


def _covered(top: Path, overlay: Overlay, directory: str) -> list[str]:
    """What a directory that stands for itself hides: names in the lower layers that `top` does not have."""
    gone: list[str] = []
    names: set[str] = set()
    for lower in overlay.lowers:
        place = os.fspath(lower)
        for part in directory.split("/"):
            place += "/" + part
            if not _is_directory(place):
                break  # a file or a link of that layer, which must not lead out of it
        else:
            names.update(os.listdir(place))
    for name in sorted(names):
        path = f"{directory}/{name}"
        try:
            info = os.lstat(top / path)
        except FileNotFoundError:
            gone.append(path)
            continue
        if stat.S_ISDIR(info.st_mode):
            gone += _covered(top, overlay, path)
    return gone


def _tar(top: Path, tar: Path, names: Sequence[str], *, recurse: bool = False) -> int:
    argv = [
        which("tar"),
        "--create",
        f"--file={tar}",
        f"--directory={top}",
        "--format=posix",
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--numeric-owner",
        "--sparse",
        "--acls",
        "--xattrs",
        "--xattrs-include=*",
        "--xattrs-exclude=trusted.*",
        "--no-recursion",
        "--null",
        "--verbatim-files-from",
        "--files-from=-",
    ]
    if recurse:
        argv.remove("--no-recursion")
    listing = b"".join(os.fsencode(name) + b"\0" for name in names)
    # status 1: a file changed while it was read; a frozen container's files do not, its volume's may
    result = subprocess.run(argv, input=listing, capture_output=True, env={**os.environ, "LC_ALL": "C"})
    if result.returncode > 1:
        if b"No space left on device" in result.stderr or b": Wrote only " in result.stderr:
            raise SpaceError(
                f"no space left for {tar}", hint="free space there, or give another directory with -o"
            )
        raise ToolError(describe(argv, result))
    return tar.stat().st_size


def apply(rootfs: Path, tar: Path | None, deleted: Path | None = None) -> None:
    """Extract `tar` into `rootfs`, then remove the names that `deleted` lists.

    In a gzipped `tar`, a layer, entries `.wh.NAME` remove NAME, and `.wh..wh..opq` what its directory had before.
    Both are untrusted: a child process does it after chroot(2) into `rootfs`. Devices are not made.
    Raises RestoreError, ImageError.
    """
    names = _deleted_names(deleted)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as said, _opened(tar) as source:
        pid = os.fork()
        if pid == 0:
            _apply_and_exit(rootfs, source, names, writer)
        os.close(writer)
        try:
            message = said.read(4096).decode(errors="replace")
        except BaseException:
            os.kill(pid, signal.SIGKILL)  # nobody may write there while the caller clears up
            raise
        finally:
            _, status = os.waitpid(pid, 0)
    if status != 0:
        raise RestoreError(
            f"the container's file system could not be written to {rootfs}: {message or 'the writer died'}",
            hint="see the space on that file system; a damaged archive shows in `cryoci inspect`",
        )


def _deleted_names(deleted: Path | None) -> list[str]:
    if deleted is None:
        return []
    if deleted.stat().st_size > _DELETED_LIMIT:
        raise ImageError(f"deleted.files is larger than {_DELETED_LIMIT >> 20} MiB")
    try:
        names = json.loads(deleted.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ImageError(f"deleted.files is not JSON: {e}") from e
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_name(name) for name in names):
        raise ImageError("deleted.files is not a list of paths")
    return [name for raw in names if (name := os.path.normpath("/" + raw).lstrip("/"))]


def _is_name(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _opened(tar: Path | None) -> IO[bytes]:
    fd = os.open(os.devnull if tar is None else tar, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return os.fdopen(fd, "rb")


def _apply_and_exit(rootfs: Path, source: IO[bytes], names: Sequence[str], writer: int) -> None:
    """In the child: everything it needs is loaded, for there is no Python inside the chroot."""
    try:
        os.chroot(rootfs)
        os.chdir("/")
        os.umask(0)
        if os.fstat(source.fileno()).st_size > 0:
            layer = source.read(2) == _GZIP
            source.seek(0)
            content: IO[bytes] = gzip.GzipFile(fileobj=source) if layer else source  # type: ignore[assignment]
            with tarfile.open(
                fileobj=content, mode="r:", encoding="utf-8", errors="surrogateescape", errorlevel=2
            ) as archive:
                _extract(archive, layer=layer)
                _must_end(content, archive)
        for name in names:
            _remove(name)
        os._exit(0)
    except BaseException as e:
        os.write(writer, f"{type(e).__name__}: {e}".encode(errors="replace")[:4000])
        os._exit(1)


def _extract(archive: tarfile.TarFile, *, layer: bool) -> None:
    # The chroot is the boundary, and a container may hold any owner, mode and link: no filter of tarfile's.
    # Set as an attribute: Debian 12's Python 3.11.2 knows no such argument.
    archive.extraction_filter = lambda member, path: member
    directories: dict[str, tarfile.TarInfo] = {}  # the last word on each
    devices: set[str] = set()  # left out, with every name they have
    made: set[str] = set()  # by this archive, and the directories that these lie in
    for member in archive:
        member.name = os.path.normpath("/" + member.name).lstrip("/") or "."
        if layer and os.path.basename(member.name).startswith(_WHITEOUT):
            _white_out(member.name, made)
            continue
        if layer:
            _note(member.name, made)
        if member.islnk():
            member.linkname = os.path.normpath("/" + member.linkname).lstrip("/")
        if (member.isdev() and not member.isfifo()) or (member.islnk() and member.linkname in devices):
            devices.add(member.name)
            continue
        if member.isdir():
            directories[member.name] = member
        elif member.name == ".":
            raise tarfile.ExtractError("the root directory of the archive is not a directory")
        if member.name != "." and not (member.isdir() and _is_directory(member.name)):
            _remove(member.name)
            os.makedirs(os.path.dirname(member.name) or ".", exist_ok=True)
        if member.islnk():  # not by tarfile, which makes a second file where the link's target is a link
            os.link(member.linkname, member.name, follow_symlinks=False)
            continue
        archive.extract(member, "", set_attrs=not member.isdir(), numeric_owner=True)
        if member.issym():
            os.utime(member.name, (member.mtime, member.mtime), follow_symlinks=False)
        if not member.isdir():
            _set_xattrs(member)
    for member in reversed(
        directories.values()
    ):  # last: making the files inside changes times, and inherits ACLs
        if not _is_directory(member.name):
            continue  # a later member took its place
        os.chown(member.name, member.uid, member.gid)
        os.chmod(member.name, member.mode)
        _set_xattrs(member)
        os.utime(member.name, (member.mtime, member.mtime))


def _white_out(name: str, made: set[str]) -> None:
    """Remove what a whiteout names, unless its own layer has made it: layers need not have their entries in order."""
    folder, _, base = name.rpartition("/")
    where = os.path.normpath(folder or ".")
    if base == _OPAQUE:
        inner = [
            f"{folder}/{one}" if folder else one
            for one in (os.listdir(where) if _is_directory(where) else ())
        ]
    else:
        inner = [f"{folder}/{base.removeprefix(_WHITEOUT)}".lstrip("/")]
    for one in inner:
        if os.path.basename(one) not in ("", ".", ".."):
            _remove_below(one, made)


def _remove_below(name: str, made: set[str]) -> None:
    if name not in made:
        _remove(name)
    elif _is_directory(name):
        for inner in os.listdir(name):
            _remove_below(f"{name}/{inner}", made)


def _note(name: str, made: set[str]) -> None:
    while name and name not in made:
        made.add(name)
        name = name.rpartition("/")[0]


def _must_end(source: IO[bytes], archive: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end of an archive; the real end is a block of zeros."""
    source.seek(archive.offset)
    if source.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"the archive is damaged or cut off at byte {archive.offset}")


def _is_directory(name: str) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(name).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _set_xattrs(member: tarfile.TarInfo) -> None:
    for key, value in member.pax_headers.items():
        name = key.removeprefix(_XATTR)
        if name == key or not name.startswith(_XATTRS):
            continue
        try:
            os.setxattr(member.name, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise


def _remove(name: str) -> None:
    """Remove a file or a whole directory; symbolic links are not followed; absent is fine."""
    try:
        info = os.lstat(name)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(info.st_mode):
        os.unlink(name)
        return
    for inner in os.listdir(name):
        _remove(f"{name}/{inner}")
    os.rmdir(name)
