# SPDX-License-Identifier: Apache-2.0
"""`cryoci agent`: what a kubelet leaves in its checkpoint directory becomes images in a registry.

It looks at the directory every second (inotify would not see what came while it was away). An archive of CRI-O,
containerd or podman that no longer changes is packaged, pushed and signed; the same archive gives the same tag and
digest, so doing it twice does no harm. What is done is in /var/lib/cryoci/agent/state.json. Only archives that are
safe in the registry, and signed where that is asked for, are ever removed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryoci.errors import ConfigError, CryociError, NotFoundError, UsageError
from cryoci.files import read_json, scratch, write_json
from cryoci.ociimage import image, reference
from cryoci.ociimage.manifest import rfc3339
from cryoci.ociimage.progress import Work, silent
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim import paths
from cryoci.uses import kubelet_archive
from cryoci.uses.metrics import Metric

if TYPE_CHECKING:
    from cryoci.ociimage.seal.keyring import Recipients
    from cryoci.ociimage.trust.keys import SigningKey
    from cryoci.uses.node_labels import Labeller

VERSION = 1
_RETRY, _LONGEST_RETRY = 10.0, 600.0  # seconds


@dataclass(frozen=True)
class Options:
    """`to` is HOST/REPO; `keep` archives of each container stay on the node after their push (None: all).

    An archive is complete when it has not changed for `settle` seconds. Archives are looked for every `period`. With
    `key` each image is signed, and with `provenance` it is stated too that it comes from `node`. What is encrypted to
    `encrypt_to` has another digest each time.
    """

    directory: Path
    to: str
    keep: int | None = None
    settle: float = 3.0
    period: float = 1.0
    compression: str = "zstd:1"
    registry: RegistryOptions | None = None
    key: SigningKey | None = None
    provenance: bool = True
    node: str | None = None
    encrypt_to: Recipients | None = None


@dataclass
class Archive:
    """What is known of one archive: `digest` once it is pushed, `problem` while it cannot be; times are Unix's.

    `signed` is the id of the key that has signed its image.
    """

    stamp: list[int]
    digest: str = ""
    signed: str = ""
    pushed: float = 0.0
    problem: str = ""
    attempts: int = 0
    retry: float = 0.0


@dataclass
class State:
    """By file name."""

    archives: dict[str, Archive] = field(default_factory=dict)


class Agent:
    """The agent of this node; `say` gets one line about each thing that happened, `work` tells of long ones."""

    def __init__(
        self,
        options: Options,
        say: Callable[[str], None],
        labeller: Labeller | None = None,
        work: Work = silent,
    ) -> None:
        ref = reference.parse(options.to) if "/" in options.to else None
        if not isinstance(ref, reference.RegistryRef) or ref.tag or ref.digest:
            raise UsageError(f"--to {options.to} is no repository", hint="write HOST/REPO, without a tag")
        self._options = options
        self._say = say
        self._labeller = labeller
        self._work = work
        self._file = Path(paths.environment("CRYOCI_LIB", "/var/lib/cryoci")) / "agent" / "state.json"
        self.state = self._load()
        self._seen: dict[str, tuple[list[int], float]] = {}

    def metrics(self) -> list[Metric]:
        """Numbers for Prometheus."""
        known = list(self.state.archives.values())
        waiting = [one for one in known if not self._done(one)]
        size = sum(one.stamp[2] for one in known)
        return [
            Metric("cryoci_agent_archives", "gauge", "Archives on this node that are pushed (and signed).",
                   [({}, len(known) - len(waiting))]),
            Metric("cryoci_agent_failing", "gauge", "Archives that could not be pushed yet.", [({}, len(waiting))]),
            Metric("cryoci_agent_bytes", "gauge", "Bytes of known archives on this node.", [({}, size)]),
            Metric("cryoci_agent_pushed_timestamp_seconds", "gauge", "When the last archive was pushed.",
                   [({}, max((one.pushed for one in known), default=0.0))]),
        ]  # fmt: skip

    def run(self) -> None:
        """Look and work until a signal ends this process. Raises NotFoundError without the directory."""
        if not self._options.directory.is_dir():
            raise NotFoundError(
                f"no directory {self._options.directory}",
                hint="the kubelet's is /var/lib/kubelet/checkpoints",
            )
        self._say(f"watching {self._options.directory}, pushing to {self._options.to}")
        while True:
            if self._labeller is not None:
                self._labeller.refresh()
            self.look()
            time.sleep(self._options.period)

    def look(self) -> None:
        """One look at the directory, and all that can be done now."""
        here = self._files()
        gone = [name for name in self.state.archives if name not in here]
        for name in gone:
            del self.state.archives[name]
        if gone:
            self._save()
        self._seen = {name: seen for name, seen in self._seen.items() if name in here}
        for name, stamp in sorted(here.items(), key=lambda one: one[1][3]):
            known = self.state.archives.get(name)
            if known is None or known.stamp != stamp:
                known = Archive(stamp)
            if not self._done(known) and self._complete(name, stamp) and time.time() >= known.retry:
                self.state.archives[name] = known
                self._store(name, known)
        self._retire(here)

    def _done(self, known: Archive) -> bool:
        """Whether the registry has all of it."""
        key = self._options.key
        return bool(known.digest) and (key is None or known.signed == key.public.id)

    def _files(self) -> dict[str, list[int]]:
        """Archives in the directory: name -> device, inode, size, time of change (ns)."""
        found = {}
        with os.scandir(self._options.directory) as entries:
            for entry in entries:
                with contextlib.suppress(UsageError, FileNotFoundError):
                    kubelet_archive.created(entry.name)
                    info = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(info.st_mode):
                        found[entry.name] = [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns]
        return found

    def _complete(self, name: str, stamp: list[int]) -> bool:
        """Whether the archive has stood still for long enough while this agent looked."""
        now = time.monotonic()
        before, since = self._seen.setdefault(name, (stamp, now))
        if before != stamp:
            self._seen[name] = (stamp, now)
            return False
        return now - since >= self._options.settle

    def _store(self, name: str, known: Archive) -> None:
        """Push an archive and sign its image, as far as that is not done; what fails is tried again later."""
        doing = "pushed"
        try:
            if not known.digest:
                self._push(name, known)
            doing = "signed"
            self._sign(name, known)
        except (CryociError, OSError) as e:
            known.problem = e.message if isinstance(e, CryociError) else str(e)
            known.attempts += 1
            known.retry = time.time() + min(_RETRY * 2 ** (known.attempts - 1), _LONGEST_RETRY)
            self._say(f"{name} could not be {doing}, attempt {known.attempts}: {known.problem}")
        else:
            known.problem = ""
        self._save()

    def _push(self, name: str, known: Archive) -> None:
        options, path = self._options, self._options.directory / name
        taken = kubelet_archive.created(name)
        tagged = reference.parse(f"{options.to}:{kubelet_archive.tag(name)}")
        assert isinstance(tagged, reference.RegistryRef)
        with scratch("agent.") as place:
            with self._work("unpack") as progress:
                pulled = image.pull(reference.ArchiveRef(path), place / "checkpoint", progress=progress)
            with self._work(f"push {tagged}") as progress:
                pushed = image.push(
                    pulled.directory,
                    tagged,
                    compression=options.compression,
                    annotations={**gpu_facts(pulled.directory), "checkpointed": rfc3339(taken)},
                    created=taken,  # one archive, one digest, whenever it is pushed
                    progress=progress,
                    registry_options=options.registry,
                    encrypt_to=options.encrypt_to,
                )
        known.digest, known.pushed = pushed.digest, time.time()
        self._save()
        sizes = f"{pushed.raw_size / 1e6:.1f} MB as {pushed.size / 1e6:.1f} MB"
        self._say(f"pushed {tagged}: {sizes} in {pushed.seconds:.1f} s, {pushed.digest}")

    def _sign(self, name: str, known: Archive) -> None:
        options = self._options
        if options.key is None:
            return
        from cryoci.ociimage.trust.sign import sign

        pinned = reference.parse(f"{options.to}@{known.digest}")
        assert isinstance(pinned, reference.RegistryRef)
        sign(
            pinned,
            options.key,
            with_provenance=options.provenance,
            node=options.node,
            registry_options=options.registry,
        )
        known.signed = options.key.public.id
        self._say(f"signed {pinned}" + (" and its provenance" if options.provenance else ""))

    def _retire(self, here: dict[str, list[int]]) -> None:
        """Remove the oldest archives of each container beyond those to keep, if the registry has them."""
        if self._options.keep is None:
            return
        of: dict[str, list[str]] = {}
        for name, known in self.state.archives.items():
            if self._done(known) and here.get(name) == known.stamp:
                of.setdefault(kubelet_archive.parse(name)[0], []).append(name)
        for names in of.values():
            names.sort(key=lambda name: kubelet_archive.parse(name)[1])
            for name in names[: len(names) - self._options.keep]:
                (self._options.directory / name).unlink(missing_ok=True)
                del self.state.archives[name]
                self._save()
                self._say(f"removed {name}, which the registry has")

    def _load(self) -> State:
        try:
            value: dict[str, Any] = read_json(self._file)
            if value.pop("version") != VERSION:
                raise ValueError("it is of another version of cryoci")
            return State({name: Archive(**one) for name, one in value["archives"].items()})
        except FileNotFoundError:
            return State()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(
                f"the agent's state cannot be read: {self._file}: {e}",
                hint="remove it: what was pushed is pushed again, to the same digests",
            ) from e

    def _save(self) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self._file, {"version": VERSION, **asdict(self.state)})


def gpu_facts(directory: Path) -> dict[str, str]:
    """The facts about GPUs that a node is chosen by; an engine's archive has them in files only.

    Raises ImageError.
    """
    from cryoci.shim.gpu import amd, dump, hold

    images = str(directory / "checkpoint")
    found = dump.read(images)
    return {**(hold.image_facts(found) if found is not None else {}), **amd.image_facts(images)}
