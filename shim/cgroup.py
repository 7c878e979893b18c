# SPDX-License-Identifier: Apache-2.0
"""The cgroup of a container: all of its processes belong there, after a restore too.

CRIU is told to leave cgroups alone, for it would put processes where they were on the other node. runc then
starts CRIU inside the container's cgroup; crun moves only the first process there (src/libcrun/criu.c), and the
others stay in the caller's: no limit holds them, no freezer stops them, the next dump cannot seize them.
"""

import posix

_MOUNT = "/sys/fs/cgroup"


def tree(pid: int) -> list[int]:
    """`pid` and all its descendants that are alive now, parents first (proc_pid_task_children(5))."""
    found = [pid]
    for parent in found:  # grows while it is walked
        try:
            for thread in posix.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as f:
                    found += [int(child) for child in f.read().split()]
        except OSError:
            continue  # it has ended
    return found


def processes(pid: int) -> list[int]:
    """The processes in the cgroup of `pid` and below it; [] where there is no cgroup v2 of its own."""
    home = path_of(pid)
    if home is None:
        return []
    found: list[int] = []
    groups = [_MOUNT + home]
    for group in groups:  # grows while it is walked
        try:
            with open(f"{group}/cgroup.procs") as f:
                found += [int(line) for line in f]
            groups += [f"{group}/{name}" for name in posix.listdir(group) if _is_group(f"{group}/{name}")]
        except OSError:
            continue  # removed meanwhile
    return found


def populated(path: str | None) -> bool:
    """Is a thread alive in the cgroup or below it (cgroup-v2.rst, cgroup.events)? False where there is none.

    A process whose first thread is a zombie can have others that still give back its memory, and then its files.
    """
    return _has(path, "populated")


def frozen(path: str | None) -> bool:
    """Are all of its processes frozen, by its own freezer or one above? False where there is no such cgroup."""
    return _has(path, "frozen")


def _has(path: str | None, event: str) -> bool:
    try:
        with open(f"{_MOUNT}{path}/cgroup.events") as f:
            return f"{event} 1" in f.read()
    except OSError:
        return False


def memory_left(pid: int) -> int | None:
    """Bytes until the tightest memory limit above `pid`; None without a limit (cgroup-v2.rst, memory.max)."""
    path = path_of(pid)
    least: int | None = None
    while path:
        try:
            with open(f"{_MOUNT}{path}/memory.max") as f:
                limit = f.read().strip()
            if limit != "max":
                with open(f"{_MOUNT}{path}/memory.current") as f:
                    left = max(0, int(limit) - int(f.read()) + _cache(path))
                least = left if least is None else min(least, left)
        except OSError:
            pass  # no memory controller here
        path = path.rpartition("/")[0]
    return least


def _cache(path: str) -> int:
    """Bytes of page cache, which a limit makes go."""
    with open(f"{_MOUNT}{path}/memory.stat") as f:
        values = dict(line.split() for line in f)
    return int(values.get("active_file", 0)) + int(values.get("inactive_file", 0))


def _is_group(path: str) -> bool:
    return posix.access(path + "/cgroup.procs", posix.F_OK)


def gather(pid: int) -> int:
    """Move the descendants of `pid` that are outside of its cgroup into it; returns how many were moved.

    cgroup v2 only: 0 where there is none. Cgroups below that of `pid` count as inside. Raises OSError.
    """
    home = path_of(pid)
    if home is None:
        return 0
    moved = 0
    for _ in range(3):  # a stray that forks meanwhile leaves another stray
        strays = [one for one in tree(pid) if not _inside(path_of(one), home)]
        for stray in strays:
            try:
                with open(f"{_MOUNT}{home}/cgroup.procs", "w") as f:
                    f.write(str(stray))
                moved += 1
            except ProcessLookupError:
                continue
        if not strays:
            break
    return moved


def remove(path: str) -> None:
    """Remove the cgroup of a container that is gone, by its cgroupsPath. Never raises; one in use stays.

    Only cgroupfs paths: a scope of systemd's (SLICE:PREFIX:NAME) goes with its last process.
    """
    if path[:1] != "/" or "/../" in path + "/":
        return
    for directory in (f"{_MOUNT}{path}/container", _MOUNT + path):  # crun may have made the former (in pods)
        try:
            posix.rmdir(directory)
        except OSError:
            continue


def path_of(pid: int) -> str | None:
    """The cgroup v2 of a process, below /sys/fs/cgroup, by its name in this cgroup namespace; None without, and for
    the root."""
    try:
        with open(f"/proc/{pid}/cgroup") as f:
            for line in f:
                if line.startswith("0::/"):
                    path = line[3:].rstrip("\n")
                    return path if path != "/" and posix.access(_MOUNT + path, posix.F_OK) else None
    except OSError:
        pass
    return None


def _inside(path: str | None, home: str) -> bool:
    return path is None or path == home or path.startswith(home + "/")
