# SPDX-License-Identifier: Apache-2.0
"""Memory straight into a registry or layout: chunks are stored while they are captured, with no copy on this node.

    cryoci-runtime  capture -> a chunk in memory -> socket -> cryoci: a layer of its own -> registry | layout
                    drop    <- all are acknowledged, and an image of them has the name cryoci-memory-KEY
                    CRIU's dump, without them               -> the checkpoint's image, which has these layers too

Until the checkpoint's image is there, and until the container has ended or its memory is back, that image is the only
copy: the journal names it by its digest, and no collection takes its layers.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from cryoci import trace
from cryoci.errors import CryociError, ImageError
from cryoci.ociimage import annotations as families
from cryoci.ociimage import reference, stores
from cryoci.ociimage.chunks import Shared
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.stock import Stock, Stocked
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim import config
from cryoci.shim.engines.container import Container
from cryoci.shim.memory import chain, index, journal
from cryoci.shim.memory.sink import reachable
from cryoci.shim.memory.supply import Supplier, Supply
from cryoci.shim.record import Record

NAME = "cryoci-memory-"  # of the image that has the memory for the time being
SOCKET = "memory-sink"  # in the container's record
_FOLDER = chain.IMAGES + "/"
_MESSAGE = 64 << 10


class Stored:
    """A Supply: memory in the image at `source`. Raises UsageError, NotFoundError, RegistryError, ImageError."""

    def __init__(
        self,
        source: str,
        options: RegistryOptions | None,
        *,
        stays: bool = False,
        budget: int | None = None,
    ) -> None:
        ref = reference.parse(source)
        if not isinstance(ref, LayoutRef | RegistryRef) or ref.digest is None:
            raise ImageError(f"{source} is no image by its digest")
        self._stocked = Stocked(ref, options)
        sizes = [size for name, size in self._stocked.sizes.items() if name != f"{_FOLDER}{index.NAME}"]
        self.size, self.largest = sum(sizes), max(sizes, default=0)
        self.stays, self.budget = stays, budget

    def index(self) -> bytes:
        """The content of cryoci-memory.json."""
        with os.fdopen(os.memfd_create(index.NAME, os.MFD_CLOEXEC), "r+b") as file:
            self._stocked.fetch(_FOLDER + index.NAME, file.fileno())
            file.seek(0)
            return file.read(index.LIMIT + 1)

    def fetch(self, name: str, fd: int) -> None:
        """Write the chunk file `name` to the empty file `fd`."""
        self._stocked.fetch(_FOLDER + name, fd)

    def forget(self) -> None:
        """Remove the image."""
        self._stocked.forget()


def supplier(options: RegistryOptions | None) -> Supplier:
    """What `cryoci repair` finds memory by."""
    return lambda source: Stored(source, options, budget=config.load().memory.budget)


class Straight:
    """Stores the memory of `container` for an image at `goal`; `layers` are what it has stored.

    `path` is where the runtime reaches it, `error` why something could not be stored, `notes` are for the user.
    """

    def __init__(
        self,
        container: Container,
        goal: LayoutRef | RegistryRef,
        compression: str,
        options: RegistryOptions | None,
        memory: Sequence[str] = (),
    ) -> None:
        settings = config.load().memory
        self._budget = (settings.changed(",".join(memory)) if memory else settings).budget
        record = Record(container.root, container.id)
        record.make()
        self.path = f"{record.directory}/{SOCKET}"
        self.error: CryociError | None = None
        self.layers: list[Shared] = []
        self.notes: list[str] = []
        self._record = record
        self._container = container
        if isinstance(goal, LayoutRef):
            goal = replace(goal, path=goal.path.resolve())
        self._goal, self._options = goal, options
        self.store = stores.open_store(goal, options, create=True)
        self._stock = Stock(self.store, compression)
        self._kept: LayoutRef | RegistryRef | None = None  # the image that has the memory, by its digest
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def supplier(self, source: str) -> Supply:
        """What memory comes back from: what is stored here stays for the image, what an earlier one has left goes."""
        return Stored(
            source,
            self._options,
            stays=self._kept is not None and source == str(self._kept),
            budget=self._budget,
        )

    def listen(self) -> None:
        """Begin. Raises OSError."""
        with suppress(FileNotFoundError):  # of one that was killed
            os.unlink(self.path)
        with reachable(self.path) as path:
            self._listener.bind(path)
        self._listener.listen(128)
        thread = threading.Thread(target=self._accept, name="cryoci-sink", daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """Take no more. Never raises."""
        self._stock.stop()
        for one in (self._listener, *self._connections):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        self._stock.close()
        with suppress(OSError):
            os.unlink(self.path)

    def settle(self) -> None:
        """Remove the image that had the memory for the time being, unless a journal still needs it. Never raises."""
        if self._kept is None:
            return
        with suppress(CryociError):
            if journal.read(self._record) is not None or Stocked(self._kept, self._options).forget():
                return
        self.notes.append(
            f"{self._goal} keeps {self._name()}, which nobody needs any more: it could not be removed"
        )

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="cryoci-sink", daemon=True
            )
            thread.start()
            self._connections.append(connection)
            self._threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while True:
                message, fds, _, _ = socket.recv_fds(connection, _MESSAGE, 1)
                try:
                    if not message:
                        return
                    answer = self._answer(message, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
                connection.send(json.dumps(answer).encode())

    def _answer(self, message: bytes, fds: list[int]) -> dict[str, Any]:
        try:
            asked = json.loads(message)
            [fd] = fds
            if "put" in asked:
                with trace.span("memory: store", bytes=os.fstat(fd).st_size):
                    layer = self._stock.put(f"{_FOLDER}{asked['put']}", fd, str(asked["digest"]))
                with self._lock:
                    self.layers.append(layer)
                return {"stored": True}
            self._stock.put(f"{_FOLDER}{asked['seal']}", fd)
            return {"source": self._seal()}
        except CryociError as e:
            self.error = self.error or e
            return {"error": e.message, **({"hint": e.hint} if e.hint else {})}
        except (OSError, ValueError, KeyError, TypeError) as e:
            self.error = self.error or ImageError(f"memory of the container could not be stored: {e}")
            return {"error": str(e)}

    def _seal(self) -> str:
        noted = {
            families.CONTAINER_ID: self._container.id,
            families.CRYOCI + "memory.format": index.FORMAT,
        }
        digest = self._stock.seal(self._name(), noted)
        if isinstance(self._goal, LayoutRef):
            self._kept = replace(self._goal, name=None, digest=digest)
        else:
            self._kept = replace(self._goal, tag=None, digest=digest)
        return str(self._kept)

    def _name(self) -> str:
        """One per container and node: what a killed cryoci has left is replaced by the next checkpoint."""
        key = f"{socket.gethostname()} {self._container.root or ''} {self._container.id}"
        return NAME + hashlib.sha256(key.encode()).hexdigest()[:16]


@contextmanager
def straight(
    container: Container,
    goal: LayoutRef | RegistryRef,
    compression: str,
    options: RegistryOptions | None,
    memory: Sequence[str] = (),
) -> Iterator[Straight]:
    """What stores the memory of a checkpoint of `container`, which is made in the with block.

    `memory` are KEY=VALUE over [memory] of config.toml.

    Raises RegistryError and others when the store cannot be reached: before anything is done.
    """
    stores.target_name(goal)
    made = Straight(container, goal, compression, options, memory)
    try:
        with made.store.session():
            try:
                made.listen()
                yield made
            finally:
                made.close()
    finally:
        made.settle()
