# SPDX-License-Identifier: Apache-2.0
"""`create` of a container whose annotations name a checkpoint: fetch, verify, restore, freeze.

    fetch + verify -> does it fit -> files -> restore, stopped -> freeze -> what may it do -> wake in the freezer

The engine sees a create: its stdio, console socket and pid file, and a container in state "created" until
`start` (shim/waiting.py). What fails leaves nothing but files in the container's own root.
"""

from __future__ import annotations

import os
import posix
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cryoci.errors import ConflictError, PrivilegeError, RestoreError, UnsupportedError
from cryoci.files import scratch
from cryoci.shim import bundle, child, create, paths, restore, underlying, waiting
from cryoci.shim.annotated import files, fit, hold, podname, request
from cryoci.shim.annotated.fetch import Checkpoint, fetch
from cryoci.shim.argv import Invocation, parse
from cryoci.shim.criu import core
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.engines.options import criu_flags
from cryoci.shim.engines.restore import carried, describe
from cryoci.shim.memory import index
from cryoci.shim.record import Record

_SAME = ("bundle", "console-socket")  # flags of create that restore has too
_STRANGE = ("preserve-fds", "pidfd-socket", "config")  # flags that a restore cannot honour
_STOPPED = "leave-stopped\n"  # criu(8): do not let them run when they are restored
_CGROUPS = "manage-cgroups=ignore\n"  # theirs is the one that the runtime makes, not that of the old id
_GPU = "gpu.dump"  # the driver restores a GPU through threads of the processes: those must run meanwhile


def main(line: Invocation, launcher: str, spec: Mapping[str, Any]) -> int | None:
    """Create by restore; returns the exit status, None when nothing is asked for.

    `spec` is the container's config.json. Raises UsageError, PrivilegeError, UnsupportedError, RestoreError,
    ImageError and what a restore raises.
    """
    asked = request.find(spec.get("annotations") or {})
    if asked is None:
        return None
    _check(line)
    _check_free(line, launcher)
    _set_environment()
    with scratch("create.") as place, ExitStack() as undo:
        checkpoint = fetch(asked, place / "checkpoint")
        if index.exists(str(checkpoint.images)):
            raise UnsupportedError(
                "the checkpoint has memory out of band, which a create cannot fill before its start",
                hint="`cryoci pull` it to a directory, `cryoci materialize` and push that",
            )
        directory = line.options.get("bundle") or "."
        fit.check(spec, checkpoint, directory)
        files.apply(checkpoint, _root(spec, directory), spec)
        pid_file = line.options.get("pid-file") or str(place / "pid")
        again = parse(_words(line, checkpoint, pid_file, place / "work"))
        record = Record(line.root, line.id or "")
        frozen_by_criu = not (checkpoint.images / _GPU).exists()
        undo.callback(_remove, line, launcher, record, create.spec_path(line))
        put_back = podname.noted(spec)
        undo.callback(put_back)
        status = restore.main(again, launcher, extra=_CGROUPS + (_STOPPED if frozen_by_criu else ""))
        if status != 0:
            return status
        with open(pid_file) as f:
            pid = int(f.read())
        if _call(line, launcher, "pause") != 0:
            raise RestoreError(
                "the restored container cannot be frozen until its start",
                hint="annotated create needs the freezer cgroup: create it with a cgroup of its own",
            )
        hold.check(pid, spec)
        hold.settle(pid, spec)
        put_back()
        waiting.mark(record.directory, checkpoint.digest or asked.reference)
        hold.wake(pid, core.stopped(checkpoint.images))
        undo.pop_all()
    return 0


def _check(line: Invocation) -> None:
    if os.geteuid() != 0:
        raise PrivilegeError(
            "a create that restores needs root: CRIU makes processes with given ids", hint="run it as root"
        )
    if line.verb != "create":
        raise UnsupportedError(
            f"annotation {request.PLAIN} asks for a restore, and {line.verb} cannot do that",
            hint="use create and start, as engines do, or `cryoci restore`",
        )
    for name in _STRANGE:
        if line.options.get(name) not in (None, "0"):
            raise UnsupportedError(
                f"a container cannot be created from a checkpoint with --{name}",
                hint="create it without: its processes have the open files of the checkpoint",
            )


def _check_free(line: Invocation, launcher: str) -> None:
    """What fails later is deleted, so it must not be somebody else's."""
    path = underlying.recorded(line.root, line.id, launcher)
    if path is None:
        return
    argv = [path, *line.argv[1 : line.verb_index], "state", line.id or ""]
    if subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
        raise ConflictError(
            f"a container {line.id} exists already", hint="delete it first, or take another id"
        )


def _set_environment() -> None:
    """What engines give is not for this: CRI-O's monitor has no PATH on create, and runc looks for criu on it;
    podman's TMPDIR is swept by nobody after a crash."""
    os.environ.pop("TMPDIR", None)
    if not paths.environment("PATH", ""):
        os.environ["PATH"] = underlying.SBIN
        posix.environ[b"PATH"] = underlying.SBIN.encode()


def _root(spec: Mapping[str, Any], directory: str) -> Path:
    return Path(directory, str((spec.get("root") or {}).get("path") or "rootfs"))


def _words(line: Invocation, checkpoint: Checkpoint, pid_file: str, work: Path) -> list[str]:
    """The command line of `restore` that stands for the `create` of `line`."""
    words = [*line.argv[: line.verb_index], "restore", "--detach"]
    for name in _SAME:
        if value := line.options.get(name):
            words += [f"--{name}", value]
    if line.has("no-pivot"):
        words.append("--no-pivot")
    words += ["--pid-file", pid_file, "--image-path", str(checkpoint.images), "--work-path", str(work)]
    words += criu_flags(CriuOptions.from_mapping(carried(describe(checkpoint.directory))), "restore")
    return [*words, line.id or ""]


def _call(line: Invocation, launcher: str, verb: str, *words: str) -> int:
    path = underlying.recorded(line.root, line.id, launcher)
    if path is None:
        return 1
    argv = [*line.argv[: line.verb_index], verb, *words, line.id or ""]
    return child.run(path, argv)


def _remove(line: Invocation, launcher: str, record: Record, spec_path: str) -> None:
    """Undo a restore that is not wanted after all: whatever is restored dies before it has run."""
    if record.exists:
        _call(line, launcher, "delete", "--force")
        record.remove()
        bundle.revert(spec_path)
