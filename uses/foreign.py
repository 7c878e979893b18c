# SPDX-License-Identifier: Apache-2.0
"""`cryoci restore` of what CRI-O or containerd has made, by podman, runc or crun of this node.

    whose is it -> who restores it here -> its base image -> in that engine's words -> restore

The archive is converted on the way (ociimage.convert); who restores, and what is not carried, is said.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryoci.command import run
from cryoci.errors import NotFoundError, UnsupportedError
from cryoci.files import write_json
from cryoci.ociimage import archive, convert, dialects
from cryoci.ociimage.descriptions import HEX64, Base
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim import underlying
from cryoci.shim.criu.rootmode import SKIP
from cryoci.shim.engines import podman
from cryoci.shim.engines.options import RestoreOptions
from cryoci.shim.engines.restore import describe
from cryoci.shim.restore import made_by
from cryoci.uses import base_image

_FOREIGN = {"cri-o": "CRI-O", "containerd": "containerd"}
_SHIM = "cryoci-runtime"
_CRIU_CONF = ("default.conf", "runc.conf", "crun.conf")
_SKIPS = re.compile(rf"^\s*{SKIP}\s*$", re.M)
_CARRIED = ("host.arch", "criu.version")


@dataclass
class Adopted:
    """A checkpoint in the words of `options.engine`, and what there is to say about it."""

    directory: Path
    options: RestoreOptions
    notes: list[str] = field(default_factory=list)


def adopt(
    directory: Path,
    options: RestoreOptions,
    place: Path,
    registry_options: RegistryOptions | None = None,
    *,
    criu_configuration: Path = Path("/etc/criu"),
) -> Adopted:
    """The checkpoint in `directory`, converted below `place` when it is CRI-O's or containerd's; else as it is.

    Raises NotFoundError without its base image, UnsupportedError when the engine asked for cannot take it, and what
    a conversion raises.
    """
    options = dataclasses.replace(options, base=base_image.filler(directory, registry_options))
    made_under = describe(directory)["engine"]
    if made_under in ("podman", *underlying.DEFAULTS):
        return Adopted(directory, options)
    model = dialects.read(directory)
    if made_under == "unknown":
        made_under = model.facts.get("engine.name", "")
    if made_under not in _FOREIGN:
        return Adopted(directory, options)
    maker = made_by(str(directory / "checkpoint")) or model.facts.get("runtime.name", "")
    maker = maker if maker in underlying.DEFAULTS else "runc"
    bare = options.bundle is not None or options.root is not None
    engine = options.engine or ("podman" if podman.installed() and not bare else maker)
    notes = [f"made under {_FOREIGN[made_under]}, restored under {engine} of this node"]
    _check_processes(model)
    base = convert.own_base(model)
    out = place / "adopted"
    runtime = options.runtime
    if engine == "podman":
        runtime = runtime or (_SHIM if _podman_knows(_SHIM) else maker)
        if runtime in underlying.DEFAULTS:
            _check_mode(model, runtime, criu_configuration)
        base = _base_of_podman(base, notes)
        done = convert.convert(model, dialects.PODMAN, out, base=base)
    else:
        done = convert.convert(model, dialects.BARE, out)
    notes += [f"not carried: {lost.what}: {lost.why}" for lost in done.lost if _matters(lost.what)]
    write_json(out / archive.OWN, _own(model, made_under, base))
    return Adopted(out, dataclasses.replace(options, engine=engine, runtime=runtime), notes)


def _own(model: dialects.Model, made_under: str, base: Base) -> dict[str, Any]:
    """cryoci.json of the converted directory."""
    facts = model.facts
    annotations = {key: facts[key] for key in _CARRIED if key in facts}
    if base.digest:
        annotations |= {"image.digest": base.digest, "image.reference": base.pinned}
    criu = model.own.get("criu")
    return {
        "version": 1,
        "engine": made_under,
        "container": {"id": facts.get("container.id", ""), "name": facts.get("container.name", "")},
        # CRI-O dumps with --file-locks (runtime_oci.go), and only so are they taken again
        "criu": criu if isinstance(criu, dict) else {"file-locks": True} if made_under == "cri-o" else {},
        "annotations": annotations,
    }


def _check_processes(model: dialects.Model) -> None:
    """Raise UnsupportedError when it shared the processes of its pod: CRIU wants that namespace, with its pid 1."""
    linux = model.spec.get("linux")
    found = linux.get("namespaces") if isinstance(linux, dict) else None
    for one in found if isinstance(found, list) else ():
        if isinstance(one, dict) and one.get("type") == "pid" and one.get("path"):
            raise UnsupportedError(
                "the container shared the processes of its pod (shareProcessNamespace), which only a pod can give it",
                hint="restore it in such a pod: create its container with annotation io.cryoci.restore",
            )


def _podman_knows(runtime: str) -> bool:
    argv = ["podman", f"--runtime={runtime}", "info", "--format={{.Host.OCIRuntime.Name}}"]
    return run(argv, check=False).returncode == 0


def _check_mode(model: dialects.Model, runtime: str, configuration: Path) -> None:
    """CRIU compares the mode of the root directory; cryoci-runtime sees to that, a plain runtime does not."""
    mode = convert.root_mode(model)
    if mode is None or mode == convert.ROOT_MODES["podman"]:
        return
    for name in _CRIU_CONF:
        path = configuration / name
        if path.is_file() and _SKIPS.search(path.read_text(errors="replace")):
            return
    raise UnsupportedError(
        f"the root directory of the container had mode {mode:o}; podman makes it {convert.ROOT_MODES['podman']:o}, "
        f"which CRIU refuses under {runtime}",
        hint=f"let podman know {_SHIM}, which tells CRIU so (`cryoci install --engine podman`), or write {SKIP} into "
        f"{configuration}/runc.conf",
    )


def _matters(what: str) -> bool:
    """Is it a loss to a container that moves to another engine? Its old engine's notes are none."""
    return what not in (archive.STATUS, "bind.mounts", "hooks of spec.dump") and not what.startswith("--")


def _base_of_podman(base: Base, notes: list[str]) -> Base:
    """The base image with the id that it has in podman's storage; it is pulled by digest when it is not there."""
    if HEX64.match(base.id) and _image_id(base.id):
        return base
    if not base.name:
        raise NotFoundError(
            f"the checkpoint's base image {base.id[:12] or 'has no name'} is not in podman's storage",
            hint="copy it there (podman load, podman pull), or convert the archive and name it: cryoci convert "
            "ARCHIVE --to podman --base-image NAME --base-id ID",
        )
    found = _image_id(base.pinned)
    if not found and base.digest:
        podman.pull(base.pinned)
        found = _image_id(base.pinned)
    if not found:
        raise NotFoundError(
            f"the base image {base.name} is not in podman's storage, and the checkpoint does not say its digest",
            hint=f"if you know that it is the right one: podman pull {base.name}",
        )
    if not base.digest:
        notes.append(
            f"{base.name} of this node is taken for the base image: the checkpoint has no digest of it"
        )
    return dataclasses.replace(base, id=found)


def _image_id(name: str) -> str:
    asked = run(["podman", "image", "inspect", "--format={{.Id}}", "--", name], check=False)
    return asked.stdout.decode().strip() if asked.returncode == 0 else ""
