# SPDX-License-Identifier: Apache-2.0
"""Where the runtime keeps its small state: names of files and directories, and nothing else.

    /run/cryoci/config.cache                   what config.toml said last
    /run/cryoci/runtimes/PATH.json             what the underlying runtime at PATH is
    /run/cryoci/criu.json                      what criu is
    /var/lib/cryoci/bundles/ROOTKEY/ID/        bundle of a bare container that was restored
    /var/lib/cryoci/empty/                     what stands for a kubelet's mounts under podman
    /run/cryoci/containers/ROOTKEY/ID/         one container: runtime, record.json, criu.conf, *.log

This module is on the path of every call of the runtime: it imports only `posix`.
"""

import posix

_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
NAME_MAX = 255


def environment(name: str, default: str) -> str:
    """Value of an environment variable, or `default` when it is unset or empty."""
    value = posix.environ.get(name.encode())
    return value.decode("utf-8", "surrogateescape") if value else default


def run_directory() -> str:
    """State that lives until the next boot: $CRYOCI_RUN, else /run/cryoci."""
    return environment("CRYOCI_RUN", "/run/cryoci")


def config_file() -> str:
    """The configuration: $CRYOCI_CONFIG, else /etc/cryoci/config.toml."""
    return environment("CRYOCI_CONFIG", "/etc/cryoci/config.toml")


def valid_id(name: str | None) -> bool:
    """Is `name` a container id that may become a file name?

    runc's rule is `^[\\w+-\\.]+$` where `+-.` is a range and so lets "," in (libcontainer,
    factory_linux.go), less what changes a path when cleaned.
    """
    if not name or name in (".", "..") or len(name) > NAME_MAX:
        return False
    return all(letter in _SAFE or letter == "," for letter in name)


def quote(path: str) -> str:
    """`path` as one flat file name: "%" and "/" and all that is not plain become %XX of their bytes."""
    out = []
    for byte in path.encode("utf-8", "surrogateescape"):
        letter = chr(byte)
        out.append(letter if letter in _SAFE else f"%{byte:02X}")
    name = "".join(out)
    if len(name) > NAME_MAX:
        import hashlib

        return "sha256-" + hashlib.sha256(name.encode()).hexdigest()
    return name


def root_key(root: str | None) -> str:
    """Key of a runtime root: "default" without `--root`, else the absolute path, normalised and quoted.

    The roots that runc and crun use by default count as "default", so that a caller may spell them out.
    """
    if not root:
        return "default"
    root = absolute(root)
    parts: list[str] = []
    for part in root.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    path = "/" + "/".join(parts)
    return "default" if path in ("/run/runc", "/run/crun") else quote(path)


def container_directory(root: str | None, container: str) -> str:
    """The record's directory. `container` must be a `valid_id`."""
    return f"{run_directory()}/containers/{root_key(root)}/{container}"


def absolute(path: str) -> str:
    """`path` seen from the working directory."""
    return path if path[:1] == "/" else posix.getcwd() + "/" + path


def follow(path: str) -> str:
    """What a chain of symbolic links at the end of `path` leads to."""
    for _ in range(40):
        try:
            target = posix.readlink(path)
        except OSError:
            break
        path = target if target[:1] == "/" else path.rpartition("/")[0] + "/" + target
    return path


def bundle_directory(root: str | None, container: str) -> str:
    """The bundle that `cryoci restore` makes for a bare container. `container` must be a `valid_id`."""
    return f"{environment('CRYOCI_LIB', '/var/lib/cryoci')}/bundles/{root_key(root)}/{container}"


def chunks_directory(root: str | None, container: str) -> str:
    """Chunk files of the newest incremental image of a container. `container` must be a `valid_id`."""
    return f"{environment('CRYOCI_LIB', '/var/lib/cryoci')}/chunks/{root_key(root)}/{container}"


def empty_directory() -> str:
    """A directory that stays empty, for a mount of which only the place counts."""
    return environment("CRYOCI_LIB", "/var/lib/cryoci") + "/empty"


def read(path: str, limit: int = 1 << 20) -> bytes | None:
    """The bytes of a small file, or None when it cannot be read."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return None
    try:
        return posix.read(fd, limit)
    except OSError:
        return None
    finally:
        posix.close(fd)
