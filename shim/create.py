# SPDX-License-Identifier: Apache-2.0
"""`create` and `run`: edit the bundle, leave a record, and become the real runtime."""

import json

from cryoci.errors import ConflictError, SpaceError
from cryoci.shim import bundle, paths, state, underlying
from cryoci.shim.argv import Invocation, parse
from cryoci.shim.paths import absolute, valid_id
from cryoci.shim.record import Record
from cryoci.shim.runtime import Runtime, identify

MODIFIERS = [bundle.criu_config, bundle.devices]
# What stands in every config.json that asks for a checkpoint (annotated/request.py).
_ANNOTATED = (b"io.cryoci.restore", b"restore.criu.org/checkpoint-path.")


def main(line: Invocation, launcher: str) -> int:
    """Create the container. Does not return but for errors, which are typed (ConfigError and others)."""
    annotated = _annotated(line)
    if annotated is not None:
        from cryoci.shim.annotated import create

        status = create.main(line, launcher, annotated)
        if status is not None:
            return status
    path = underlying.configured(launcher)
    below = identify(path)
    line = parse(line.argv, below.kind)
    if line.doubt is None and valid_id(line.id) and not line.asks_help:
        prepare(line, below)
    underlying.execute(path, line.argv)
    return 1


def _annotated(line: Invocation) -> dict[str, object] | None:
    """config.json, if it may ask for a checkpoint."""
    raw = paths.read(spec_path(line), bundle.LIMIT) or b""
    if not any(mark in raw for mark in _ANNOTATED):
        return None
    try:
        spec = json.loads(raw)
    except (ValueError, RecursionError):
        return None  # the runtime says what is wrong with it
    return spec if isinstance(spec, dict) else None


def spec_path(line: Invocation) -> str:
    """Path of the config.json that `line` names."""
    directory = absolute(line.options.get("bundle") or "").rstrip("/")
    name = line.options.get("config") or "config.json"  # crun looks from inside the bundle
    return name if name[:1] == "/" else f"{directory}/{name}"


def prepare(
    line: Invocation, below: Runtime, conf: str | None = None, images: str | None = None
) -> tuple[Record, bundle.Edit] | None:
    """Edit the bundle and write the record of the container that `line` is about to make.

    `conf` is the text of its criu.conf, by default what config.toml says; `images` the CRIU images that it
    is restored from. None when there is no bundle to edit, or this user may not keep records (rootless): the
    container then is the runtime's alone.
    """
    record = Record(line.root, line.id or "")
    context = bundle.Context(below, record.conf, images)
    known = record.exists
    directory = absolute(line.options.get("bundle") or "").rstrip("/")
    try:
        record.make()
    except PermissionError:
        return None
    except OSError as e:
        raise storage_error(record, e) from e
    try:
        edit = bundle.edit(spec_path(line), MODIFIERS, context)
    except Exception:
        if not known:
            record.remove()
        raise
    if edit is None:
        record.remove()
        return None
    facts = {
        "bundle": directory,
        "spec": edit.path,
        "root": line.root,
        "runtime_name": below.name,
        "runtime_version": below.text,
        "annotated": bundle.points_to(edit.spec, record.conf),
        "edits": context.edits,
        "devices": context.devices,
        "pid_file": line.options.get("pid-file"),
    }
    if conf is None:
        cache = underlying.cached()
        conf = cache[2] if cache else ""
    try:
        record.save(below.path, facts, conf)
    except OSError as e:
        edit.undo()
        record.remove()
        raise storage_error(record, e) from e
    return record, edit


def storage_error(record: Record, e: OSError) -> SpaceError | ConflictError:
    """The typed error for a record that cannot be written."""
    text = f"cannot write the container's record {record.directory}: {e.strerror}"
    if e.errno in state.NO_SPACE:
        return SpaceError(text, hint="make room in /run")
    return ConflictError(text, hint="what stands there is not a directory of cryoci; move it away")
