# SPDX-License-Identifier: Apache-2.0
"""Where `cryoci share` puts a parked member that host memory has no room for: a checkpoint on disk or in a registry.

    parked -> checkpoint, stored and read back -> note -> ended ... restored -> note and checkpoint go

The note, /var/lib/cryoci/share/NAME.json, is there before the container ends and until it runs again, so whoever was
killed in between finds either the container, or the note and what it names.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryoci.command import run
from cryoci.errors import (
    ConfigError,
    ConflictError,
    CryociError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from cryoci.files import read_json, scratch, sync_directory, write_json
from cryoci.ociimage import archive, image, reference
from cryoci.ociimage.criu import processes as criu_processes
from cryoci.ociimage.criu.image import DirectoryImages
from cryoci.ociimage.reference import DirectoryRef, LayoutRef, RegistryRef
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim import app, engines, netns, paths, untrusted
from cryoci.shim.criu import images
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.engines import asleep, bare, gpu, podman, processes
from cryoci.shim.engines.checkpoint import checkpoint
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.options import DumpOptions, RestoreOptions
from cryoci.shim.engines.restore import restore
from cryoci.shim.gpu import dump as dumps
from cryoci.shim.gpu import hold as holds
from cryoci.shim.gpu import preflight
from cryoci.shim.record import Record
from cryoci.uses import leftover
from cryoci.uses.guard_state import start_time

VERSION = 1
_NO_HOOKS = app.Choice(off=True)  # in a frozen container they could not run: parking has done them
_NO_NAME = re.compile(r"[^a-z0-9]+")


@dataclass
class Stored:
    """A member that was checkpointed and ended: `where` is a directory, or an image with its digest.

    `of` is its first process and when that started, `bundle` where a bare one's file system stayed (""; its checkpoint
    has it), `need` the bytes of host memory that it takes, `gpus` its gpu.dump. `restoring`: that was begun.
    `severed`: it holds connections that were closed under it, which CRIU takes for open ones. `awake`: its application
    prepared itself before it was parked, and takes so many bytes by UUID of the GPU when it is itself again.
    """

    name: str
    engine: str
    runtime: str
    id: str
    of: tuple[int, int]
    bundle: str
    tier: Literal["disk", "registry"] = "disk"
    where: str = ""
    taken: float = 0.0
    size: int = 0
    need: int = 0
    gpus: dict[str, Any] | None = None
    restoring: bool = False
    severed: bool = False
    awake: dict[str, int] | None = None

    def save(self) -> None:
        """Write the note. Raises OSError."""
        file = _file(self.name)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(file, {"version": VERSION, **dataclasses.asdict(self)})

    def forget(self) -> None:
        """Remove the note, if there is one. Raises OSError."""
        file = _file(self.name)
        if file.exists():
            file.unlink()
            sync_directory(file.parent)

    @property
    def ended(self) -> bool:
        """Has the process ended of which it is the checkpoint?"""
        return start_time(self.of[0]) != self.of[1]


class Shelf:
    """Takes parked members and gives them back; `say` gets one line about what is no reason to fail.

    `goal` is a directory, a repository, or None: the local store.
    """

    def __init__(
        self,
        goal: DirectoryRef | RegistryRef | None,
        say: Callable[[str], None],
        registry: RegistryOptions | None = None,
    ) -> None:
        self._goal = goal
        self._say = say
        self._registry = registry

    def put(self, container: Container) -> Stored:
        """Checkpoint `container`, which is parked, and end it. Raises what a checkpoint raises: it is parked still."""
        refuse(container)
        pid = int(container.state().get("pid", 0))
        name, own = container.name, paths.bundle_directory(container.root, container.id)
        bundle = (
            "" if container.engine == "podman" or str(container.bundle) == own else str(container.bundle)
        )
        made = Stored(
            name, container.engine, container.runtime, container.id, (pid, start_time(pid)), bundle
        )
        made.need = processes.private_memory(pid)
        if (owed := asleep.load(container)) is not None:
            made.awake = dict(owed.vram)
        token = f"{_NO_NAME.sub('-', name.lower()).strip('-')[:60] or 'member'}-{secrets.token_hex(4)}"
        options = DumpOptions(rootfs="none" if bundle else "auto", hooks=_NO_HOOKS)
        try:
            if isinstance(self._goal, DirectoryRef):
                place = self._goal.path.resolve() / token
                options = dataclasses.replace(options, durable=True)
                with _swept(name, place), checkpoint(container, place, options):
                    made.where = str(place)
                    _note(made, place, container)
            else:
                self._put_image(container, made, token, options)
        except BaseException:
            if not made.where or made.ended:
                if not made.where:
                    raise
                return made  # it is stored and ended: what failed after that does not matter
            made.forget()
            self._drop(made)
            raise
        return made

    def _put_image(self, container: Container, made: Stored, token: str, options: DumpOptions) -> None:
        goal: LayoutRef | RegistryRef = LayoutRef(reference.default_store(), f"share/{token}:parked")
        if isinstance(self._goal, RegistryRef):
            goal = dataclasses.replace(self._goal, tag=f"{token}-parked")
            made.tier = "registry"
        with scratch("share.") as work, checkpoint(container, work / "checkpoint", options) as done:
            pushed = image.push(done.directory, goal, registry_options=self._registry)
            made.where = str(dataclasses.replace(goal, digest=pushed.digest))
            _note(made, done.directory, container)

    def settle(self, name: str) -> Stored | None:
        """What is stored of member `name`, which does not run then. Raises ConfigError."""
        made = _load(name)
        _sweep(name, made)
        if made is None:
            return None
        if made.restoring:
            leftover.await_end("restore", made.id, made.name)
        try:
            found = engines.find(name)
            state = found.state()
        except NotFoundError:
            return made
        if state.get("status") not in ("running", "paused"):
            return made  # podman keeps one that has ended
        self.found(made, found)
        return None

    def found(self, made: Stored, container: Container) -> None:
        """Its container is there: it had not ended, was just restored, or somebody else has started one."""
        busy = None
        if made.restoring and made.engine != "podman":  # whoever restored it was killed before it did this
            netns.raise_loopback(int(container.state()["pid"]))
            busy = holds.load(Record(container.root, container.id))
        made.forget()
        if not made.ended or (made.restoring and busy is None):
            self._drop(made)
        else:
            self._say(
                f"{made.name} was started by somebody else; what was stored of it is kept: {made.where}"
            )

    def check(self, made: Stored) -> None:
        """Raise SpaceError while its GPUs have no room for it, ConflictError while host memory has none."""
        if made.gpus is not None:
            gpu.check_room(dumps.Dump.from_json(made.gpus), made.awake or {})
        free = preflight.available_memory()
        if made.need > free:
            raise ConflictError(
                f"{made.name} takes {made.need >> 20} MiB of host memory, and {free >> 20} MiB are free",
                hint="free some, or share among fewer members",
            )

    def bring(self, made: Stored) -> None:
        """Restore it, and forget it here. Raises what `check` and a restore raise; it stays stored then."""
        self.check(made)
        again, made.restoring = made.restoring, True
        made.save()
        try:
            with self._open(made) as directory:
                _clear(made, again=again)
                restore(
                    directory,
                    RestoreOptions(
                        name=made.name,
                        engine=made.engine,
                        runtime=None if made.engine == "podman" else made.runtime,
                        bundle=Path(made.bundle) if made.bundle else None,
                        hooks=_NO_HOOKS if made.awake is None else app.Choice(),
                        criu=CriuOptions(tcp_close=made.severed or None),
                        allow=untrusted.ALLOWABLE,  # made here, and kept where only root writes, or by its digest
                    ),
                )
        except BaseException:
            made.restoring = False
            with suppress(OSError):
                made.save()
            raise
        made.forget()
        self._drop(made)

    @contextmanager
    def _open(self, made: Stored) -> Iterator[Path]:
        ref = reference.parse(made.where)
        if isinstance(ref, DirectoryRef):
            _whole(ref.path)
            yield ref.path
            return
        assert isinstance(ref, (LayoutRef, RegistryRef))
        with scratch("share.") as work:
            yield image.pull(ref, work / "checkpoint", registry_options=self._registry).directory

    def _drop(self, made: Stored) -> None:
        """Remove what was stored: it is old now. Never fails."""
        try:
            ref = reference.parse(made.where)
            if isinstance(ref, DirectoryRef):
                if ref.path.exists():
                    shutil.rmtree(ref.path)
            elif isinstance(ref, LayoutRef):
                image.remove(dataclasses.replace(ref, digest=None))  # its name is nobody else's
            elif isinstance(ref, RegistryRef):
                image.remove(ref, registry_options=self._registry)
        except (CryociError, OSError) as e:
            why = e.message if isinstance(e, CryociError) else str(e)
            self._say(f"{made.where}, which nobody needs any more, could not be removed: {why}")


def refuse(container: Container) -> None:
    """Raise ConflictError or UnsupportedError for one that would not come back as it was."""
    if not gpu.is_parked(container):
        raise ConflictError(f"container {container.name} is not parked", hint="park it first")
    if container.engine not in ("podman", "runc", "crun"):
        raise UnsupportedError(f"container {container.name} is {container.engine}'s, which restores its own")
    if container.auto_remove:
        raise ConflictError(
            f"container {container.name} is removed by podman with its volumes when it ends (--rm)",
            hint="start it without --rm",
        )
    if container.engine == "podman" and (policy := podman.restart_policy(container)) != "no":
        raise ConflictError(
            f"podman restarts container {container.name} from scratch when it ends (--restart={policy})",
            hint=f"podman update --restart=no {container.name}",
        )


def goal(disk: str | None, registry: str | None) -> DirectoryRef | RegistryRef | None:
    """Where members are to be stored: a directory, HOST/REPO, or (None) the local store. Raises UsageError."""
    if disk and registry:
        raise UsageError("--disk and --registry are two places", hint="give one")
    if disk:
        return DirectoryRef(Path(disk))
    ref = reference.parse(registry) if registry and "/" in registry else None
    if registry and (not isinstance(ref, RegistryRef) or ref.tag or ref.digest):
        raise UsageError(f"--registry {registry} is no repository", hint="write HOST/REPO, without a tag")
    return ref if isinstance(ref, RegistryRef) else None


def stored(name: str) -> Stored | None:
    """What is stored of `name`, if anything is; no more than the note is looked at. Raises ConfigError."""
    return _load(name) if paths.valid_id(name) else None


def every() -> list[Stored]:
    """What is stored of all members, by name; what cannot be read is left out."""
    found = []
    for file in sorted(_base().glob("[!.]*.json")) if _base().is_dir() else []:
        with suppress(ConfigError, UsageError):
            found.append(_load(file.stem))
    return [made for made in found if made is not None]


@contextmanager
def _swept(name: str, place: Path) -> Iterator[None]:
    """Note that directory `place` is being made, for a with block: what a killed daemon leaves of it goes."""
    _base().mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(_base() / f".{name}.making", {"where": str(place)})
    try:
        yield
    finally:
        (_base() / f".{name}.making").unlink()


def _sweep(name: str, made: Stored | None) -> None:
    """Remove what a killed daemon has left half made of member `name`."""
    file = _base() / f".{name}.making"
    with suppress(FileNotFoundError):
        where = str(read_json(file)["where"])
        if made is None or made.where != where:
            shutil.rmtree(where, ignore_errors=True)
        file.unlink()


def _note(made: Stored, directory: Path, container: Container) -> None:
    """Its checkpoint in `directory` is whole and stored: from here on the container may end. Raises ConflictError."""
    dump = dumps.read(str(directory / "checkpoint"))
    made.gpus = dump.to_json() if dump is not None and dump.tasks else None
    made.severed = any(
        socket.protocol.startswith("tcp") and not socket.destination.endswith(":0")
        for process in criu_processes.read(DirectoryImages(directory))
        for socket in process.sockets
    )
    if made.severed and made.engine == "podman" and not podman.closes(container):
        raise ConflictError(
            f"{made.name} holds TCP connections that were closed under it, which podman before 5.5 cannot restore",
            hint="they are gone when it has run again; under --runtime cryoci-runtime they can be restored",
        )
    made.size, made.taken = _whole(directory), time.time()
    made.save()


def _whole(directory: Path) -> int:
    """Bytes of a checkpoint that is whole. Raises CryociError."""
    images.check(str(directory / "checkpoint"))
    return archive.validate(directory).size


def _clear(made: Stored, *, again: bool) -> None:
    """Free its name: of a container that has ended, and of what a killed restore (`again`) has half made.

    Raises ConflictError, ToolError.
    """
    if made.engine != "podman":
        left = bare.find(made.id, None)  # whoever ended it was killed before it deleted it
        if left is not None and left.status == "stopped":
            left.call("delete", "--force")
        return
    asked = run(["podman", "container", "inspect", "--format=json", "--", made.name], check=False)
    if asked.returncode != 0:
        return
    found = json.loads(asked.stdout)[0]
    status = found["State"]["Status"]
    ended = found["Id"] == made.id and status not in ("running", "paused")
    if not ended and not (again and status in ("configured", "created", "initialized")):
        raise ConflictError(
            f"another container {made.name} is there, and {status}",
            hint=f"rename it, and see `cryoci restore {made.where}`",
        )
    run(["podman", "rm", "--force", "--time=0", "--", found["Id"]])


def _base() -> Path:
    return Path(paths.environment("CRYOCI_LIB", "/var/lib/cryoci")) / "share"


def _file(name: str) -> Path:
    if not paths.valid_id(name):
        raise UsageError(f"{name!r} is not a name of a container", hint="see `cryoci ps`")
    return _base() / f"{name}.json"


def _load(name: str) -> Stored | None:
    file = _file(name)
    try:
        value = read_json(file)
        if value.pop("version") != VERSION:
            raise ValueError("it is of another version of cryoci")
        pid, started = value.pop("of")
        return Stored(of=(int(pid), int(started)), **value)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(
            f"what is stored of {name} cannot be read: {file}: {e}",
            hint="restore it by hand from the place that it names, then remove that file",
        ) from e
