# SPDX-License-Identifier: Apache-2.0
"""Restore under bare runc or crun: make a bundle, run the runtime's restore, look at what came of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cryoci import trace
from cryoci.command import which
from cryoci.errors import ConflictError, NotFoundError, RestoreError, UsageError
from cryoci.files import read_json, scratch, write_json
from cryoci.shim import netns, paths, record, rootfs, untrusted
from cryoci.shim.criu import log
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.devices import inject as devices
from cryoci.shim.engines import engines_own, streams, wake
from cryoci.shim.engines.container import runtime_argv
from cryoci.shim.engines.interrupt import deferred, whole
from cryoci.shim.engines.options import Restored, RestoreOptions, criu_flags, read_dump
from cryoci.shim.gpu.restoring import MAP_VARIABLE


def restore(directory: Path, own: dict[str, Any], options: RestoreOptions, criu: CriuOptions) -> Restored:
    """Restore under runc or crun. Raises RestoreError, ConflictError...; nothing is left then.

    The container gets this process' stdin, stdout and stderr, as with the runtimes' own restore; a detached one by
    pipes, so that it can be checkpointed again (streams).
    """
    started = time.monotonic()
    old = own.get("container")
    container_id = options.name or (str(old.get("id")) if isinstance(old, dict) else "")
    if not paths.valid_id(container_id):
        raise UsageError(f"{container_id!r} cannot be the id of a container", hint="give one: --name NAME")
    engine = options.engine or str(own["engine"])  # a checkpoint of runc is for runc, one of crun for crun
    runtime = options.runtime or engine
    runtime = runtime if runtime.startswith("/") else which(runtime)
    seconds: dict[str, float] = {}
    with ExitStack() as undo:
        known = record.Record(options.root, container_id)
        _check_free(runtime, options.root, container_id)
        known.save(runtime, {"restored": True}, "")
        undo.callback(known.remove)
        bundle = options.bundle or _make_bundle(paths.bundle_directory(options.root, container_id), undo)
        with trace.timed(seconds, "file system"):
            _fill_bundle(bundle, directory, options, undo, foreign=own["engine"] not in ("runc", "crun"))
        made = Restored(engine, container_id, container_id, seconds=seconds)
        with trace.timed(seconds, "restore"):
            made.status = _run(bundle, directory, container_id, options, criu, undo, made)
        options.settled()
        undo.pop_all()
    seconds["total"] = time.monotonic() - started
    return made


def _check_free(runtime: str, root: str | None, container_id: str) -> None:
    argv = [runtime, *(["--root", root] if root else []), "state", container_id]
    if subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0:
        raise ConflictError(
            f"a container {container_id} exists on this node",
            hint=f"give another name (--name NAME), or delete it: {shlex.join([*argv[:-2], 'delete', container_id])}",
        )


def _make_bundle(where: str, undo: ExitStack) -> Path:
    bundle = Path(where)
    try:
        bundle.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        # its container is gone (_check_free), and whoever deleted it did not go through cryoci-runtime
        engines_own.release(bundle)
        shutil.rmtree(bundle)
        bundle.mkdir(mode=0o700)
    undo.callback(shutil.rmtree, bundle, ignore_errors=True)
    return bundle


def _fill_bundle(
    bundle: Path, directory: Path, options: RestoreOptions, undo: ExitStack, *, foreign: bool
) -> None:
    """config.json and rootfs: a bundle of the operator's keeps its own, and gets the changes.

    `foreign`: an engine made the container, and gave it files that this node has to give it now.
    """
    full = directory / "rootfs.tar"
    if options.bundle is None:
        asked = read_dump(directory, "spec.dump")
        spec = untrusted.spec(
            asked,
            made_here=engines_own.PLACES if foreign else (),
            allow=options.allow,
            injected=devices.carried(str(directory / "checkpoint")).injected,
        )
        if not full.is_file() and options.base is None:
            raise NotFoundError(
                "the checkpoint does not hold the container's whole file system",
                hint="prepare a bundle with the same base rootfs and give it: --bundle DIR",
            )
        spec["root"] = {"path": "rootfs", "readonly": bool((spec.get("root") or {}).get("readonly"))}
        spec["process"]["terminal"] = False
        # the old node's: a copy would share its original's cgroup, and a hostile one that of a service here
        spec["linux"].pop("cgroupsPath", None)
        if foreign:
            engines_own.provide(bundle, spec, asked, undo)
        write_json(bundle / "config.json", spec)
        (bundle / "rootfs").mkdir(mode=0o755)
        if full.is_file():
            rootfs.apply(bundle / "rootfs", full)
        else:
            assert options.base is not None
            options.base(bundle / "rootfs")
            _apply_diff(bundle / "rootfs", directory)
        return
    try:
        where = bundle / str(read_json(bundle / "config.json")["root"]["path"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise NotFoundError(
            f"{bundle} is not an OCI bundle: {e}", hint="it needs a config.json and a rootfs"
        ) from e
    if full.is_file() and not any(where.iterdir()):
        rootfs.apply(where, full)
    else:
        _apply_diff(where, directory)


def _apply_diff(where: Path, directory: Path) -> None:
    """What the container changed in its base image."""
    found = [directory / name for name in ("rootfs-diff.tar", "deleted.files")]
    diff, deleted = (path if path.is_file() else None for path in found)
    if diff or deleted:
        rootfs.apply(where, diff, deleted)


def _run(
    bundle: Path,
    directory: Path,
    container_id: str,
    options: RestoreOptions,
    criu: CriuOptions,
    undo: ExitStack,
    made: Restored,
) -> int | None:
    """Run the restore; in the foreground to the container's end, whose exit status is returned."""
    undo.callback(_delete, options.root, container_id)
    with scratch("restore-work.") as work:
        pid_file = work / "pid"
        argv = runtime_argv(
            options.root,
            "restore",
            *(["--detach"] if options.detach else []),
            *(
                "--bundle",
                str(bundle),
                "--image-path",
                str(directory / "checkpoint"),
                "--work-path",
                str(work),
            ),
            *("--pid-file", str(pid_file)),
            *criu_flags(criu, "restore"),
            container_id,
        )
        environment = {**os.environ, MAP_VARIABLE: options.device_map}
        if options.detach:
            with deferred(), streams.lasting() as its:
                status = subprocess.run(
                    argv,
                    stdin=its.stdin,
                    stdout=its.stdout,
                    stderr=its.stderr,
                    start_new_session=True,
                    env=environment,
                ).returncode
                if status != 0:
                    its.drain()  # it says why
        else:
            status = _follow(argv, environment, pid_file, options, made)
        if not options.detach and pid_file.is_file():
            _delete(options.root, container_id)
            return status
        if status != 0:
            raise _failure(
                container_id, options.root, log.explain(str(work / "restore.log"), "restore"), status
            )
    made.pid = _probe(options.root, container_id)
    netns.raise_loopback(made.pid)
    wake.bare(options, made)
    return None


def _follow(
    argv: list[str], environment: dict[str, str], pid_file: Path, options: RestoreOptions, made: Restored
) -> int:
    """Restore in the foreground; returns the exit status of the container."""
    process = subprocess.Popen(argv, env=environment)
    try:
        if wake.restored(process, pid_file):
            wake.bare(options, made)
        return process.wait()
    except BaseException:
        _delete(options.root, made.id)
        process.wait()
        raise


def _failure(container_id: str, root: str | None, cause: log.Cause | None, status: int) -> RestoreError:
    if cause is None:
        return RestoreError(
            f"container {container_id} could not be restored: the runtime ended with status {status}",
            hint="it said why above",
        )
    kept = record.Record(root, container_id).log("restore")
    return RestoreError(
        f"container {container_id} could not be restored: {cause.summary}",
        hint=f"{cause.hint} (log: {kept})",
    )


def _delete(root: str | None, container_id: str) -> None:
    argv = [*runtime_argv(root, "delete", "--force"), container_id]
    whole(argv)


def _probe(root: str | None, container_id: str) -> int:
    """Pid of the restored container, once it has proven to run."""
    pid = 0
    for pause in (0.0, 0.1):
        time.sleep(pause)
        argv = [*runtime_argv(root, "state"), container_id]
        result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)
        state = json.loads(result.stdout) if result.returncode == 0 else {}
        pid = int(state.get("pid", 0))
        if state.get("status") != "running" or not os.path.exists(f"/proc/{pid}"):
            raise RestoreError(
                f"the runtime reports success, but container {container_id} is {state.get('status', 'not there')}"
            )
    return pid
