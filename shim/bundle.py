# SPDX-License-Identifier: Apache-2.0
"""The bundle's config.json: small modifiers, applied in one atomic edit.

A modifier is `(spec, context) -> None`; it notes each thing it changed in `context.edits`. The text
from before the edit stays beside the bundle as `config.json.cryoci-orig`.
"""

from __future__ import annotations

import json
import posix

from cryoci.errors import SpaceError, UnsupportedError
from cryoci.shim import paths, state
from cryoci.shim.runtime import Runtime

TYPE_CHECKING = False  # `typing` itself would cost every create 3 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Spec = dict[str, Any]
    Modifier = Callable[["Spec", "Context"], None]

ANNOTATION = "org.criu.config"
ORIGINAL = ".cryoci-orig"
LIMIT = 64 << 20  # bytes of config.json


class Context:
    """What modifiers may know, and what they leave behind.

    `conf` is the path of the container's CRIU configuration; `images` that of its CRIU images on a restore,
    None on create; `devices` what was put in (shim/devices), for the record.
    """

    __slots__ = ("conf", "devices", "edits", "images", "runtime")

    def __init__(self, runtime: Runtime, conf: str, images: str | None = None) -> None:
        self.runtime = runtime
        self.conf = conf
        self.images = images
        self.edits: list[str] = []
        self.devices: dict[str, Any] | None = None


def criu_config(spec: Spec, context: Context) -> None:
    """Point annotation `org.criu.config` at the container's own file; a user's own stays.

    One that cryoci wrote on another node or for another id is replaced, and is removed where it would
    be an error (crun >= 1.26 with libcriu < 4.2).
    """
    annotations = spec.get("annotations")
    if annotations is None:
        annotations = {}
    if not isinstance(annotations, dict):
        return
    value = annotations.get(ANNOTATION)
    if value is not None and not is_ours(value):
        return
    if context.runtime.refuses_annotation:
        if value is not None:
            del annotations[ANNOTATION]
            context.edits.append(f"annotations.{ANNOTATION} removed")
    elif value != context.conf:
        annotations[ANNOTATION] = context.conf
        spec["annotations"] = annotations
        context.edits.append(f"annotations.{ANNOTATION}")


def devices(spec: Spec, context: Context) -> None:
    """Devices that the container asks for, or that its checkpoint had (shim/devices, loaded only then)."""
    if context.images is not None or _asks_devices(spec):
        from cryoci.shim.devices import inject

        inject.modify(spec, context)


def _asks_devices(spec: Spec) -> bool:
    """May anything in `spec` be a wish for devices? (`shim.devices.request` has the details.)"""
    annotations, process = spec.get("annotations"), spec.get("process")
    if isinstance(annotations, dict):
        for key in annotations:
            if key == "io.cryoci.gpus" or key[:11] == "cdi.k8s.io/":
                return True
    env = process.get("env") if isinstance(process, dict) else None
    if isinstance(env, list):
        for variable in env:
            if isinstance(variable, str) and variable[:23] == "NVIDIA_VISIBLE_DEVICES=":
                return True
    return False


def is_ours(value: Any) -> bool:
    """Was this value of the annotation written by cryoci?"""
    return isinstance(value, str) and (
        value.startswith((paths.run_directory() + "/containers/", "/run/cryoci/containers/"))
        and value.endswith("/criu.conf")
    )


def points_to(spec: Spec, path: str) -> bool:
    """Does annotation `org.criu.config` of `spec` name `path`?"""
    annotations = spec.get("annotations")
    return isinstance(annotations, dict) and annotations.get(ANNOTATION) == path


class Edit:
    """A finished edit. `spec` is the edited spec; `original` the bytes before, None if nothing changed."""

    __slots__ = ("original", "path", "spec")

    def __init__(self, path: str, spec: Spec, original: bytes | None) -> None:
        self.path = path
        self.spec = spec
        self.original = original

    def undo(self) -> None:
        """Put the text from before back. Never raises: the bundle may be gone by now."""
        if self.original is None:
            return
        try:
            state.write(self.path, self.original, like=self.path)
        except OSError:
            return
        state.unlink(self.path + ORIGINAL)


def revert(path: str) -> None:
    """Undo the last edit of the spec at `path`, if there was one. Never raises."""
    path = paths.follow(path)
    try:
        posix.rename(path + ORIGINAL, path)
    except OSError:
        pass


def edit(path: str, modifiers: Sequence[Modifier], context: Context) -> Edit | None:
    """Apply `modifiers` to the spec at `path`. None when it is absent or no spec: the runtime says why.

    Raises SpaceError, or UnsupportedError when the file cannot be replaced.
    """
    path = paths.follow(path)
    try:
        with open(path, "rb") as f:
            original = f.read(LIMIT + 1)
        spec = json.loads(original) if len(original) <= LIMIT else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(spec, dict):
        return None
    for modifier in modifiers:
        modifier(spec, context)
    if not context.edits:
        return Edit(path, spec, None)
    try:
        state.write(path + ORIGINAL, original, like=path)
        state.write(path, json.dumps(spec, separators=(",", ":")).encode(), like=path)
    except OSError as e:
        kind = SpaceError if e.errno in state.NO_SPACE else UnsupportedError
        raise kind(
            f"cannot edit {path}: {e.strerror}",
            hint="cryoci-runtime must be able to write the bundle's directory",
        ) from e
    return Edit(path, spec, original)
