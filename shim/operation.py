# SPDX-License-Identifier: Apache-2.0
"""What checkpoint and restore share: CRIU's options, the words for the real runtime, CRIU's log."""

import os
import time

from cryoci import trace
from cryoci.errors import ConfigError, SpaceError, UnsupportedError
from cryoci.shim import attempt, child, config, failure, orphans, stalled, underlying
from cryoci.shim.argv import Invocation, knows, parse, with_flag, without
from cryoci.shim.criu import log
from cryoci.shim.criu.conf import Verb
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.record import Record
from cryoci.shim.runtime import Runtime

# Flag of a verb -> key of [criu]. What the runtime below does not know moves into its CRIU configuration.
OPTION_OF = {
    "ext-unix-sk": "ext-unix-sk",
    "external": "external",
    "file-locks": "file-locks",
    "ghost-limit": "ghost-limit",
    "libdir": "libdir",
    "link-remap": "link-remap",
    "log-level": "log-level",
    "manage-cgroups-mode": "manage-cgroups",
    "network-lock": "network-lock",
    "shell-job": "shell-job",
    "skip-in-flight": "skip-in-flight",
    "tcp-close": "tcp-close",
    "tcp-established": "tcp-established",
    "tcp-skip-in-flight": "skip-in-flight",
    "timeout": "timeout",
}
# Flags that mean nothing to the other runtime and may go: crun is no subreaper on restore, and a restored
# session keeps the keyring it has. Those of memory are cryoci's own (shim/memory/verbs.py).
_DROP = frozenset(
    {"no-subreaper", "no-new-keyring", "hold-memory", "criu-memory", "memory-parent", "memory-returns"}
    | {"memory-options", "memory-sink"}
)


def options(line: Invocation, below: Runtime, record: Record) -> CriuOptions:
    """Options from config.toml, then the container's own, then those on the command line that `below`
    does not know. Raises ConfigError."""
    # crun has CRIU write the old node's cgroup settings (its "soft" default), which fails or puts the container
    # where it was (cri-o#6894); the cgroup is made by crun itself.
    merged = CriuOptions(manage_cgroups="ignore" if below.kind == "crun" else None).merge(config.load().criu)
    try:
        own = record.options
    except ValueError as e:
        raise ConfigError(f"{record.directory}/options.json is broken: {e}", hint="remove it") from e
    merged = merged.merge(CriuOptions.from_mapping(own, where="the container's options.json"))
    moved: dict[str, object] = {}
    for flag in line.found:
        key = OPTION_OF.get(flag.name)
        if key is None or knows(below.kind, below.version, line.verb or "", flag.name):
            continue
        if key == "external":
            moved[key] = [f.value for f in line.found if f.name == "external"]
        elif flag.value is None or flag.value in ("true", "false"):
            moved[key] = flag.value != "false"
        else:
            moved[key] = int(flag.value) if key != "ghost-limit" and flag.value.isdigit() else flag.value
    return merged.merge(CriuOptions.from_mapping(moved, where="the command line: flag"))


def words(line: Invocation, below: Runtime, chosen: CriuOptions, *, reads_conf: bool) -> list[str]:
    """The command line for the runtime below.

    Flags that it does not know go: to the CRIU configuration, or nowhere when they mean nothing there.
    When it will not hand CRIU our configuration (`reads_conf`), switches that it does know come in.
    """
    verb = line.verb or ""
    gone = [
        flag.name
        for flag in line.found
        if (flag.name in OPTION_OF or flag.name in _DROP)
        and not knows(below.kind, below.version, verb, flag.name)
    ]
    line = parse(without(line, *gone), below.kind)
    if reads_conf:
        return line.argv
    values = chosen.to_mapping()
    for flag_name, key in OPTION_OF.items():
        value = values.get(key)
        if flag_name in line.options or not knows(below.kind, below.version, verb, flag_name):
            continue
        if value is True:
            line = parse(with_flag(line, flag_name), below.kind)
        elif isinstance(value, str):
            line = parse(with_flag(line, flag_name, value), below.kind)
    return line.argv


def make_work_directory(line: Invocation) -> None:
    """Make CRIU's work directory: runc makes it, crun takes it for granted. Raises a CryociError."""
    path = line.options.get("work-path")
    if not path:
        return
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as e:
        kind = SpaceError if e.errno == 28 else UnsupportedError
        raise kind(
            f"cannot make CRIU's work directory {path}: {e.strerror}", hint="name another --work-path"
        ) from e


def image_directory(line: Invocation) -> str:
    """Where the CRIU images are; both runtimes default to ./checkpoint."""
    return line.options.get("image-path") or "checkpoint"


def run(
    line: Invocation, argv: list[str], below: Runtime, record: Record, verb: Verb, env: dict[bytes, bytes]
) -> tuple[int, bool]:
    """Run the runtime on one operation, keep CRIU's log, and say why when it failed.

    Returns the exit status, and whether a cause was found and said.
    """
    name = verb + ".log"
    source = os.path.join(line.options.get("work-path") or image_directory(line), name)
    before, began = underlying.stamp(source), time.time()
    with (
        trace.call([below.path, *argv[1:]]) as traced,
        orphans.Watch(adopts=verb == "dump" or line.has("detach")) as watch,
    ):
        traced.status = status = child.run(below.path, argv, env, look=watch.look)
    if status != 0:
        watch.sweep()
        attempt.keep(record, verb, [below.path, *argv[1:]], began, status, {"work": os.path.dirname(source)})
    if status != 0 and watch.died:  # CRIU's log says only that it was interrupted
        stalled.note(source, watch.died)
    cause = log.killed(watch.killed) if status != 0 and watch.killed and not watch.died else None
    kept = None
    if underlying.stamp(source) not in (None, before):  # else what stands there is from an earlier attempt
        kept = record.keep_log(verb, source)
        cause = cause or (log.explain_failure(source, verb) if status != 0 else None)
    if cause is None:
        return status, False
    where = f"{cause.hint or 'see the log'}; full log: {kept or source}"
    failure.say(line, f"{line.verb} of {record.id} failed: {cause.summary}", where)
    return status, True


def delete_words(line: Invocation, below: Runtime) -> list[str]:
    """The command line that takes away, by force, the container that `line` has made."""
    return [below.path, *(["--root", line.root] if line.root else []), "delete", "--force", line.id or ""]


def environment(record: Record, *, reads_conf: bool) -> dict[bytes, bytes]:
    """$CRIU_CONFIG_FILE for a runtime that will not hand CRIU our file; a caller's own stays."""
    if reads_conf or b"CRIU_CONFIG_FILE" in underlying.child_environment():
        return {}
    return {b"CRIU_CONFIG_FILE": os.fsencode(record.conf)}
