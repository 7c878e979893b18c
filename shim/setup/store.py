# SPDX-License-Identifier: Apache-2.0
"""Making the changes of a plan, and undoing them to the byte.

/var/lib/cryoci/install/ holds manifest.json and the files as they were. The manifest is written before a file is
changed, so that an installation that was killed can be undone as well.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryoci.errors import ConfigError, ConflictError
from cryoci.files import read_json, write_atomic, write_json
from cryoci.shim.doctor.check import Facts
from cryoci.shim.setup.plan import Change, Plan, without_block

DIRECTORY = "/var/lib/cryoci/install"


@dataclass(frozen=True)
class Undone:
    """What happened to one file: "restored", "removed", "block removed" (it was edited since)."""

    path: str
    what: str


class Store:
    """The installation of the node of `facts`."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._directory = facts.at(DIRECTORY)
        self.files: dict[str, dict[str, Any]] = {}
        try:
            found = read_json(self._directory / "manifest.json")
            self.files = dict(found["files"])
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as e:
            raise ConfigError(
                f"{DIRECTORY}/manifest.json is damaged: {e}",
                hint=f"put the files back by hand: their originals are in {DIRECTORY}/original",
            ) from e

    def base(self, path: str) -> bytes | None:
        """A file as it would be without us: the original, or, when it was edited since, less our block."""
        now = self._read(path)
        entry = self.files.get(path)
        if entry is None or now is None:
            return now
        if _digest(now) == entry["installed"]:
            return self._original(entry)
        return without_block(now.decode(errors="surrogateescape")).encode(errors="surrogateescape")

    def pending(self, plan: Plan) -> list[Change]:
        """The changes that are not made yet."""
        return [c for c in plan.changes if self._read(c.path) != c.after]

    def apply(self, plan: Plan) -> None:
        """Make the changes, and ask the engine's own parser. If it refuses, all is as before, and ConfigError."""
        made = []
        before = {c.path: (self._read(c.path), self.files.get(c.path)) for c in plan.changes}
        try:
            for change in self.pending(plan):
                self._record(plan.engine, change)
                made.append(change.path)
                target = self._facts.at(change.path)
                mode = target.stat().st_mode & 0o7777 if target.exists() else 0o644
                write_atomic(target, change.after, mode=mode)
            self._validate(plan)
        except BaseException:
            for path in reversed(made):
                content, entry = before[path]
                self._put(path, content, self.files[path])
                self._set(path, entry)
            raise

    def _validate(self, plan: Plan) -> None:
        if not plan.check:
            return
        said = self._facts.run(*plan.check, timeout=60)
        if said is None:
            return  # the engine is not here to be asked: an image is being prepared
        if said.status != 0 or plan.expects not in said.text.replace('"', "").replace("'", ""):
            last = said.text.strip().splitlines()[-1:] or ["it does not show the handler"]
            why = last[0][:300] if said.status != 0 else "it does not show the handler"
            raise ConfigError(
                f"{plan.engine} does not accept the new configuration, which was taken back: {why}",
                hint=f"by hand: {' '.join(plan.check)}",
            )

    def undo(self, engine: str | None = None, *, force: bool = False) -> list[Undone]:
        """Put every file (of one engine) back. Raises ConflictError before anything is touched.

        A file that is ours alone but was edited since is in conflict unless `force`.
        """
        chosen = {p: e for p, e in self.files.items() if engine in (None, e["engine"])}
        for path, entry in chosen.items():
            now = self._read(path)
            if now is not None and entry["whole"] and _digest(now) != entry["installed"] and not force:
                raise ConflictError(
                    f"{path} was edited since cryoci wrote it",
                    hint="save what you need of it, then give --force",
                )
        done = []
        for path, entry in chosen.items():
            done.append(Undone(path, self._undo_one(path, entry)))
            self._set(path, None)
        return done

    def _undo_one(self, path: str, entry: dict[str, Any]) -> str:
        now = self._read(path)
        if now is not None and not entry["whole"] and _digest(now) != entry["installed"]:
            text = now.decode(errors="surrogateescape")
            write_atomic(
                self._facts.at(path),
                without_block(text).encode(errors="surrogateescape"),
                mode=entry["mode"],
            )
            return "block removed"
        original = self._original(entry)
        self._put(path, original, entry)
        return "removed" if original is None else "restored"

    def _put(self, path: str, content: bytes | None, entry: dict[str, Any]) -> None:
        target = self._facts.at(path)
        if content is not None:
            write_atomic(target, content, mode=entry["mode"])
            return
        target.unlink(missing_ok=True)
        for directory in entry["directories"]:  # deepest first; one that got other files stays
            try:
                self._facts.at(directory).rmdir()
            except OSError:
                break

    def _record(self, engine: str, change: Change) -> None:
        """Remember a file before it is changed for the first time, and make its directory."""
        target = self._facts.at(change.path)
        entry = self.files.get(change.path)
        if entry is None:
            made = _missing(target.parent, self._facts.root)
            name = None
            if change.before is not None:
                name = hashlib.sha256(change.path.encode()).hexdigest()[:16]
                (self._directory / "original").mkdir(mode=0o700, parents=True, exist_ok=True)
                write_atomic(self._directory / "original" / name, change.before)
            entry = {
                "engine": engine,
                "original": name,
                "mode": target.stat().st_mode & 0o7777 if change.before is not None else 0o644,
                "whole": change.whole,
                "directories": ["/" + os.fspath(d.relative_to(self._facts.root)) for d in made],
            }
        self._set(change.path, {**entry, "installed": _digest(change.after)})
        target.parent.mkdir(parents=True, exist_ok=True)

    def _set(self, path: str, entry: dict[str, Any] | None) -> None:
        if entry is None:
            old = self.files.pop(path, None)
        else:
            old, self.files[path] = None, entry
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self._directory / "manifest.json", {"version": 1, "files": self.files})
        if old and old["original"]:
            (self._directory / "original" / old["original"]).unlink(missing_ok=True)

    def _original(self, entry: dict[str, Any]) -> bytes | None:
        return (self._directory / "original" / entry["original"]).read_bytes() if entry["original"] else None

    def _read(self, path: str) -> bytes | None:
        try:
            return self._facts.at(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _missing(directory: Path, root: Path) -> list[Path]:
    """The directories that do not exist yet, deepest first."""
    found = []
    while directory != root and not directory.exists():
        found.append(directory)
        directory = directory.parent
    return found
