# SPDX-License-Identifier: Apache-2.0
"""One container that shares a GPU (or a CPU) with others, and the connections that lead to it."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cryoci.errors import ConflictError, CryociError, UsageError
from cryoci.shim import app, engines, netns
from cryoci.shim.engines import gpu, podman
from cryoci.shim.engines.container import Container
from cryoci.uses import leftover, share_shelf
from cryoci.uses.guard_state import start_time
from cryoci.uses.share_shelf import Shelf, Stored

_WORDS = re.compile(r"(?P<name>[^=]+)=(?:(?P<host>[0-9.]+|\[[0-9a-fA-F:]+\]):)?(?P<port>\d+):(?P<inner>\d+)")
_ALONE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_CONNECT_SECONDS = 10.0
_FIND_SECONDS = 10.0  # between two searches for a container that has ended


@dataclass
class Member:
    """A container and where its clients come in: `host`:`port` on the node leads to `inner` in the container.

    `known` is its container, of first process `pid`; `rank` its place on the command line, first 0. `active`: it
    runs, as far as this daemon knows. `wanted` is since when somebody waits for it, 0 when nobody does. Of its
    `connections`, those in `waiting` have asked last: an answer is owed to them. Times are monotonic. `moving`: it is
    being parked, unparked or stored, `moves` how often it was. `gone`: the container has ended. `port` 0: it has no
    clients. `rested`: it was parked because nobody had used it for long. `hooks`: what its application does before.

    `stored` is what `shelf` has of it while it is no container. It is not stored before `kept`, because of `unstored`;
    `closers` end its connections first.
    """

    name: str
    host: str
    port: int
    inner: int
    rank: int = 0
    active: bool = False
    used: float = 0.0
    since: float = 0.0
    wanted: float = 0.0
    swaps: int = 0
    failures: int = 0
    served: int = 0
    seconds: float = 0.0
    connections: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    closers: dict[int, Callable[[], None]] = field(default_factory=dict)
    stored: Stored | None = None
    shelf: Shelf | None = None
    kept: float = 0.0
    unstored: str = ""
    problem: str = ""
    gone: bool = False
    rested: bool = False
    moving: int = 0
    moves: int = 0
    searched: float = 0.0
    known: Container | None = None
    pid: int = 0
    started: int = 0
    hooks: app.Choice = field(default_factory=app.Choice)
    lock: threading.Lock = field(
        default_factory=threading.Lock
    )  # the runtime is asked for one thing at a time

    @property
    def busy(self) -> bool:
        """Is an answer owed to a client?"""
        return bool(self.waiting)

    def container(self) -> Container:
        """The container, looked up anew when its first process is another one. Raises NotFoundError."""
        if self.known is None or not self.started or start_time(self.pid) != self.started:
            found = engines.find(self.name)  # an engine takes half a second for this
            self.pid = int(found.state().get("pid", 0))
            self.known, self.started = found, start_time(self.pid)
        return self.known

    def check(self) -> None:
        """Raise ConflictError unless it runs or is parked (blocking); what a killed daemon has left is repaired."""
        container = self.container()
        container.must_run()
        leftover.settle(container)

    async def move(self, act: Callable[[], None]) -> None:
        """`act`, which is `park`, `unpark` or `store`, by a thread. Raises what it raises."""
        self.moving, self.moves = self.moving + 1, self.moves + 1
        try:
            await asyncio.to_thread(act)
        finally:
            self.moving -= 1

    def seen(self) -> str | None:
        """running, parked, stored or gone, as process and journal say (blocking); None while it is operated on."""
        if not self.lock.acquire(blocking=False):
            return None
        try:
            if self.stored is not None and not self._left_shelf():
                return "stored"
            if not self.started or start_time(self.pid) != self.started:
                if time.monotonic() - self.searched < _FIND_SECONDS:
                    return "gone"
                self.searched = time.monotonic()
            try:
                container = self.container()
                if not self.started:
                    return "gone"
                return "parked" if gpu.is_parked(container) else "running"
            except CryociError:
                return "gone"
        finally:
            self.lock.release()

    def _left_shelf(self) -> bool:
        """Is there a container again of what is stored?"""
        if self.stored is None or self.shelf is None or time.monotonic() - self.searched < _FIND_SECONDS:
            return False
        self.searched = time.monotonic()
        self.stored = self.shelf.settle(self.name)
        return self.stored is None

    def park(self, lulled: Callable[[], None] = lambda: None) -> None:
        """Bring it out (blocking); `lulled` is called when its application has prepared itself. Raises as parking."""
        with self.lock:
            gpu.park(self.container(), self.hooks, lulled=lulled)

    def unpark(self, others: Callable[[], None] | None = None) -> None:
        """Bring it back (blocking); `others` waits for those who are about to give their room.

        Raises SpaceError while there is no room, what unparking and a restore raise.
        """
        with self.lock:
            if self.stored is None:
                gpu.unpark_or_stay(self.container(), others=others)
                return
            assert self.shelf is not None
            self.shelf.bring(self.stored)
            self.stored = self.known = None

    def storable(self) -> None:
        """Raise ConflictError or UnsupportedError when it cannot be put on the shelf (blocking)."""
        with self.lock:
            container = self.container()
            if container.name != self.name:  # a restored one of podman's has another id
                raise ConflictError(
                    f"{self.name} is called {container.name}",
                    hint="name it so: --member NAME=PORT:CONTAINERPORT",
                )
            if container.engine == "podman" and self.closers and not podman.closes(container):
                raise ConflictError(
                    f"{self.name} has {len(self.closers)} open connections, and podman before 5.5 cannot restore "
                    "closed ones",
                    hint="start the container with --runtime cryoci-runtime, or have its clients close them",
                )
            share_shelf.refuse(container)

    def store(self) -> None:
        """Put it on the shelf (blocking), unless it is wanted by now. Raises as `Shelf.put`: it stays parked."""
        with self.lock:
            if self.wanted or self.busy or self.shelf is None:
                return
            self.stored = self.shelf.put(self.container())
            self.known, self.searched = None, time.monotonic()

    def connect(self) -> socket.socket:
        """A connection to the container's port on its own loopback (blocking). Raises OSError, NotFoundError."""
        with self.lock:
            self.container()
            pid = self.pid
        address = ("127.0.0.1", self.inner)
        made = netns.within(pid, lambda: socket.create_connection(address, _CONNECT_SECONDS))
        made.setblocking(False)
        return made

    def touch(self) -> None:
        """It was used now."""
        self.used = time.monotonic()


def parse(words: tuple[str, ...], *, alone: bool = False, hooks: bool = True) -> list[Member]:
    """Members of `NAME=[ADDRESS:]PORT:CONTAINERPORT`; with `alone` NAME will do; with or without app hooks.

    Raises UsageError.
    """
    found: list[Member] = []
    choice = app.Choice(off=not hooks)
    for rank, word in enumerate(words):
        if alone and _ALONE.fullmatch(word):
            found.append(Member(word, "", 0, 0, rank, hooks=choice))
            continue
        matched = _WORDS.fullmatch(word)
        ports = [int(matched[key]) for key in ("port", "inner")] if matched else [0]
        if matched is None or not all(0 < port < 65536 for port in ports):
            raise UsageError(
                f"{word[:200]!r} is no member", hint="write NAME=PORT:CONTAINERPORT, such as llama=8001:8000"
            )
        host = (matched["host"] or "127.0.0.1").strip("[]")
        found.append(Member(matched["name"], host, ports[0], ports[1], rank, hooks=choice))
    for key in ("name", "port"):
        values = [getattr(one, key) for one in found if getattr(one, key)]
        if len(set(values)) != len(values):
            raise UsageError(f"two members have the same {key}", hint="each has its own")
    if len(found) < 1:
        raise UsageError("there are no members", hint="--member NAME=PORT:CONTAINERPORT, repeatable")
    return found
