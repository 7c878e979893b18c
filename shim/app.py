# SPDX-License-Identifier: Apache-2.0
"""App hooks: what an application wants done before it is frozen, and after it is back.

A container's annotations say it, or the flags of the same names:

    io.cryoci.pre-checkpoint              steps, one a line, done in order while the container still runs, before it
                                          is checkpointed or parked
    io.cryoci.post-restore                steps, done once the restored container has proven to run, or is unparked
    io.cryoci.KIND.timeout                time that each step may take; default 30s
    io.cryoci.KIND.on-failure             fail (default): the checkpoint or restore fails; ignore: it goes on

A step is `exec: ARGV` (in the container, as its user), `signal: NAME` (to its first process), `http: METHOD URL`
(to its own loopback address) or `wait: TIME`. Hooks of a checkpoint from elsewhere are done too: none of them
reaches beyond the container that they come with.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from cryoci import durations
from cryoci.errors import CryociError, HookError, UsageError
from cryoci.shim import inside, record
from cryoci.shim.engines.container import Container, runtime_argv

Kind = Literal["pre-checkpoint", "post-restore"]
PREFIX = "io.cryoci."
KINDS: tuple[Kind, ...] = ("pre-checkpoint", "post-restore")
ANNOTATIONS = tuple(f"{PREFIX}{kind}{part}" for kind in KINDS for part in ("", ".timeout", ".on-failure"))
_TIMEOUT = 30.0  # seconds
_SAID = 2000  # bytes of a failing program's words that are kept
_MOST = 32  # steps
_STARTS = 10.0  # seconds within which a runtime that is to end has started its program, or never will


@dataclass(frozen=True)
class Choice:
    """What the caller says, over the annotations: steps (None: as annotated), seconds, failure policy."""

    pre_checkpoint: tuple[str, ...] | None = None
    post_restore: tuple[str, ...] | None = None
    timeout: float | None = None
    on_failure: str | None = None
    off: bool = False


@dataclass(frozen=True)
class Step:
    """One act. `words` are what `text` says after its colon."""

    act: str
    words: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Hooks:
    """The steps of one kind; each may take `timeout` seconds."""

    kind: Kind
    steps: tuple[Step, ...] = ()
    timeout: float = _TIMEOUT
    ignore: bool = False


def hooks(kind: Kind, annotations: Mapping[str, object], choice: Choice) -> Hooks:
    """What is to be done at `kind`. Raises UsageError naming the annotation or flag that is off."""
    if choice.off:
        return Hooks(kind)
    asked = choice.pre_checkpoint if kind == "pre-checkpoint" else choice.post_restore
    key = PREFIX + kind
    noted = {name: text for name in ANNOTATIONS if isinstance(text := annotations.get(name), str)}
    lines = list(asked) if asked is not None else noted.get(key, "").splitlines()
    where = f"--{kind}" if asked is not None else f"annotation {key}"
    steps = tuple(step(line.strip(), where) for line in lines if line.strip())
    if len(steps) > _MOST:
        raise UsageError(
            f"{where} has {len(steps)} steps", hint=f"at most {_MOST}; put them into one script"
        )
    timeout = choice.timeout
    if timeout is None:
        timeout = durations.parse(noted[f"{key}.timeout"]) if f"{key}.timeout" in noted else _TIMEOUT
    policy = choice.on_failure or noted.get(f"{key}.on-failure", "fail")
    if policy not in ("fail", "ignore"):
        raise UsageError(f"annotation {key}.on-failure is {policy[:40]!r}", hint="write fail or ignore")
    return Hooks(kind, steps, timeout, policy == "ignore")


def both(container: Container, choice: Choice) -> tuple[Hooks, Hooks]:
    """What is to be done before, and after, an operation on a running container. Raises UsageError."""
    noted = container.spec.get("annotations") or {}
    return hooks("pre-checkpoint", noted, choice), hooks("post-restore", noted, choice)


def run(container: Container, what: Hooks) -> list[str]:
    """Do the steps in order; returns what failed and was to be ignored. Raises HookError at the first other."""
    ignored = []
    for one in what.steps:
        problem = _do(container, one, what.timeout)
        if not problem:
            continue
        said = f"{what.kind} hook of container {container.name} failed: {one.text}: {problem}"
        if not what.ignore:
            raise HookError(
                said,
                hint=f"see that it works in the container, or set {PREFIX}{what.kind}.on-failure=ignore",
            )
        ignored.append(said)
    return ignored


def step(text: str, where: str) -> Step:
    """A step as annotations and flags write it; `where` it stands. Raises UsageError."""
    act, colon, rest = text.partition(":")
    try:
        words = tuple(shlex.split(rest))
    except ValueError as e:
        raise UsageError(f"{where}: {text[:200]!r}: {e}", hint="quote it as for a shell") from e
    problem = "" if colon and words else "it is no step"
    if act == "signal" and words:
        name = words[0].upper().removeprefix("SIG")
        problem = "" if f"SIG{name}" in signal.Signals.__members__ else f"there is no signal {name[:40]}"
        words = (name,)
    elif act == "http" and words:
        words = words if len(words) == 2 else ("GET", *words)
        problem = "" if len(words) == 2 else "it is no METHOD URL"
        if not problem:
            inside.check_url(*words)
    elif act == "wait" and words:
        durations.parse(words[0])
    elif act != "exec":
        problem = problem or f"{act[:40]!r} is no act"
    if problem or "\0" in text:
        raise UsageError(
            f"{where}: {text[:200]!r}: {problem or 'it holds a NUL'}",
            hint="write exec: ARGV, signal: NAME, http: METHOD URL or wait: TIME",
        )
    return Step(act, words, text)


def _do(container: Container, one: Step, timeout: float) -> str:
    """Do one step; returns "" or what was wrong."""
    try:
        if one.act == "exec":
            return execute(container, one.words, timeout)
        if one.act == "http":
            return inside.request(int(container.state()["pid"]), one.words[0], one.words[1], timeout)
        if one.act == "signal":
            container.call("kill", after=one.words)
        else:
            time.sleep(min(durations.parse(one.words[0]), timeout))
    except (CryociError, OSError) as e:
        return e.message if isinstance(e, CryociError) else str(e)
    return ""


def execute(container: Container, argv: tuple[str, ...], timeout: float) -> str:
    """Run a program in the container; returns "" when it ended well within `timeout` seconds, else why not."""
    directory = Path(record.Record(container.root, container.id).directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    pid_file = directory / f"hook.{threading.get_ident()}.pid"
    command = runtime_argv(container.root, "exec", "--pid-file", str(pid_file), container.id, *argv)
    with container.known():
        return _run(command, pid_file, timeout)


def _run(command: list[str], pid_file: Path, timeout: float) -> str:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    said = bytearray()
    assert process.stderr is not None
    listener = threading.Thread(target=_listen, args=(process.stderr, said), daemon=True)
    listener.start()
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"it did not end within {timeout:g} s"
    finally:
        if process.poll() is None:
            _end(process, pid_file)
        listener.join(0.5)  # what it left in the background may hold the pipe
        pid_file.unlink(missing_ok=True)
    if status == 0:
        return ""
    return bytes(said).decode(errors="replace").strip() or f"it ended with status {status}"


def _listen(stream: IO[bytes], said: bytearray) -> None:
    while chunk := stream.read1(4096):  # type: ignore[attr-defined]
        said += chunk
        del said[:-_SAID]


def _end(process: subprocess.Popen[bytes], pid_file: Path) -> None:
    """Kill the program in the container, and with it the runtime that waits for it.

    The runtime alone would leave it running. It may be about to start it, so its pid file is waited for.
    """
    deadline = time.monotonic() + _STARTS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
            process.wait(2)
        except ProcessLookupError:
            break
        except (OSError, ValueError, subprocess.TimeoutExpired):
            time.sleep(0.01)
    process.kill()
    process.wait()
