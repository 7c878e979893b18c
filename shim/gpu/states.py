# SPDX-License-Identifier: Apache-2.0
"""What the driver says of a container's CUDA processes, for finding faults.

It is asked by a process of its own: while one of several coupled processes is locked, any question about another waits
(NVIDIA/cuda-checkpoint#30), and that is just when somebody wants to know.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from cryoci.errors import CryociError
from cryoci.shim.gpu import tasks

_SECONDS = 10.0


def ask(init: int, seconds: float = _SECONDS) -> list[dict[str, Any]]:
    """Of each process with the driver's library: pid, comm, and its state or why there is none. Never raises."""
    return [_ask(pid, seconds) for pid in tasks.members(init) if tasks.maps_library(pid)]


def _ask(pid: int, seconds: float) -> dict[str, Any]:
    argv = [sys.executable, "-m", "cryoci.shim.gpu.states", str(pid)]
    try:
        task = tasks.look(pid)
        asked = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    except OSError as e:
        return {"pid": pid, "error": str(e)}
    told: dict[str, Any] = {"pid": pid, "inner": task.inner, "comm": task.comm}
    try:
        said, _ = asked.communicate(timeout=seconds)
        return {**told, **json.loads(said)}
    except subprocess.TimeoutExpired:
        asked.kill()  # nobody waits for it: it may be where no signal reaches it
        return {**told, "error": f"the driver gives no answer within {seconds:g} s"}
    except ValueError:
        return {**told, "error": f"asking it ended with status {asked.returncode}"}


def main() -> None:
    """Print one process' state as JSON."""
    from cryoci.shim.gpu.cuda import Driver

    pid = int(sys.argv[1])
    try:
        driver = Driver()
        uses = driver.restore_thread(pid) is not None
        said = {"state": str(driver.state(pid)) if uses else "no CUDA context"}
    except CryociError as e:
        said = {"error": e.message}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
