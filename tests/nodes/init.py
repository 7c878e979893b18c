# SPDX-License-Identifier: Apache-2.0
"""The supervisor of one namespace node, run as `python3 -IS init.py < SPEC`; standard library only.

    harness -> supervisor (host namespaces, outside the node's cgroup)
                 -> builder (joins the cgroup, unshares) -> pid 1 of the node (mounts, pivot_root, reaper)

The first line of stdin is the node's JSON; then stdin stays open for as long as the harness lives. The
supervisor answers one JSON line, {"pid": N} or {"error": text}. When stdin closes (the harness closed the
node, or died of anything, SIGKILL included) or pid 1 dies, it kills what is left in the node's cgroup,
removes it, and ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import stat
import sys
import time
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE, MS_BIND = 2, 4, 8, 0x4000, 1 << 18, 0x1000
MS_RDONLY, MS_REMOUNT = 1, 32
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MNT_DETACH = 2

# pid 1 is the tree's own python, so that nothing of the host stays mapped. It reaps orphans until it is
# killed.
REAPER = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
while True:
    signal.sigwait({signal.SIGCHLD})
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""
DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
}
# Runtime state that must not be on overlayfs: an engine's overlay cannot have overlayfs as its upper
# directory.
PLAIN = ("/var/lib/containers", "/var/lib/containerd", "/srv")

Spec = dict[str, Any]
libc: Any = ctypes.CDLL(None, use_errno=True)


def call(what: str, result: int) -> None:
    """Raise OSError with errno when a libc call failed; `what` names it."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    raw = [None if a is None else a.encode() for a in (source, target, kind)]
    call(f"mount {kind or 'bind'} on {target}", libc.mount(*raw, ctypes.c_ulong(flags), options.encode()))


def write(path: str, text: str) -> None:
    with open(path, "w") as f:
        f.write(text)


def main() -> None:
    spec = json.loads(read_line(0))
    groups = [spec["cgroup"], os.path.join(spec["cgroup"], "init")]
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid = 0
    try:
        for group in groups:
            os.makedirs(group, exist_ok=True)
        pid = start_program(spec) if "argv" in spec else spawn(spec)
        answer: dict[str, Any] = {"pid": pid}
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {e}"}
    if pid:
        os.write(1, json.dumps(answer).encode() + b"\n")
        fd = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(0, select.POLLIN | select.POLLHUP)
        poll.poll()
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    remove_cgroup(groups[0])
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    if not pid:
        os.write(1, json.dumps(answer).encode() + b"\n")


def read_line(fd: int) -> bytes:
    """One line, and not a byte more: the rest of stdin is the harness' life line."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(fd, 1)
        if not piece:
            sys.exit("no spec on stdin")
        line += piece
    return line


def spawn(spec: Spec) -> int:
    """Start the node's pid 1 and return its pid here. Raises RuntimeError with the step that failed."""
    report, said = os.pipe()
    parted, hold = os.pipe()
    builder = os.fork()
    if builder == 0:
        try:
            os.close(report)
            os.close(hold)
            build(spec, said, parted)
        except BaseException as e:
            os.write(said, f"!{type(e).__name__}: {e}".encode())
        os._exit(0)
    os.close(said)
    os.close(parted)
    os.waitpid(builder, 0)
    os.close(
        hold
    )  # now the supervisor is the parent of pid 1, which waits for this to ask for a death signal
    text = b""
    while piece := os.read(report, 4096):
        text += piece
    os.close(report)
    words = text.decode().partition("!")
    if words[1] or not words[0]:
        raise RuntimeError(words[2] or "the node's pid 1 died while it was made")
    return int(words[0])


def start_program(spec: Spec) -> int:
    """Start a program (a virtual machine) in the cgroup and a network namespace; return its pid."""
    report, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            write(os.path.join(spec["cgroup"], "init", "cgroup.procs"), "0")
            netns = os.open(spec["netns"], os.O_RDONLY | os.O_CLOEXEC)
            call("setns", libc.setns(netns, CLONE_NEWNET))
            null, log = (
                os.open("/dev/null", os.O_RDWR),
                os.open(spec["log"], os.O_WRONLY | os.O_CREAT, 0o600),
            )
            for fd, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(fd, target)
            os.execv(spec["argv"][0], spec["argv"])
        except BaseException as e:
            os.write(said, f"{type(e).__name__}: {e}".encode())
        os._exit(1)
    os.close(said)
    text = os.read(report, 4096).decode()
    os.close(report)
    if text:
        raise RuntimeError(text)
    return pid


def build(spec: Spec, said: int, parted: int) -> None:
    """In the builder: join the cgroup, unshare, fork pid 1 and report its pid."""
    leaf = os.path.join(spec["cgroup"], "init")
    write(os.path.join(spec["cgroup"], "cgroup.procs"), "0")
    # The cgroup namespace is rooted above the leaf where the node's own processes live, so that engines
    # in it may enable controllers at its root (cgroup v2 forbids that where processes are).
    call("unshare", libc.unshare(CLONE_NEWCGROUP | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET))
    write(os.path.join(leaf, "cgroup.procs"), "0")
    call("unshare pid", libc.unshare(CLONE_NEWPID))
    pid = os.fork()
    if pid:
        os.write(said, str(pid).encode())
        return
    os.read(parted, 1)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    try:
        enter_root(spec)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
        }
        os.set_inheritable(said, False)
        os.execve("/usr/bin/python3", ["node-init", "-IS", "-c", REAPER], environment)
    except BaseException as e:
        os.write(said, f"!{type(e).__name__}: {e}".encode())
        os._exit(1)


def enter_root(spec: Spec) -> None:
    """Mount the node's root and make it `/`."""
    scratch = spec["scratch"]
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    if spec["disk"] is None:
        mount("scratch", scratch, "tmpfs", 0, f"mode=755,size={spec['scratch_mib']}m")
    else:
        mount(spec["disk"], scratch, None, MS_BIND)
    root = os.path.join(scratch, "root")
    for name in ("upper", "work", "root", "plain"):
        os.makedirs(os.path.join(scratch, name), exist_ok=True)
    lower = ":".join(spec["lower"])
    mount("node", root, "overlay", 0, f"lowerdir={lower},upperdir={scratch}/upper,workdir={scratch}/work")
    for path in PLAIN:
        source = os.path.join(scratch, "plain", path.rpartition("/")[2])
        os.makedirs(source, exist_ok=True)
        os.makedirs(root + path, exist_ok=True)
        mount(source, root + path, None, MS_BIND)
    for path, source in spec["shown"].items():
        os.makedirs(root + path, exist_ok=True)
        mount(source, root + path, None, MS_BIND)
        mount(None, root + path, None, MS_BIND | MS_REMOUNT | MS_RDONLY)
    for path, text in spec["files"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        if os.path.islink(root + path):
            os.unlink(root + path)
        write(root + path, text)
    make_system_mounts(root, spec)
    os.chdir(root)
    call("pivot_root", libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."))
    call("umount of the host's root", libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    call("sethostname", libc.sethostname(spec["name"].encode(), len(spec["name"].encode())))


def make_system_mounts(root: str, spec: Spec) -> None:
    """proc, sysfs, cgroup2, a /dev of the node's own, sized tmpfs on /run and /tmp."""
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", f"{root}/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("cgroup2", f"{root}/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("run", f"{root}/run", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=755,size={spec['run_mib']}m")
    mount("tmp", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={spec['tmp_mib']}m")
    dev = f"{root}/dev"
    mount("dev", dev, "tmpfs", MS_NOSUID, "mode=755,size=1m")
    os.umask(0)
    for name, (major, minor) in DEVICES.items():
        os.mknod(f"{dev}/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
    os.mkdir(f"{dev}/net", 0o755)
    for name, (major, minor) in {"fuse": (10, 229), "net/tun": (10, 200)}.items():
        os.mknod(f"{dev}/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
    os.umask(0o022)
    for name, target in {
        "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
    }.items():  # fmt: skip
        os.symlink(target, f"{dev}/{name}")
    for name in ("pts", "shm", "mqueue"):
        os.mkdir(f"{dev}/{name}")
    mount(
        "devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"
    )
    mount("shm", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={spec['tmp_mib']}m")
    mount("mqueue", f"{dev}/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def remove_cgroup(path: str) -> None:
    """Kill everything in a cgroup2 subtree and remove it, and its parent after its last node."""
    for _ in range(500):
        try:
            write(os.path.join(path, "cgroup.kill"), "1")
        except OSError:
            pass  # already removed
        for directory, _, _ in os.walk(path, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                pass  # a process in it is still dying
        if not os.path.exists(path):
            break
        while True:  # reap what died: a zombie keeps its cgroup busy
            try:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                break
        time.sleep(0.01)
    try:
        os.rmdir(os.path.dirname(path))
    except OSError:
        pass  # other nodes of the cluster are still there


if __name__ == "__main__":
    main()
