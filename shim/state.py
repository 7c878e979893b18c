# SPDX-License-Identifier: Apache-2.0
"""Atomic writes of small files, for the verbs that an engine waits for.

The same as `cryoci.files.write_atomic`, with `posix` alone: that module's imports cost `create` 10 ms.
"""

import posix

NO_SPACE = (28, 122)  # ENOSPC, EDQUOT


def make_directory(path: str) -> None:
    """Make `path` and its missing parents, private to this user. Raises OSError."""
    try:
        posix.mkdir(path, 0o700)
    except FileExistsError:
        if posix.stat(path).st_mode & 0o170000 != 0o040000:
            raise
    except FileNotFoundError:
        parent = path.rpartition("/")[0]
        if not parent:
            raise
        make_directory(parent)
        make_directory(path)


def write(path: str, data: bytes, *, like: str | None = None) -> None:
    """Replace `path` by `data`: write a sibling, fsync it, rename it, fsync the directory.

    Mode, owner and SELinux label are those of file `like`, else 0600, this user's and the default.
    Raises OSError; the old file is then untouched.
    """
    temporary = f"{path}.{posix.getpid()}.tmp"
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
    was = posix.stat(like) if like else None
    fd = posix.open(temporary, flags, 0o600)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[posix.write(fd, rest) :]
            if like and was:
                if (was.st_uid, was.st_gid) != (posix.geteuid(), posix.getegid()):
                    posix.fchown(fd, was.st_uid, was.st_gid)
                posix.fchmod(fd, was.st_mode & 0o7777)
                try:
                    posix.setxattr(fd, "security.selinux", posix.getxattr(like, "security.selinux"))
                except OSError:
                    pass  # no SELinux here
            posix.fsync(fd)
        finally:
            posix.close(fd)
        posix.rename(temporary, path)
    except BaseException:
        unlink(temporary)
        raise
    directory = posix.open(
        path.rpartition("/")[0] or ".", posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC
    )
    try:
        posix.fsync(directory)
    finally:
        posix.close(directory)


def unlink(path: str) -> None:
    """Remove a file if it is there and may be removed."""
    try:
        posix.unlink(path)
    except OSError:
        pass
