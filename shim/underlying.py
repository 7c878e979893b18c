# SPDX-License-Identifier: Apache-2.0
"""The real runtime below: find it, and become it.

Looked up in this order: the container's own record (it was created by that runtime, whatever the
configuration says now), config.toml through its cache, then the first of runc and crun on PATH.

This module is on the path of every call of the runtime: it imports only `posix`, `_signal` and `paths`.
"""

import _signal  # type: ignore[import-not-found]  # `signal` loads enum and re: 5 ms
import posix

from cryoci.shim import paths

DEFAULTS = ("runc", "crun")
SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEPTH = b"CRYOCI_DEPTH"
_DEEPEST = 4  # nvidia-container-runtime and its like may stand between; more is a circle

Stamp = tuple[int, int, int]


def stamp(path: str) -> Stamp | None:
    """(mtime in ns, size, inode) of a file, or None when there is none."""
    try:
        s = posix.stat(path)
    except OSError:
        return None
    return (s.st_mtime_ns, s.st_size, s.st_ino)


def is_program(path: str) -> bool:
    """Is `path` an executable regular file?"""
    try:
        return posix.stat(path).st_mode & 0o170000 == 0o100000 and posix.access(path, posix.X_OK)
    except OSError:
        return False


def is_self(path: str, launcher: str) -> bool:
    """Is `path` this very program, under whatever name?"""
    try:
        a, b = posix.stat(path), posix.stat(launcher)
    except OSError:
        return False
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def search(name: str, launcher: str) -> str | None:
    """First program `name` on PATH and the usual directories that is not cryoci-runtime itself."""
    for directory in (paths.environment("PATH", "") + ":" + SBIN).split(":"):
        path = f"{directory}/{name}"
        if directory[:1] == "/" and is_program(path) and not is_self(path, launcher):
            return path
    return None


def recorded(root: str | None, container: str | None, launcher: str) -> str | None:
    """The runtime that created this container, as its record says."""
    if container is None or not paths.valid_id(container):
        return None
    data = paths.read(paths.container_directory(root, container) + "/runtime", 4097)
    if not data:
        return None
    path = data.decode("utf-8", "surrogateescape").rstrip("\n")
    return path if path[:1] == "/" and is_program(path) and not is_self(path, launcher) else None


def cached() -> tuple[str, Stamp, str] | None:
    """config.cache as (runtime path, stamp of the config.toml it came from, rendered CRIU options)."""
    data = paths.read(paths.run_directory() + "/config.cache")
    if data is None:
        return None
    head, _, conf = data.decode("utf-8", "surrogateescape").partition("\n\n")
    lines = head.split("\n")
    try:
        title, numbers, runtime = lines
        mtime, size, inode = [int(n) for n in numbers.split()]
    except ValueError:
        return None
    return (runtime, (mtime, size, inode), conf) if title == "cryoci config 1" else None


def configured(launcher: str) -> str:
    """The runtime that config.toml names. Raises ConfigError or NotFoundError with the reason."""
    now = stamp(paths.config_file())
    if now is not None:
        cache = cached()
        if cache and cache[1] == now and is_program(cache[0]) and not is_self(cache[0], launcher):
            return cache[0]
    if now is not None or posix.access(paths.config_file(), posix.F_OK):
        from cryoci.shim import config

        return config.refresh(launcher)
    return default(launcher)


def default(launcher: str) -> str:
    """The first of runc and crun. Raises NotFoundError."""
    for name in DEFAULTS:
        path = search(name, launcher)
        if path is not None:
            return path
    from cryoci.errors import NotFoundError

    raise NotFoundError(
        f"no OCI runtime found: neither {' nor '.join(DEFAULTS)} is on PATH or in {SBIN}",
        hint=f"install runc or crun, or name one under [runtime] path in {paths.config_file()}",
    )


def lenient(launcher: str) -> str:
    """`configured`, but a broken config.toml falls back to its last good state, then to the default.

    For the verbs that must keep a node alive (state, start, kill, delete...).
    """
    try:
        return configured(launcher)
    except Exception:  # whatever is wrong with the configuration, the node's containers come first
        cache = cached()
        if cache and is_program(cache[0]) and not is_self(cache[0], launcher):
            return cache[0]
        return default(launcher)


def execute(path: str, argv: list[str]) -> None:
    """Become `path`, with the words, open files, signals and environment that this process was given.

    Does not return. Raises UnsupportedError when runtimes call each other in a circle, NotFoundError
    when `path` cannot be run.
    """
    variables = child_environment()
    reset_signals()
    try:
        posix.execve(path, [path, *argv[1:]], variables)
    except OSError as e:
        from cryoci.errors import NotFoundError

        raise NotFoundError(
            f"cannot run the OCI runtime {path}: {e.strerror}",
            hint=f"install it, or name another under [runtime] path in {paths.config_file()}",
        ) from e


def child_environment() -> dict[bytes, bytes]:
    """The environment for the runtime below: what this process was given, plus the depth of calls."""
    variables: dict[bytes, bytes] = dict(posix.environ)
    # Python sets LC_CTYPE in the C locale (PEP 538); containers' hooks must not see that.
    if variables.get(b"LC_CTYPE") == b"C.UTF-8":
        given = paths.read("/proc/self/environ", 1 << 22)
        if given is not None and b"LC_CTYPE" not in [word.partition(b"=")[0] for word in given.split(b"\0")]:
            del variables[b"LC_CTYPE"]
    try:
        depth = int(variables.get(_DEPTH, b"0"))
    except ValueError:
        depth = 0
    if depth >= _DEEPEST:
        from cryoci.errors import UnsupportedError

        raise UnsupportedError(
            f"cryoci-runtime was called by the runtime that it calls, {depth} times: they form a circle",
            hint=f"[runtime] path in {paths.config_file()} must name runc or crun, no wrapper of ours",
        )
    variables[_DEPTH] = b"%d" % (depth + 1)
    return variables


def reset_signals() -> None:
    """Undo what Python's start did: it ignores two signals, and a program inherits that."""
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_DFL)
