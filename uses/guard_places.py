# SPDX-License-Identifier: Apache-2.0
"""Where a guard keeps its checkpoints: directories on tmpfs or disk, or a registry."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cryoci.errors import CryociError, TrustError, UsageError
from cryoci.files import scratch, sync_directory, sync_tree
from cryoci.ociimage import archive, image, reference
from cryoci.ociimage.progress import Work, silent
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim.criu import images
from cryoci.shim.engines.checkpoint import Checkpoint
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.options import DumpOptions
from cryoci.uses import guard_state, incremental
from cryoci.uses.dumping import dumping
from cryoci.uses.guard_state import Kept

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Identities, Recipients

_NO_PAUSE = ("pre-checkpoint hooks", "post-restore hooks")


class Place(Protocol):
    """Takes checkpoints of a running container, gives them back, and removes them."""

    def take(self, container: Container, number: int, options: DumpOptions) -> Kept:
        """Checkpoint `container`, which runs on. Raises what a checkpoint raises; nothing is left then."""

    def has(self, kept: Kept) -> bool:
        """Whether the checkpoint is still there; a registry is not asked."""

    def open(self, kept: Kept) -> AbstractContextManager[Path]:
        """The checkpoint's directory, for a with block."""

    def drop(self, kept: Kept) -> None:
        """Remove the checkpoint. Raises CryociError, OSError."""


@dataclass(frozen=True)
class Sharing:
    """Whether checkpoints share memory with earlier ones; `say` hears why one does not."""

    wanted: bool = False
    say: Callable[[str], None] = lambda line: None
    registry: RegistryOptions | None = None

    def begin(self, container: Container, target: reference.Reference) -> incremental.Lineage:
        """What a checkpoint of `container` to `target` shares. Raises ConfigError, UnsupportedError."""
        if not self.wanted:
            return incremental.Lineage(container)
        return incremental.begin(container, target, None, registry_options=self.registry)

    def end(self, lineage: incremental.Lineage) -> None:
        for note in lineage.notes:
            self.say(note)


@dataclass(frozen=True)
class Sealing:
    """Whom images are encrypted to, and what opens them again for a restore."""

    encrypt_to: Recipients | None = None
    identities: Identities | None = None

    def check(self, to: str, *, incremental: bool, restores: bool) -> None:
        """Refuse what cannot work, before a crash shows it. Raises UsageError, TrustError."""
        if not self.encrypt_to:
            return
        if to in ("tmpfs", "disk"):
            raise UsageError("--encrypt-to is for images, not directories", hint="give --to HOST/REPO")
        if incremental:
            raise UsageError(
                "--incremental shares memory with the checkpoint before, and an encrypted one shares none",
                hint="leave out --incremental, or --encrypt-to",
            )
        if restores and not (self.identities and self.identities.opens(self.encrypt_to)):
            known = "no key here opens" if self.identities else "there is no key here that opens"
            raise TrustError(
                f"{known} what is encrypted to these recipients, so nothing could be restored after a crash",
                hint="give --decrypt-key FILE of one of them, put that file into /etc/cryoci/decrypt, or guard with "
                "--on-failure=none",
            )


def place(
    name: str,
    to: str,
    options: RegistryOptions | None,
    sharing: Sharing | None = None,
    work: Work = silent,
    sealing: Sealing | None = None,
) -> Place:
    """The place that `to` names, for the guard of container `name`. Raises UsageError."""
    if to == "tmpfs":
        return Directories(guard_state.memory() / name, durable=False, sharing=sharing, work=work)
    if to == "disk":
        return Directories(
            guard_state.directory(name) / "checkpoints", durable=True, sharing=sharing, work=work
        )
    ref = reference.parse(to) if "/" in to else None
    if not isinstance(ref, reference.RegistryRef) or ref.tag or ref.digest:
        raise UsageError(f"--to {to} is no place", hint="write tmpfs, disk, or HOST/REPO of a registry")
    return Repository(ref, name, options, sharing, work, sealing)


class Directories:
    """Checkpoint directories BASE/NUMBER; one that is not complete is called new."""

    def __init__(
        self, base: Path, *, durable: bool, sharing: Sharing | None = None, work: Work = silent
    ) -> None:
        self._base = base
        self._work = work
        self._sharing = sharing or Sharing()
        self._durable = durable

    def take(self, container: Container, number: int, options: DumpOptions) -> Kept:
        self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh, final = self._base / "new", self._base / str(number)
        shutil.rmtree(fresh, ignore_errors=True)  # of a guard that was killed
        lineage = self._sharing.begin(container, reference.DirectoryRef(fresh))
        options = replace(options, parent=lineage.local)
        with dumping(container, fresh, options, self._work) as done:
            taken = time.time()
            if self._durable:
                sync_tree(fresh)
            size = _check(fresh)
            shutil.rmtree(final, ignore_errors=True)
            fresh.rename(final)
            if self._durable:
                sync_directory(self._base)
        files = lineage.finish(final, thin=False)
        self._sharing.end(lineage)
        return Kept(number, str(final), taken - _resumed(done), _pause(done), size, shared=files.shared)

    def has(self, kept: Kept) -> bool:
        return Path(kept.where).is_dir()

    @contextmanager
    def open(self, kept: Kept) -> Iterator[Path]:
        _check(Path(kept.where))
        yield Path(kept.where)

    def drop(self, kept: Kept) -> None:
        if Path(kept.where).parent == self._base:  # nothing but what this guard made
            shutil.rmtree(kept.where, ignore_errors=True)


class Repository:
    """Images HOST/REPO:NAME-guard-NUMBER, remembered and fetched by their digests."""

    def __init__(
        self,
        ref: reference.RegistryRef,
        name: str,
        options: RegistryOptions | None,
        sharing: Sharing | None = None,
        work: Work = silent,
        sealing: Sealing | None = None,
    ) -> None:
        self._ref = ref
        self._sealing = sealing or Sealing()
        self._work = work
        self._sharing = sharing or Sharing()
        self._name = name
        self._options = options

    def take(self, container: Container, number: int, options: DumpOptions) -> Kept:
        tagged = f"{self._ref}:{self._name[:100]}-guard-{number}"
        goal = reference.parse(tagged)
        assert isinstance(goal, reference.RegistryRef)
        lineage = self._sharing.begin(container, goal)
        options = replace(options, parent=lineage.local)
        with (
            scratch("guard.") as place,
            dumping(container, place / "checkpoint", options, self._work) as done,
        ):
            taken = time.time()
            size = _check(done.directory)
            with self._work(f"push {tagged}") as progress:
                pushed = image.push(
                    done.directory,
                    goal,
                    progress=progress,
                    registry_options=self._options,
                    encrypt_to=self._sealing.encrypt_to,
                    parent=lineage.image,
                )
            lineage.stored(done.directory, self._ref, pushed.digest)
        self._sharing.end(lineage)
        where = f"{self._ref}@{pushed.digest}"
        return Kept(number, where, taken - _resumed(done), _pause(done), size, shared=pushed.shared)

    def has(self, kept: Kept) -> bool:
        return True

    @contextmanager
    def open(self, kept: Kept) -> Iterator[Path]:
        with scratch("guard.") as place:
            with self._work(f"fetch checkpoint {kept.number}") as progress:
                pulled = image.pull(
                    self._at(kept),
                    place / "checkpoint",
                    progress=progress,
                    registry_options=self._options,
                    identities=self._sealing.identities,
                )
            yield pulled.directory

    def drop(self, kept: Kept) -> None:
        image.remove(self._at(kept), registry_options=self._options)

    def _at(self, kept: Kept) -> reference.RegistryRef:
        ref = reference.parse(kept.where)
        assert isinstance(ref, reference.RegistryRef)
        return ref


def _check(directory: Path) -> int:
    """Bytes of a checkpoint that is whole. Raises CryociError."""
    images.check(str(directory / "checkpoint"))
    return sum(file.size for file in archive.validate(directory).files)


def _pause(done: Checkpoint) -> float:
    """Seconds that the container stood still."""
    return sum(t for name, t in done.seconds.items() if name not in _NO_PAUSE)


def _resumed(done: Checkpoint) -> float:
    """Seconds from the freeze to now, in the block: it thawed at the end of the pause, then its hooks ran."""
    return _pause(done) + done.seconds.get("post-restore hooks", 0.0)


def try_drop(where: Place, kept: Kept) -> str:
    """Remove a checkpoint; returns "" or why it stays."""
    try:
        where.drop(kept)
    except (CryociError, OSError) as e:
        return e.message if isinstance(e, CryociError) else str(e)
    return ""
