# SPDX-License-Identifier: Apache-2.0
"""A sink: the program that asked for the checkpoint, and stores each chunk while the next ones are captured.

It listens on a Unix socket (SOCK_SEQPACKET, one connection per thread here); messages are JSON objects.

    -> {"put": NAME, "digest": HEX}, and the chunk file as a descriptor of memory    <- {"stored": true}
    -> {"seal": NAME}, and the index as a descriptor                                 <- {"source": WHERE}
                                                                  or instead of either  <- {"error": .., "hint": ..}

Each answer comes when what it is about is stored, durably. `source` is what a journal names (supply.py). A chunk is in
memory from its capture until its answer: no more of them at once than the budget has room for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from cryoci.errors import CheckpointError, SpaceError
from cryoci.shim.memory import capture, chunk, index
from cryoci.shim.memory.calls import PAGE
from cryoci.shim.memory.find import Process
from cryoci.shim.memory.placement import Plan
from cryoci.shim.memory.settings import Settings

MOST = 90  # chunks: each is a layer of its own, and an image has room for 100 layers
BUDGET = 512 << 20  # bytes, where nothing is configured
BESIDE = 16 << 20  # bytes that a sink needs to store one chunk, beside the chunk
LARGEST = chunk.MAX_PAGES * PAGE  # bytes of a chunk
_ANSWER = 64 << 10


class Sink:
    """The sink that listens at `path`. Close it. Its methods may be called from any thread, and raise CheckpointError
    with what the sink says, or that it is gone."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._local = threading.local()
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []

    def take(self, name: str, write: Callable[[int], chunk.Written]) -> chunk.Written:
        """Have `write` fill a file in memory, and store that as `name`."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            written = write(fd)
            self._ask({"put": name, "digest": written.digest}, fd)
            return written
        finally:
            os.close(fd)

    def seal(self, directory: str) -> str:
        """All chunks are there, and `directory` has their index; returns where they can be had again."""
        fd = os.open(f"{directory}/{index.NAME}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return str(self._ask({"seal": index.NAME}, fd).get("source") or "")
        finally:
            os.close(fd)

    def close(self) -> None:
        for one in self._open:
            one.close()

    def _ask(self, question: dict[str, str], fd: int) -> dict[str, Any]:
        try:
            connection = self._connection()
            socket.send_fds(connection, [json.dumps(question).encode()], [fd])
            answer = connection.recv(_ANSWER)
            value = json.loads(answer) if answer else {"error": "the program that stores it is gone"}
        except (OSError, ValueError) as e:
            value = {"error": str(e)}
        if "error" in value:
            raise CheckpointError(
                f"memory of the container could not be stored: {value['error']}", hint=value.get("hint")
            )
        return dict(value)

    def _connection(self) -> socket.socket:
        if not hasattr(self._local, "connection"):
            made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with self._lock:
                self._open.append(made)
            with reachable(self._path) as path:
                made.connect(path)
            self._local.connection = made
        found: socket.socket = self._local.connection
        return found


class reachable:
    """A name for the socket `path` that is short enough for one (108 bytes), for a with block."""

    def __init__(self, path: str) -> None:
        directory, self._name = os.path.split(path)
        self._fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def __enter__(self) -> str:
        return f"/proc/self/fd/{self._fd}/{self._name}"

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def arrange(processes: Sequence[Process], settings: Settings) -> tuple[list[Process], Plan]:
    """What of `processes` goes to a sink, and in chunks of which size, by how many threads.

    At most MOST chunks, so the smallest areas are left to CRIU where there are too many. Raises SpaceError when the
    configured budget has no room for one chunk, and when the chunks would be too large altogether.
    """
    budget = settings.budget or max(BUDGET, settings.chunk)
    size = min(settings.chunk, 1 << (budget.bit_length() - 1))
    while size < LARGEST and _count(processes, size) > MOST:
        size *= 2
    chosen, left = _most(processes, size)
    if not chosen:
        raise SpaceError(
            f"the container's memory does not fit {MOST} layers of {size >> 20} MiB",
            hint="leave out --straight",
        )
    if settings.budget and size > settings.budget:
        raise SpaceError(
            f"in {MOST} layers, chunks of the container's memory have {size >> 20} MiB, and the budget for them is "
            f"{settings.budget >> 20} MiB",
            hint=f"give one more: --memory-option budget={size >> 20}M",
        )
    largest = max((k.pages * PAGE for process in chosen for k in capture.keys(process, size)), default=PAGE)
    threads = max(1, min(max(budget, size) // (largest + BESIDE), 2 * settings.workers))
    if settings.threads:
        threads = min(threads, settings.threads)
    why = {"threads": f"chunks at once in {max(budget, size) >> 20} MiB", "chunk": f"at most {MOST} layers"}
    if left:
        why["chunk"] += f", {left} areas left to CRIU"
    return chosen, Plan(
        dataclasses.replace(settings, chunk=size, threads=threads, write="buffered"), why, {"budget": budget}
    )


def _count(processes: Sequence[Process], size: int) -> int:
    return sum(1 for process in processes for _ in capture.keys(process, size))


def _most(processes: Sequence[Process], size: int) -> tuple[list[Process], int]:
    """The processes with their largest areas, as many as fit, and how many areas do not."""
    ranked = sorted(
        ((area, process.pid) for process in processes for area in process.areas),
        key=lambda one: (-one[0].resident, one[1], one[0].start),
    )
    room, taken = MOST, set[tuple[int, int]]()
    for area, pid in ranked:
        room -= (area.end - 1) // size - area.start // size + 1
        if room < 0:
            break
        taken.add((pid, area.start))
    kept = [
        dataclasses.replace(p, areas=tuple(a for a in p.areas if (p.pid, a.start) in taken))
        for p in processes
    ]
    return [process for process in kept if process.areas], len(ranked) - len(taken)
