# SPDX-License-Identifier: Apache-2.0
"""What is known of one container from its creation to its deletion.

The record is a directory, /run/cryoci/containers/ROOTKEY/ID/, mode 0700:

    runtime       absolute path of the runtime that created it; read by every later call
    record.json   the facts (`Record.facts`)
    criu.conf     CRIU options of the next operation; annotation org.criu.config names it
    options.json  optional: CRIU options of this container, keyed as [criu] in config.toml
    waiting       optional: restored by `create`, and not started yet (shim/waiting.py)
    dump.log, restore.log   CRIU's last words; they outlive the record

`runtime` is written last and removed first, so a record without it does not exist. A record of a
container that has vanished does no harm: its runtime answers for it.
"""

from __future__ import annotations

import json
import posix
import time

from cryoci.errors import UsageError
from cryoci.shim import paths, state
from cryoci.shim.remains import directories, remove

TYPE_CHECKING = False  # `typing` itself would cost every create 3 ms
if TYPE_CHECKING:
    from typing import Any

VERSION = 1
_LOGS = {"dump": "dump.log", "restore": "restore.log"}
_LOG_LIMIT = 16 << 20  # bytes


class Record:
    """The record of container `container` under runtime root `root` (None: the runtime's default)."""

    __slots__ = ("directory", "facts", "id")

    def __init__(self, root: str | None, container: str) -> None:
        """Raises UsageError when `container` is no container id; nothing is read or written."""
        if not paths.valid_id(container):
            raise UsageError(
                f"{container!r} is not a container id", hint="ids are letters, digits and _ + - ."
            )
        self.id = container
        self.directory = paths.container_directory(root, container)
        self.facts: dict[str, Any] = {}

    @property
    def exists(self) -> bool:
        """Was this container created (or restored) through cryoci-runtime?"""
        return posix.access(self.directory + "/runtime", posix.R_OK)

    @property
    def conf(self) -> str:
        """Path of the container's CRIU configuration."""
        return self.directory + "/criu.conf"

    @property
    def options(self) -> dict[str, Any]:
        """CRIU options of this container alone; {} when there are none. Raises ValueError when broken."""
        raw = paths.read(self.directory + "/options.json")
        value = json.loads(raw) if raw is not None else {}
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value

    def set_options(self, values: dict[str, Any]) -> None:
        """Set CRIU options for every later operation on this container. Raises OSError."""
        self.make()
        self._write("options.json", values)

    def log(self, verb: str) -> str:
        """Path of the kept log of `verb` ("dump" or "restore")."""
        return f"{self.directory}/{_LOGS[verb]}"

    def make(self) -> None:
        """Make the directory, private to root. Raises OSError."""
        state.make_directory(self.directory)

    def save(self, runtime: str, facts: dict[str, Any], conf: str) -> None:
        """Write the whole record. `conf` is the text of criu.conf. Raises OSError."""
        self.make()
        self.facts = {
            "version": VERSION,
            "id": self.id,
            **facts,
            "runtime": runtime,
            "criu_config": self.conf,
        }
        self.facts["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._write("record.json", self.facts)
        state.write(self.conf, conf.encode())
        state.write(self.directory + "/runtime", (runtime + "\n").encode("utf-8", "surrogateescape"))

    def _write(self, name: str, value: dict[str, Any]) -> None:
        state.write(f"{self.directory}/{name}", json.dumps(value, indent=1).encode() + b"\n")

    def load(self) -> Record | None:
        """Read the facts; None when there is no record, or none that can be read."""
        if not self.exists:
            return None
        raw = paths.read(self.directory + "/record.json")
        try:
            facts = json.loads(raw or b"")
        except ValueError:
            return None
        if not isinstance(facts, dict) or facts.get("version") != VERSION:
            return None
        self.facts = facts
        return self

    def keep_log(self, verb: str, source: str) -> str | None:
        """Copy CRIU's log `source` into the record (its last 16 MiB). Returns its path, else None."""
        try:
            self.make()
            with open(source, "rb") as f, open(self.log(verb), "wb") as kept:
                f.seek(max(0, posix.fstat(f.fileno()).st_size - _LOG_LIMIT))
                while chunk := f.read(1 << 20):
                    kept.write(chunk)
        except OSError:
            return None
        return self.log(verb)

    def disown(self) -> None:
        """Undo `save`, and nothing else: a container that is only borrowed keeps its journals. Never raises."""
        for name in ("runtime", "criu.conf", "record.json"):
            state.unlink(f"{self.directory}/{name}")
        try:
            posix.rmdir(self.directory)
        except OSError:
            pass

    def remove(self) -> None:
        """Remove the record; logs stay, of the last 32 containers that are gone. Idempotent, never raises."""
        remove(self.directory)


def all_records() -> list[Record]:
    """Every record on this node that can be read."""
    found = []
    for directory in directories():
        record = Record(None, directory.rpartition("/")[2])
        record.directory = directory
        if record.load():
            found.append(record)
    return found
