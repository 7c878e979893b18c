# SPDX-License-Identifier: Apache-2.0
"""pid 1 of a machine node: mounts, network, and an agent that runs commands from virtio-serial ports."""

from __future__ import annotations

import ctypes
import glob
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import IO, Any

libc = ctypes.CDLL(None, use_errno=True)
MOUNTS = (
    ("proc", "/proc", "proc", ""),
    ("sysfs", "/sys", "sysfs", ""),
    ("run", "/run", "tmpfs", "mode=755"),
    ("tmp", "/tmp", "tmpfs", "mode=1777"),
    ("devpts", "/dev/pts", "devpts", "ptmxmode=0666,mode=620,gid=5"),
    ("shm", "/dev/shm", "tmpfs", "mode=1777"),
    ("mqueue", "/dev/mqueue", "mqueue", ""),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
    ("securityfs", "/sys/kernel/security", "securityfs", ""),
)
# The last ones are what CRIU asks sockets with; they load on demand, but not from a container's namespace.
MODULES = (
    "virtio_net", "virtio_rng", "overlay", "veth", "bridge", "tun", "fuse",
    "tcp_diag", "udp_diag", "inet_diag", "unix_diag", "netlink_diag", "af_packet_diag",
)  # fmt: skip


def boot() -> None:
    """Make the tree a running system."""
    os.environ.clear()
    os.environ.update(PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", LANG="C.UTF-8")
    for source, target, kind, options in MOUNTS:
        os.makedirs(target, exist_ok=True)
        if libc.mount(source.encode(), target.encode(), kind.encode(), 0, options.encode()) != 0:
            say(f"mount {target}: {os.strerror(ctypes.get_errno())}")
    # As systemd does: engines find a root whose mounts propagate.
    libc.mount(b"", b"/", b"", (1 << 20) | 0x4000, b"")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(target, f"/dev/{name}")
    with open("/opt/node/node.json") as f:
        node = json.load(f)
    # Processes live in a leaf, so that controllers can be enabled at the root for engines.
    os.makedirs("/sys/fs/cgroup/init", exist_ok=True)
    with open("/sys/fs/cgroup/init/cgroup.procs", "w") as f:
        f.write("0")
    subprocess.run(["hostname", node["name"]])
    subprocess.run(["modprobe", "-a", *MODULES])
    commands = [
        "link set lo up", f"addr add {node['address']}/16 dev eth0", "link set eth0 up",
        f"route add default via {node['gateway']}",
    ]  # fmt: skip
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands).encode())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def frame(fd: int) -> tuple[bytes, bytes] | None:
    """The next frame of a port; None when the host is not connected."""
    head = read(fd, 5)
    return None if head is None else (head[:1], read(fd, struct.unpack("!I", head[1:])[0]) or b"")


def read(fd: int, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            return None
        data += piece
    return data


class Port:
    """One channel to the host: frames `c` start a command, `i` and `e` are its stdin, `k` kills it.

    Its output goes back as `o` and `r`, its end as `x` with the status. The host waits for that before the
    next `c`.
    """

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.stdin: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def send(self, kind: bytes, data: bytes) -> None:
        raw = kind + struct.pack("!I", len(data)) + data
        with self.lock:
            while raw:
                raw = raw[os.write(self.fd, raw) :]

    def serve(self) -> None:
        """Obey frames for ever."""
        while True:
            got = frame(self.fd)
            if got is None:
                time.sleep(0.1)  # the host is not connected
            elif got[0] == b"c":
                self.start(json.loads(got[1]))
            elif got[0] == b"i":
                self.stdin.put(got[1])
            elif got[0] == b"e":
                self.stdin.put(b"")
            elif got[0] == b"k" and self.process is not None:
                self.process.kill()

    def start(self, command: dict[str, Any]) -> None:
        self.stdin = queue.SimpleQueue()
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command["argv"], env=command["env"], cwd="/",
                stdin=pipe if command["input"] else subprocess.DEVNULL,
                stdout=pipe, stderr=pipe, start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            self.process = None
            self.send(b"r", f"{command['argv'][0]}: {e.strerror}\n".encode())
            self.send(b"x", struct.pack("!i", 127))
            return
        threading.Thread(target=self.watch, args=(self.process, self.stdin), daemon=True).start()

    def watch(self, process: subprocess.Popen[bytes], stdin: queue.SimpleQueue[bytes]) -> None:
        """Move a process' output, and tell its end."""
        done = threading.Event()

        def feed() -> None:
            assert process.stdin is not None
            try:
                while data := stdin.get():
                    process.stdin.write(data)
                process.stdin.close()
            except OSError:
                pass  # it does not read its stdin

        def pump(stream: IO[bytes], kind: bytes) -> None:
            while (piece := os.read(stream.fileno(), 65536)) and not done.is_set():
                self.send(kind, piece)

        assert process.stdout is not None and process.stderr is not None
        pumps = [(process.stdout, b"o"), (process.stderr, b"r")]
        threads = [threading.Thread(target=pump, args=a, daemon=True) for a in pumps]
        for thread in threads:
            thread.start()
        if process.stdin is not None:
            threading.Thread(target=feed, daemon=True).start()
        process.wait()
        # A daemon that it left may hold its stdout: what comes in the next moment counts, the rest does not.
        for thread in threads:
            thread.join(0.5)
        done.set()
        self.send(b"x", struct.pack("!i", process.returncode))


def agent() -> None:
    """Serve every port that the host made for us."""
    for path in sorted(glob.glob("/sys/class/virtio-ports/*/name")):
        port = Port("/dev/" + path.split("/")[-2])
        threading.Thread(target=port.serve, daemon=True).start()
    say("node: ready")
    signal.pause()


def main() -> None:
    boot()
    if os.fork() == 0:
        os.setsid()
        agent()
    while True:  # reap orphans; apart from the agent, which waits for its own children
        os.wait()


if __name__ == "__main__":
    main()
