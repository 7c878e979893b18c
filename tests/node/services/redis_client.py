# SPDX-License-Identifier: Apache-2.0
"""A client of redis over one connection that is never opened again: writes in a thread, as fast as it can.

Requests on stdin, answers on stdout: load (begin to write), acknowledged (writes so far), stop (end of the load),
check (every acknowledged write is there), digest (of the whole database), info, survived (after a crash, over a new
connection: how many writes are there, and how many seconds of them are not).
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
import time
from typing import Any

TIMEOUT = 60  # seconds, of one answer: the server is away for a while


class Redis:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.settimeout(TIMEOUT)
        self.file = self.socket.makefile("rb")

    def call(self, *words: str) -> Any:
        parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
        self.socket.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
        return self.answer()

    def answer(self) -> Any:
        line = self.file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection")
        kind, text = line[:1], line[1:-2].decode()
        if kind == b"-":
            raise RuntimeError(text)
        if kind == b"$":
            if int(text) < 0:
                return None
            return self.file.read(int(text) + 2)[:-2].decode()
        return [self.answer() for _ in range(int(text))] if kind == b"*" else text


def value(key: int) -> str:
    return hashlib.sha256(str(key).encode()).hexdigest() * 8


class Load(threading.Thread):
    """Writes until it is stopped; `written` writes were acknowledged, at `times` by time.monotonic()."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(daemon=True)
        self.redis, self.written, self.on, self.error = redis, 0, True, ""
        self.times: list[float] = []

    def run(self) -> None:
        try:
            while self.on:
                if self.redis.call("SET", f"load:{self.written}", value(self.written)) != "OK":
                    raise RuntimeError("a write was not acknowledged")
                self.times.append(time.monotonic())
                self.written += 1
        except Exception as e:
            self.error = f"{type(e).__name__}: {e}"


def survived(port: int, load: Load) -> dict[str, Any]:
    """What a server that is back has of the load's writes: they must be its first ones, and whole."""
    redis = Redis(port)
    there = {int(key.partition(":")[2]) for key in redis.call("KEYS", "load:*")}
    wrong = [k for k in there if redis.call("GET", f"load:{k}") != value(k)]
    # one write may have been done and not acknowledged
    first = there == set(range(len(there))) and len(there) <= load.written + 1
    lost = load.times[-1] - load.times[min(len(there), load.written) - 1]
    return {"there": len(there), "wrong": len(wrong), "first": first, "lost": lost, "written": load.written}


def main() -> None:
    redis = Redis(int(sys.argv[1]))
    load = Load(redis)
    for line in sys.stdin:
        asked = json.loads(line)["ask"]
        if asked == "load":
            load.start()
        elif asked == "stop":
            load.on = False
            load.join()
        elif asked == "check":
            wrong = [k for k in range(load.written) if redis.call("GET", f"load:{k}") != value(k)]
            print(
                json.dumps({"wrong": len(wrong), "written": load.written, "error": load.error}), flush=True
            )
            continue
        elif asked == "survived":
            print(json.dumps(survived(int(sys.argv[1]), load)), flush=True)
            continue
        elif asked == "digest":
            print(json.dumps(redis.call("DEBUG", "DIGEST")), flush=True)
            continue
        print(json.dumps({"written": load.written, "error": load.error}), flush=True)


if __name__ == "__main__":
    main()
