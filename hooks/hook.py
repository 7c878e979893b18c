#!/usr/bin/python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""cryoci-hook: the OCI hook. Notes a container when it is created, and forgets it when it is gone.

    cryoci-hook createRuntime|prestart|poststop   <state.json

Bookkeeping must never fail a container: whatever happens, the status is 0, within two seconds.
"""

import os
import signal
import sys

BUDGET = 2.0  # seconds; hooks.d allows 5
STAGES = ("createRuntime", "prestart", "poststop")


def main() -> None:
    """Do what the stage asks for; what went wrong is said on stderr, which runtimes log."""
    import json

    stage = sys.argv[1] if len(sys.argv) > 1 else ""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    state = json.loads(sys.stdin.buffer.read(1 << 20))
    from cryoci.shim import hooked

    if stage == "poststop":
        hooked.forget(state)
    else:
        hooked.note(state, stage)


def _late(number: int, frame: object) -> None:
    os.write(2, b"cryoci-hook: out of time\n")
    os._exit(0)


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGALRM, _late)
        signal.setitimer(signal.ITIMER_REAL, BUDGET)
        os.umask(0o077)
        # an installed file behind a link (.../site-packages/cryoci/hooks), or the source tree (hooks/)
        here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
        sys.path.append(here if os.path.isdir(here + "/cryoci") else os.path.dirname(here))
        main()
    except BaseException as e:
        os.write(2, f"cryoci-hook: {type(e).__name__}: {e}\n".encode(errors="replace"))
    os._exit(0)
