# SPDX-License-Identifier: Apache-2.0
"""From one engine's checkpoint to another's: names, descriptions and file system in the other's words.

What the other engine has no place for is not dropped in silence: `convert` returns the list of it. The
CRIU images themselves are never touched.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from cryoci.errors import ConflictError, UnsupportedError, UsageError
from cryoci.ociimage import archive, dialects, rootfsdiff
from cryoci.ociimage.descriptions import HEX64, Base, Converted, Lost, describe
from cryoci.ociimage.dialects import BARE, CRIO, PODMAN, Dialect, Model

# the mode of a container's root directory: containers/storage, and containerd's overlayfs snapshotter
ROOT_MODES = {"crio": 0o555, "podman": 0o555, "containerd": 0o755}


def convert(
    model: Model, dialect: Dialect, directory: Path, *, base: Base | None = None, bundled: bool = False
) -> Converted:
    """Make `directory`, the checkpoint of `model` in the words of `dialect`; files are linked, not copied,
    where both lie in one file system.

    `base` is the image to restore onto, for checkpoints that name none (runc, crun) or another engine's.
    `bundled`: whoever restores takes spec.dump as his bundle's config.json (ctr), and makes no new one.
    Raises ConflictError, UnsupportedError when the CRIU images cannot be carried, UsageError without a base.
    """
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise ConflictError(f"{directory} exists", hint="name another directory") from None
    done = Converted(directory, dialect.name)
    _check_dump(model, dialect)
    base = _base(model, dialect, base)
    _files(model, dialect, done)
    _rootfs(model, dialect, done)
    _log(model, dialect, done)
    _root_mode(model, dialect, done)
    describe(model, dialect, base, done, bundled=bundled)
    _options(model, done)
    return done


def _check_dump(model: Model, dialect: Dialect) -> None:
    if model.checkpoint.has_parent and "pre-checkpoint" not in dialect.folders:
        raise UnsupportedError(
            f"this checkpoint is incremental (podman --with-previous), and {dialect.name} has no such archives",
            hint="make a full one: leave --with-previous out",
        )


def own_base(model: Model) -> Base:
    """The base image that the checkpoint names; its fields may be empty."""
    facts = model.facts
    name, _, _ = facts.get("image.name", "").partition("@")
    return Base(name, facts.get("image.id", "").removeprefix("sha256:"), facts.get("image.digest", ""))


def _base(model: Model, dialect: Dialect, given: Base | None) -> Base:
    """The base image in the words of the target. Raises UsageError when nobody knows one."""
    found = given or own_base(model)
    if dialect is BARE:
        return found
    needs_id = dialect in (CRIO, PODMAN)
    if not found.name or (needs_id and not HEX64.match(found.id)):
        what = (
            "names no base image"
            if not found.name
            else f"does not say the id of its base image {found.name}"
        )
        raise UsageError(
            f"the checkpoint {what}, and {dialect.name} restores only onto one",
            hint="name it: --base-image NAME"
            + (" --base-id ID (podman image inspect --format {{.Id}} NAME)" if needs_id else ""),
        )
    return found


def _files(model: Model, dialect: Dialect, done: Converted) -> None:
    """Take over what both know by the same name."""
    rewritten = {archive.CONFIG, archive.SPEC, "rootfs-diff.tar", "deleted.files", "rootfs.tar", archive.OWN}
    for folder in model.checkpoint.folders:
        if folder in dialect.folders:
            (done.directory / folder).mkdir(mode=0o700)
    if model.checkpoint.has_parent:
        os.symlink(archive.PARENT_TARGET, done.directory / archive.PARENT)
    for file in model.checkpoint.files:
        folder, slash, _ = file.name.partition("/")
        if file.name in rewritten or file.name in dialects.LOGS:
            continue
        if (folder if slash else file.name) in (dialect.folders if slash else dialect.files):
            _link(model.directory / file.name, done.directory / file.name)
        elif why := _why_lost(model, file.name):
            done.lost.append(Lost(file.name, why))


def _why_lost(model: Model, name: str) -> str:
    """What it means that a file stays behind; empty when it means nothing to a restore."""
    if name.startswith("volumes/"):
        return "the content of a named volume: put it where the new container's volume is"
    if name == "devshm-checkpoint.tar":
        if rootfsdiff.is_empty(model.directory / name):
            return ""
        return "the content of /dev/shm: files there will be missing, and a process that has one open fails"
    reasons = {
        "network.status": "addresses and MACs: the new engine gives others",
        "bind.mounts": "which bind sources are files and which directories: make them before a restore",
        archive.STATUS: "labels and annotations as containerd's CRI knew them",
    }
    if name.startswith("artifacts/"):
        return "a file that the first engine kept beside the container"
    return reasons.get(name, "")


def _rootfs(model: Model, dialect: Dialect, done: Converted) -> None:
    names, source, target = model.names, model.directory, done.directory / "rootfs-diff.tar"
    # all files of a bare container are a change to any base: what the base has besides them stays visible
    diff = next((source / n for n in ("rootfs-diff.tar", "rootfs.tar") if n in names), None)
    if diff is not None and diff.name == "rootfs.tar":
        done.assumed.append("the whole root file system lies over the base image, whose other files stay")
    zipped = diff is not None and _gzipped(diff)
    deleted: list[str] = []
    if "deleted.files" in names:
        deleted = rootfsdiff.read_deleted(source / "deleted.files")
    if zipped == dialect.whiteouts and not (dialect.whiteouts and deleted):
        if diff is not None:
            _link(diff, target)
    elif dialect.whiteouts:
        if diff is not None or deleted:
            rootfsdiff.to_layer(diff, deleted, target)
    elif diff is not None:
        gone, hides_all = rootfsdiff.from_layer(diff, target)
        deleted = [*deleted, *gone]
        if hides_all:
            why = "it was emptied and filled anew: what the base image has in it will be visible again"
            done.lost.append(Lost("/", why))
    if deleted and not dialect.whiteouts:
        rootfsdiff.write_deleted(done.directory / "deleted.files", deleted)


def root_mode(model: Model) -> int | None:
    """Permission bits of the root directory at the dump, if the images tell. Raises ImageError."""
    # imported here, because every restore imports this module, and few look into processes
    from cryoci.ociimage.criu import processes
    from cryoci.ociimage.criu.image import DirectoryImages

    found = processes.read(DirectoryImages(model.directory))
    return next((p.root_mode & 0o7777 for p in found if p.root_mode), None)


def _root_mode(model: Model, dialect: Dialect, done: Converted) -> None:
    """CRIU wants the root directory with the mode that it had, and engines make their own."""
    mode, made = root_mode(model), ROOT_MODES.get(dialect.name)
    if mode is not None and made is not None and mode != made:
        done.assumed.append(
            f"CRIU runs with skip-file-rwx-check (/etc/criu/runc.conf): the root directory had mode {mode:o}, and "
            f"{dialect.name} makes it {made:o}"
        )


def _log(model: Model, dialect: Dialect, done: Converted) -> None:
    """All three write the kubelet's log format, each under a name of its own."""
    for name in dialects.LOGS:
        if name in model.names:
            _link(model.directory / name, done.directory / dialect.log)
            return


def _options(model: Model, done: Converted) -> None:
    """The options of the dump, which only cryoci.json keeps."""
    criu = model.own.get("criu")
    for name in ("tcp-established", "file-locks", "ext-unix-sk", "shell-job"):
        if isinstance(criu, dict) and criu.get(name) is True:
            done.lost.append(
                Lost(f"--{name}", "CRIU's option of the dump, which the restore must be given again")
            )


def _gzipped(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _link(source: Path, target: Path) -> None:
    """A hard link, which costs nothing; across file systems a copy."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(source, target, follow_symlinks=False)
