#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""The workload of the node tests: state of every kind that a checkpoint must carry, and a way to ask for it.

Counts at 20 Hz into a log that stays open, as does a forked child; holds a random buffer; answers on a TCP
port. Any connection gets one line of JSON; `GET` gets it as HTTP. Paths: / (state), /write?path=P&text=T,
/read?path=P.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import secrets
import select
import signal
import socket
import sys
import time
import urllib.parse
from typing import Any

PERIOD = 0.05  # seconds
SYS_IO_URING_SETUP, SYS_LANDLOCK_CREATE_RULESET, SYS_USERFAULTFD = 425, 444, 323


def hold(kind: str) -> object:
    """Open something and keep it: `unsupported` is a descriptor that CRIU 4.1 refuses to dump."""
    if kind == "ghost":  # an open file without a name
        f = open("/data/ghost", "w+b")  # noqa: SIM115
        f.write(b"ghost" * 1000)
        f.flush()
        os.unlink("/data/ghost")
        return f
    if kind == "unsupported":
        libc = ctypes.CDLL(None, use_errno=True)
        handled = ctypes.c_uint64(1)
        fd = libc.syscall(SYS_LANDLOCK_CREATE_RULESET, ctypes.byref(handled), 8, 0)
        if fd >= 0:
            return fd
        fd = libc.syscall(SYS_IO_URING_SETUP, 4, ctypes.create_string_buffer(120))
        if fd >= 0:
            return fd
        return socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)
    if kind == "lock":
        import fcntl

        lock = open("/data/lock", "w")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock
    raise SystemExit(f"unknown thing to hold: {kind}")


class Counter:
    """The state of the parent process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.boot = secrets.token_hex(8)
        self.count = 0
        self.memory = bytearray(os.urandom(options.memory_mib << 20))
        # Shared with the child, so that its count can be told without asking it.
        self.shared = mmap.mmap(-1, mmap.PAGESIZE)
        os.makedirs(options.data, exist_ok=True)
        self.log = open(os.path.join(options.data, "count.log"), "a")  # noqa: SIM115
        self.held = [hold(kind) for kind in options.hold]
        self.peer: socket.socket | None = None
        if options.connect:
            host, _, port = options.connect.rpartition(":")
            self.peer = socket.create_connection((host, int(port)), 10)
        self.child = 0

    def state(self) -> dict[str, Any]:
        position = self.log.tell()
        size = os.fstat(self.log.fileno()).st_size
        return {
            "count": self.count,
            "child": int.from_bytes(self.shared[:8], "little"),
            "pid": os.getpid(),
            "child_pid": self.child,
            "boot": self.boot,
            "open_file": {"path": self.log.name, "position": position, "size": size},
            "memory_sha256": hashlib.sha256(self.memory).hexdigest(),
            "hostname": socket.gethostname(),
            "peer": self.peer_state(),
        }

    def peer_state(self) -> str | None:
        """Whether the outgoing connection still carries a byte each way; None without one."""
        if self.peer is None:
            return None
        try:
            self.peer.settimeout(2)
            self.peer.sendall(b".")
            return "open" if self.peer.recv(1) else "closed"
        except OSError as e:
            return f"broken: {e}"

    def answer(self, request: str) -> dict[str, Any]:
        url = urllib.parse.urlsplit(request.split()[1] if request.startswith("GET ") else "/")
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        try:
            if url.path == "/write":
                with open(query["path"], "w") as f:
                    f.write(query["text"])
                return {"written": len(query["text"])}
            if url.path == "/read":
                with open(query["path"]) as f:
                    return {"text": f.read()}
            return self.state()
        except (OSError, KeyError) as e:
            return {"error": str(e)}

    def serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(0.2)
                try:
                    request = connection.recv(4096).decode(errors="replace")
                except TimeoutError:
                    request = ""
                body = json.dumps(self.answer(request)).encode() + b"\n"
                if request.startswith("GET "):
                    body = (
                        b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                        % len(body)
                        + body
                    )
                connection.sendall(body)
            except OSError:
                pass  # the asker left

    def tick(self) -> None:
        self.count += 1
        self.log.write(f"{self.count} {self.boot}\n")
        self.log.flush()
        say(f"count {self.count}")


def say(line: str) -> None:
    """Print a line; whoever read stdout may have gone, and that must not end the count."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def child(counter: Counter) -> None:
    """Count into a file of the child's own until the parent is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = open(os.path.join(counter.options.data, "child.log"), "a")  # noqa: SIM115
    count, parent = 0, os.getppid()
    while os.getppid() == parent:
        count += 1
        counter.shared[:8] = count.to_bytes(8, "little")
        log.write(f"{count} {counter.boot}\n")
        log.flush()
        time.sleep(PERIOD)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--data", default="/data")
    parser.add_argument("--memory-mib", type=int, default=32)
    parser.add_argument("--hold", action="append", default=[], help="ghost, lock or unsupported; may repeat")
    parser.add_argument("--connect", metavar="HOST:PORT", help="keep a TCP connection to an echo server")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    counter = Counter(options)
    server = socket.create_server(("", options.port))
    counter.child = os.fork()
    if counter.child == 0:
        server.close()
        child(counter)
    counter.memory = bytearray(counter.memory)  # a copy that no child shares
    say(f"boot {counter.boot}")
    due = time.monotonic()
    while True:
        wait = due - time.monotonic()
        if wait <= 0:
            counter.tick()
            # From now, not from the last due time: a frozen hour must not be made up for.
            due = time.monotonic() + PERIOD
            continue
        if select.select([server], [], [], wait)[0]:
            counter.serve(server.accept()[0])


if __name__ == "__main__":
    main()
