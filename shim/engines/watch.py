# SPDX-License-Identifier: Apache-2.0
"""CRIU's log of a restore that podman runs: podman removes it, with the container, when the restore fails.

It is opened as soon as it is there, and so can be read after its removal.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryoci.shim.criu import log
from cryoci.shim.record import Record

_PERIOD = 0.01  # seconds


class Watch:
    """Looks for OVERLAY-CONTAINERS/ID/userdata/restore.log of containers that are new in `containers`."""

    def __init__(self, containers: Path) -> None:
        self._containers = containers
        self._known = self._ids()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.container: str | None = None
        self.fd = -1

    def cause(self) -> tuple[log.Cause | None, str | None]:
        """Why CRIU failed, and where its log is kept; None when no log was seen, or no error in it."""
        if self.container is None:
            return None, None
        source = f"/proc/self/fd/{self.fd}"
        return log.explain(source, "restore"), Record(None, self.container).keep_log("restore", source)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; what was found stays open."""
        self._ended.set()
        self._thread.join()

    def _ids(self) -> set[str]:
        try:
            return set(os.listdir(self._containers))
        except OSError:
            return set()

    def _look(self) -> None:
        while self.container is None and not self._ended.wait(_PERIOD):
            for name in self._ids() - self._known:
                path = self._containers / name / "userdata" / "restore.log"
                try:
                    self.fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                except OSError:
                    continue
                self.container = name


@contextmanager
def watching(containers: Path) -> Iterator[Watch]:
    """A Watch for the time of a with block; its `cause` can be asked inside of it, after `stop`."""
    watch = Watch(containers)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
        if watch.fd >= 0:
            os.close(watch.fd)
