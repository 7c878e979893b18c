# SPDX-License-Identifier: Apache-2.0
"""Restore under podman: find the base image, hand podman a safe archive, look at what came of it."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import subprocess
import tarfile
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from cryoci import trace
from cryoci.command import describe, run
from cryoci.errors import (
    ConflictError,
    NotFoundError,
    RestoreError,
    SpaceError,
    UnsupportedError,
)
from cryoci.files import scratch
from cryoci.shim import cgroup, handover, netns, underlying, untrusted
from cryoci.shim.config import load
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.devices import inject
from cryoci.shim.devices.settle import settle
from cryoci.shim.doctor.check import Facts
from cryoci.shim.engines import engines_own, podman, podman_init, wake
from cryoci.shim.engines.interrupt import deferred, whole
from cryoci.shim.engines.options import Restored, RestoreOptions, read_dump
from cryoci.shim.engines.podman import Storage
from cryoci.shim.engines.watch import watching
from cryoci.shim.gpu.restoring import MAP_ANNOTATION
from cryoci.shim.memory import index as memory
from cryoci.shim.restore import made_by

_MOMENT = 0.2  # seconds that a restored process must live to count, from podman's word on
# What podman's import reads (libpod/container_internal_common.go); the rest of the directory stays out.
_FILES = ("network.status", "devshm-checkpoint.tar", "rootfs-diff.tar", "deleted.files", "ctr.log")


def restore(directory: Path, own: dict[str, Any], options: RestoreOptions, criu: CriuOptions) -> Restored:
    """Restore under podman. Raises RestoreError, ConflictError, NotFoundError; nothing is left then."""
    started = time.monotonic()
    images = str(directory / "checkpoint")
    foreign = own["engine"] != "podman"
    wanted = read_dump(directory, "config.dump")
    with trace.span("ask podman"):
        storage, known, base = _ask(wanted)
    config = untrusted.podman_config(
        wanted,
        volumes=storage.volumes,
        made_here=engines_own.KUBELETS if foreign else podman_init.PLACES,
        allow=options.allow,
        injected=inject.carried(images).injected,
    )
    if foreign:
        engines_own.stand_in(config["spec"])
    else:
        podman_init.settle(config["spec"], Facts())
    config["spec"].setdefault("annotations", {})[MAP_ANNOTATION] = options.device_map
    devices = inject.on_restore(config["spec"], images, load().devices)
    _mount_volumes(config, storage.volumes)
    name = options.name or str(config.get("name", ""))
    container_id = str(config.get("id", ""))
    _check_free(known, name, container_id, renamed=options.name is not None)
    seconds: dict[str, float] = {}
    with trace.timed(seconds, "base image"):
        _find_base(config, own, base)
    if options.runtime:
        config["runtime"] = options.runtime
    used = os.path.basename(str(config.get("runtime")))
    _check_runtime(used, made_by(images))
    if used in underlying.DEFAULTS and memory.exists(images):
        raise UnsupportedError(
            f"the checkpoint has memory out of band, which {used} without cryoci does not restore",
            hint="restore it with --runtime cryoci-runtime, or first: cryoci materialize DIRECTORY",
        )
    before = set(known)
    volumes = _new_volumes(config, brought=(directory / "volumes").is_dir(), allow=options.allow)
    with ExitStack() as undo:
        undo.callback(_clean, name, before, volumes)
        with ExitStack() as held:
            left = frozenset[str]()
            if used == podman.OURS:  # a plain runtime knows nothing of what is not in the archive
                # podman before 5.5 has no word for it
                apart, criu = {"tcp-close": criu.tcp_close}, dataclasses.replace(criu, tcp_close=None)
                noted = config["spec"]["annotations"]
                left = held.enter_context(handover.offered(images, noted, apart))
            archive = held.enter_context(scratch("import.")) / "archive.tar"
            with trace.timed(seconds, "archive"):
                _write_archive(directory, config, archive, left)
            argv = ["podman", "container", "restore", f"--import={archive}"]
            if options.name:
                argv.append(f"--name={options.name}")
            argv += _flags(criu)
            if not (directory / "volumes").is_dir():
                argv.append("--ignore-volumes")
            with trace.timed(seconds, "restore"):
                _import(argv, name, Path(storage.root))
            until = time.monotonic() + _MOMENT
        with trace.timed(seconds, "proof"):
            made, pid = _running(name, until, devices, network=foreign)
        result = Restored("podman", made, name, pid=pid, seconds=seconds)
        wake.podman(result, config["spec"], options)
        options.settled()
        undo.pop_all()
    seconds["total"] = time.monotonic() - started
    if not options.detach:
        result.status = subprocess.run(["podman", "attach", "--no-stdin", made]).returncode
    return result


def in_place(container: Any, images: Path, criu: CriuOptions) -> None:
    """Restore a container of this node that podman still knows, from CRIU images that lie elsewhere."""
    wanted = Path(container.bundle) / "checkpoint"
    shutil.rmtree(wanted, ignore_errors=True)
    shutil.copytree(images, wanted)
    # podman must have seen the end of the container before it restores it
    run(["podman", "wait", "--ignore", "--", container.id], check=False, timeout=30)
    run(["podman", "container", "restore", "--keep", *_flags(criu), "--", container.id])


def _flags(criu: CriuOptions) -> list[str]:
    names = ("tcp-established", "tcp-close", "file-locks")
    return [f"--{name}" for name in names if criu.to_mapping().get(name)]


def _exists(kind: str, name: str) -> bool:
    return run(["podman", kind, "exists", "--", name], check=False).returncode == 0


@dataclass(frozen=True)
class _Base:
    """The base image as podman has it: its id, empty when it has none, the names that lead to it, and its top layer's
    directory in podman's storage."""

    id: str = ""
    names: frozenset[str] = frozenset()
    layer: str = ""


def _ask(config: Any) -> tuple[Storage, dict[str, str], _Base]:
    """Podman's storage, its containers (id to name), and the base image that `config` names.

    Every question starts a podman, which takes 25 ms of an idle processor and has no other to wait for. `podman info`
    takes six times as long, so it is asked only where the base image's layer does not lead to podman's database.
    """
    image = str(config.get("rootfsImageID", "")) if isinstance(config, dict) else ""
    with ThreadPoolExecutor(2, "cryoci-podman") as pool:
        names = pool.submit(_containers)
        found = pool.submit(_base, image)
        base = found.result()
        return podman.storage(base.layer), names.result(), base


def _base(image_id: str) -> _Base:
    """The image of that id."""
    if not image_id:
        return _Base()
    form = "--format={{.Id}} {{json .RepoTags}} {{json .RepoDigests}} {{json .GraphDriver.Data}}"
    asked = run(["podman", "image", "inspect", form, "--", image_id], check=False)
    if asked.returncode != 0:
        return _Base()
    found, *said = asked.stdout.decode().split(" ", 1)
    decoder, rest, known, layer = json.JSONDecoder(), " ".join(said).strip(), set[str](), ""
    while rest:
        value, end = decoder.raw_decode(rest)
        if isinstance(value, dict):
            layer = str(value.get("UpperDir") or "")
        else:
            known |= set(value or ())
        rest = rest[end:].strip()
    return _Base(found, frozenset(known), layer)


def _check_free(known: Mapping[str, str], name: str, container_id: str, *, renamed: bool) -> None:
    if name and name in known.values():
        raise ConflictError(
            f"a container called {name} exists on this node", hint="give another name: --name NAME"
        )
    if not renamed and container_id in known:
        raise ConflictError(
            f"the container {container_id[:12]} itself still exists on this node",
            hint="remove it (podman rm), or restore a copy with --name NAME",
        )


def _check_runtime(name: str, maker: str | None) -> None:
    """cryoci-runtime picks the maker itself; podman's plain runc or crun must be the one."""
    if maker in underlying.DEFAULTS and name in underlying.DEFAULTS and name != maker:
        raise UnsupportedError(
            f"the checkpoint was made by {maker}, and {name} cannot restore it",
            hint=f"restore it with --runtime {maker}",
        )


def _find_base(config: dict[str, Any], own: dict[str, Any], base: _Base) -> None:
    """Make sure that podman will use the very base image of the checkpoint; pull it by digest if need be."""
    image_id, name = str(config.get("rootfsImageID", "")), str(config.get("rootfsImageName", ""))
    if not image_id:
        return
    if base.id != image_id:
        reference = own["annotations"].get("image.reference")
        digest = own["annotations"].get("image.digest")
        if not isinstance(reference, str) or "@sha256:" not in reference or reference.startswith("-"):
            raise NotFoundError(
                f"the base image {name} (id {image_id[:12]}, digest {digest or 'unknown'}) is not on this node, and "
                "the checkpoint names no registry that has it",
                hint="copy it here: podman save on the first node, podman load on this one; or push it to a registry "
                "and pull it from there before the container is started",
            )
        podman.pull(reference)
        base = _base(image_id)
        if base.id != image_id:
            raise RestoreError(
                f"{reference} is not the base image of the checkpoint (id {image_id[:12]})",
                hint="the registry serves another image under that digest's name",
            )
    # podman looks the base up by name: here the name may be missing, or be another image's
    for known in (name, own["annotations"].get("image.reference"), image_id):
        if isinstance(known, str) and known and (known in base.names or _image_id(known) == image_id):
            config["rootfsImageName"] = known
            return


def _image_id(name: str) -> str:
    asked = run(["podman", "image", "inspect", "--format={{.Id}}", "--", name], check=False)
    return asked.stdout.decode().strip() if asked.returncode == 0 else ""


def _new_volumes(config: dict[str, Any], *, brought: bool, allow: Collection[str]) -> set[str]:
    """Volumes that the import will make. One of that name that is here already is this node's own."""
    names = {str(v["volumeName"]) for v in config.get("namedVolumes") or ()}
    here = sorted(name for name in names if _exists("volume", name))
    if here and brought:
        raise ConflictError(
            f"the checkpoint brings the content of volumes that exist on this node: {', '.join(here)}",
            hint=f"move them out of the way first: podman volume rm {' '.join(here)}",
        )
    if here and "mounts" not in allow:
        raise RestoreError(
            f"the checkpoint would get volumes that exist on this node: {', '.join(here)}",
            hint="if they are its own, and you trust where it comes from, add: --allow mounts",
        )
    return names - set(here)


def _mount_volumes(config: dict[str, Any], volumes: str) -> None:
    """Mount the named volumes: podman itself does so when it starts a container, not when it imports one."""
    mounts = config["spec"]["mounts"]
    there = {mount["destination"] for mount in mounts}
    for volume in config.get("namedVolumes") or ():
        if volume["dest"] not in there:
            source = f"{volumes}/{volume['volumeName']}/_data"
            options = ["rbind", "rprivate", "nosuid", "nodev"]
            if "ro" in (volume.get("options") or ()):
                options.append("ro")
            mounts.append(
                {"destination": volume["dest"], "type": "bind", "source": source, "options": options}
            )


def _write_archive(directory: Path, config: dict[str, Any], archive: Path, left: frozenset[str]) -> None:
    """The archive that `podman container restore --import` takes, with nothing in it that was not checked.

    CRIU's images called `left` stay out.
    """

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        folder, _, name = member.name.rpartition("/")
        return None if folder == "checkpoint" and name in left else member

    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, value in (("config.dump", config), ("spec.dump", config["spec"])):
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o600
            tar.addfile(member, BytesIO(data))
        for name in _FILES:
            if (directory / name).is_file():
                tar.add(directory / name, name, recursive=False)
        for folder in ("artifacts", "checkpoint", "pre-checkpoint", "volumes"):
            if (directory / folder).is_dir():
                tar.add(directory / folder, folder, filter=wanted)


def _import(argv: list[str], name: str, storage: Path) -> None:
    with watching(storage / "overlay-containers") as watch:
        result = whole(argv)
        watch.stop()
        if result.returncode == 0:
            return
        cause, kept = watch.cause()
    if cause is not None:
        raise RestoreError(
            f"podman could not restore {name}: {cause.summary}", hint=f"{cause.hint} (log: {kept})"
        )
    said = result.stderr.decode(errors="replace").strip()
    if "no space left on device" in said.lower():
        raise SpaceError(
            f"podman could not restore {name}: its storage {storage} is full",
            hint=f"make room there: podman image prune, podman system df ({said})",
        )
    raise RestoreError(
        f"podman could not restore {name}: {said or describe(argv, result)}",
        hint="this podman lacks that; restore with --runtime cryoci-runtime, which needs none of its flags"
        if "unknown flag" in said
        else "podman refused before CRIU was asked; its own words are above",
    )


def _containers() -> dict[str, str]:
    """All containers of podman's: id to name."""
    said = run(["podman", "ps", "--all", "--no-trunc", "--format={{.ID}} {{.Names}}"]).stdout.decode()
    return dict(line.split(" ", 1) for line in said.splitlines() if " " in line)


def _clean(name: str, before: set[str], volumes: set[str]) -> None:
    """Remove what a failed import has left: a container of that name that was not there before, and volumes.

    Whatever others have made meanwhile under another name is theirs.
    """
    with deferred():
        for made in {found for found, known in _containers().items() if known == name} - before:
            run(["podman", "rm", "--force", "--time=0", "--", made], check=False)
        for volume in volumes:
            run(["podman", "volume", "rm", "--", volume], check=False)


def _running(name: str, until: float, devices: dict[str, Any] | None, *, network: bool) -> tuple[str, int]:
    """Id and first process of the restored container, once it has proven to run: it lives at `until`.

    `network`: its own namespace gets a loopback.
    """
    seen = _inspect(name)
    pid = int((seen.get("State") or {}).get("Pid") or 0)
    if not _stays(pid, until):
        state = _inspect(name).get("State") or {}
        raise RestoreError(
            f"podman reports success, but container {name} is {state.get('Status', 'not there')}",
            hint=f"see `podman logs {name}`: exit code {state.get('ExitCode', 'unknown')}",
        )
    cgroup.gather(pid)  # podman runs a plain crun without us
    if network:
        netns.raise_loopback(pid)
    if devices:
        settle(pid, devices)
    return str(seen["Id"]), pid


def _inspect(name: str) -> dict[str, Any]:
    asked = run(["podman", "container", "inspect", "--", name], check=False)
    found: dict[str, Any] = json.loads(asked.stdout)[0] if asked.returncode == 0 else {}
    return found


def _stays(pid: int, until: float) -> bool:
    """Whether a process lives, and still does at `until` (monotonic)."""
    try:
        fd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return False
    try:
        return not select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]
    finally:
        os.close(fd)
