#!/usr/bin/python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""cryoci-hook: the OCI hook. Notes a container when it is created, and clears up after it when it is gone.

    cryoci-hook createRuntime|prestart|poststop   <state.json
    cryoci-hook precreate                         <config.json  >config.json      (podman: docs/hooks.md)

Bookkeeping must never fail a container: whatever happens, the status is 0, within two seconds. `precreate` puts in the
devices that a container asks for; when it cannot, the status is 1, and podman does not create the container.
"""

import os
import signal
import sys

BUDGET = 2.0  # seconds; hooks.d allows 5
DEVICES = 10.0  # seconds for precreate; hooks.d allows 15
STAGES = ("createRuntime", "prestart", "poststop", "precreate")
LIMIT = 16 << 20  # bytes of a specification
REASON = "hook.log"  # in /run/cryoci: why precreate failed last


def main(stage: str) -> int:
    """Do what the stage asks for; returns the exit status."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    if stage == "precreate":
        return precreate()
    import json

    state = json.loads(sys.stdin.buffer.read(1 << 20))
    from cryoci.shim import hooked

    if stage == "poststop":
        hooked.forget(state)
    else:
        hooked.note(state, stage)
    return 0


def precreate() -> int:
    """The specification from stdin to stdout, with its devices."""
    raw = sys.stdin.buffer.read(LIMIT)
    from cryoci.errors import CryociError
    from cryoci.shim import precreate

    try:
        done = precreate.filtered(raw)
    except CryociError as e:
        say(f"{e.message} (hint: {e.hint})" if e.hint else e.message)
        return 1
    sys.stdout.buffer.write(done)
    sys.stdout.buffer.flush()
    return 0


def say(text: str) -> None:
    """One line on stderr; precreate's to a file as well, since podman shows nothing of a hook but its arguments."""
    line = f"cryoci-hook: {text}\n".encode(errors="replace")
    os.write(2, line)
    if sys.argv[1:2] == ["precreate"]:
        where = os.environ.get("CRYOCI_RUN") or "/run/cryoci"
        try:
            os.makedirs(where, mode=0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(f"{where}/{REASON}", flags, 0o600)
            os.write(fd, line)
            os.close(fd)
        except OSError:
            pass


def _late(number: int, frame: object) -> None:
    say("out of time")
    os._exit(1 if sys.argv[1:2] == ["precreate"] else 0)


if __name__ == "__main__":
    asked, status = "".join(sys.argv[1:2]), 0
    try:
        signal.signal(signal.SIGALRM, _late)
        signal.setitimer(signal.ITIMER_REAL, DEVICES if asked == "precreate" else BUDGET)
        os.umask(0o077)
        # an installed file behind a link (.../site-packages/cryoci/hooks), or the source tree (hooks/)
        here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
        sys.path.append(here if os.path.isdir(here + "/cryoci") else os.path.dirname(here))
        status = main(asked)
    except BaseException as e:
        say(f"{type(e).__name__}: {e}")
        status = 1 if asked == "precreate" else 0
    os._exit(status)
