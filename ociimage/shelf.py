# SPDX-License-Identifier: Apache-2.0
"""Names and archives of images: tag, pin, save, load; and lists of archives as the kubelet leaves them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryoci.errors import CryociError, ImageError, NotFoundError, PrivilegeError, UsageError
from cryoci.ociimage import blob, contents, ociarchive, reference, report, stores, transfer
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import INDEX_TYPES, MAX_MANIFEST, Index, Manifest
from cryoci.ociimage.progress import Progress
from cryoci.ociimage.reference import ArchiveRef, LayoutRef, RegistryRef
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.unpack import Gate

MAX_LISTED = 10_000  # archives of one directory
# kubelet: checkpoint-<pod>_<namespace>-<container>-<RFC 3339>.tar; names of Kubernetes hold no underscore
_KUBELET = re.compile(r"checkpoint-([^_]+)_(.+)-(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:Z|[+-]\d\d:\d\d))\.tar\Z")


@dataclass(frozen=True)
class Tagged:
    """An image that now has `names`."""

    digest: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """An archive of an image; `size` is in bytes."""

    path: Path
    size: int
    digest: str


@dataclass(frozen=True)
class Archived:
    """An archive in a directory; `problem` says why it could not be read, and the rest is then empty."""

    path: Path
    size: int
    namespace: str = ""
    pod: str = ""
    container: str = ""
    engine: str = ""
    checkpointed: str = ""
    problem: str = ""


def tag(
    ref: LayoutRef | RegistryRef,
    names: Sequence[str],
    *,
    pin: bool | None = None,
    registry_options: RegistryOptions | None = None,
) -> Tagged:
    """Give an image each of `names` in its own layout or repository, and pin it (or not).

    A full reference is as good as a tag, when it is of the same place. Raises NotFoundError, UsageError.
    """
    store = stores.open_store(ref, registry_options)
    if pin is not None and not isinstance(store, Layout):
        raise UsageError(
            "a registry keeps no pins", hint="name it to `cryoci gc --keep PATTERN`, or pin it in a layout"
        )
    source = stores.source_name(ref, store)
    top = store.get_manifest(source)
    tags = [_tag(ref, name) for name in names]
    with store.session():
        for name in tags:
            store.put_manifest(top.data, top.media_type, name)
            stores.confirm(store, name, top.digest)
    if pin is not None and isinstance(store, Layout):
        for name in tags or [ref.name if isinstance(ref, LayoutRef) and ref.name else source]:
            store.pin(name, pin)
    return Tagged(top.digest, tuple(tags or [source]))


def _tag(ref: LayoutRef | RegistryRef, text: str) -> str:
    """The tag that `text` means beside `ref`. Raises UsageError when it is of another place."""
    if isinstance(ref, RegistryRef) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", text):
        return text
    target = reference.parse(text)
    if isinstance(target, LayoutRef) and isinstance(ref, LayoutRef) and target.path == ref.path:
        return stores.target_name(target)
    if (
        isinstance(target, RegistryRef)
        and isinstance(ref, RegistryRef)
        and (target.host, target.repository) == (ref.host, ref.repository)
    ):
        return stores.target_name(target)
    raise UsageError(f"{text} is not in the place of {ref}", hint=f"copy it: cryoci copy {ref} {text}")


def save(
    ref: LayoutRef | RegistryRef,
    path: Path,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
) -> Saved:
    """Write an image to one file that `load`, skopeo, podman and containerd read; digests stay."""
    store = stores.open_source(ref, registry_options)
    name = stores.source_name(ref, store)
    digest = store.get_manifest(name).digest
    known = (
        ref.name
        if isinstance(ref, LayoutRef)
        else str(RegistryRef(ref.host, ref.repository, ref.tag or "latest"))
    )
    size = ociarchive.save(store, digest, path, known or "checkpoint:latest", progress=progress)
    return Saved(path, size, digest)


def load(
    path: Path,
    target: LayoutRef | RegistryRef | None,
    *,
    progress: Progress | None = None,
    registry_options: RegistryOptions | None = None,
    gate: Gate | None = None,
) -> list[Tagged]:
    """Load the images of an archive into the local store under their names, or its one image to `target`.

    `gate` is as in `unpack.pull`. Raises NotFoundError, ImageError, IntegrityError, TrustError, UsageError for several
    images and one target.
    """
    if gate is not None:
        gate(None, None)
    with ociarchive.scratch_layout() as scratch:
        with scratch.session():
            found = ociarchive.load(path, scratch, progress=progress)
            for number, (_, entry) in enumerate(found):
                data = blob.read_small(scratch, entry, MAX_MANIFEST)
                _check_restorable(data, entry.media_type)
                scratch.put_manifest(data, entry.media_type, str(number))
        if target is not None and len(found) != 1:
            raise UsageError(
                f"{path} holds {len(found)} images and cannot become {target}",
                hint="leave the target out to load all of them into the local store",
            )
        result = []
        for number, (name, _) in enumerate(found):
            goal = target or _stored(name, path)
            done = transfer.copy(
                LayoutRef(scratch.path, str(number)), goal, registry_options=registry_options
            )
            result.append(Tagged(done.digest, (str(goal),)))
    return result


def _check_restorable(data: bytes, media_type: str) -> None:
    """Refuse what is no image: containerd's own kind of checkpoint, for which `convert` is."""
    from cryoci.ociimage import ctr

    if media_type not in INDEX_TYPES:
        Manifest.parse(data)
    elif ctr.is_checkpoint(Index.parse(data)):
        raise ImageError(
            "the archive is a checkpoint of containerd's `ctr`, whose parts no registry takes",
            hint="make an image of it: cryoci push FILE.tar NAME",
        )


def _stored(name: str, path: Path) -> LayoutRef:
    """Where an image of that name goes in the local store; a registry's name keeps its last part."""
    text = name or path.name.partition(".")[0]
    found = reference.parse(text.rpartition("/")[2] if "/" in text else text)
    if not isinstance(found, LayoutRef):
        raise UsageError(f"{path} does not say a name for its image", hint="give one: cryoci load FILE NAME")
    return found


def archives(directory: Path) -> list[Archived]:
    """The checkpoint archives of a directory, by name; their descriptions are read, their memory skipped.

    Raises NotFoundError, PrivilegeError. One broken archive does not hide the others.
    """
    try:
        names = sorted(e.name for e in os.scandir(directory) if e.name.endswith(reference.ARCHIVE_SUFFIXES))
    except FileNotFoundError as e:
        raise NotFoundError(f"no directory {directory}") from e
    except PermissionError as e:
        raise PrivilegeError(f"cannot read {directory}", hint="run as root") from e
    return [_archived(directory / name) for name in names[:MAX_LISTED]]


def _archived(path: Path) -> Archived:
    size = path.stat().st_size
    match = _KUBELET.match(path.name)
    pod, namespace, when = (match[1], match[2].partition("-")[0], match[3]) if match else ("", "", "")
    try:
        with contents.opened(
            ArchiveRef(path), lambda name: "/" not in name and contents.is_description(name)
        ) as c:
            facts = report.facts_of(c)
    except CryociError as e:
        return Archived(path, size, namespace, pod, problem=e.message)
    return Archived(
        path,
        size,
        facts.get("pod.namespace", namespace),
        facts.get("pod.name", pod),
        facts.get("container.name", ""),
        facts.get("engine.name", ""),
        facts.get("checkpointed", when),
    )
