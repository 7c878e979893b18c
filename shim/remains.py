# SPDX-License-Identifier: Apache-2.0
"""What a container leaves behind: its record goes, CRIU's logs stay for a while.

An engine deletes a container whose restore failed at once, so the log must outlive the record.
"""

import posix

from cryoci.shim import paths, state

_RECORD = (
    "runtime",
    "waiting",
    "options.json",
    "criu.conf",
    "record.json",
    "gpu.json",
    "incremental.json",
    "restored.pid",
    "adopt.lock",
    "memory-progress",
    "memory-sink",
)  # in this order: without `runtime`, no record
LOGS = ("dump.log", "restore.log", "dump-attempt.log", "restore-attempt.log", "memory-placement.json")
_KEPT = 32  # containers that are gone and whose logs are still there


def remove(directory: str) -> None:
    """Remove the record in `directory`, keep its logs, and drop the oldest. Idempotent, never raises."""
    for name in _RECORD:
        state.unlink(f"{directory}/{name}")
    try:
        posix.rmdir(directory)
    except OSError:
        _drop_old_logs()


def directories() -> list[str]:
    """Every container's directory."""
    base = paths.run_directory() + "/containers"
    found = []
    try:
        for key in posix.listdir(base):
            found += [
                f"{base}/{key}/{name}" for name in posix.listdir(f"{base}/{key}") if paths.valid_id(name)
            ]
    except OSError:
        pass
    return found


def _drop_old_logs() -> None:
    ended = []
    for directory in directories():
        try:
            names = posix.listdir(directory)
            if names and all(name in LOGS for name in names):
                ended.append((posix.stat(directory).st_mtime_ns, directory))
        except OSError:
            continue
    ended.sort()
    for _, directory in ended[:-_KEPT]:
        for name in LOGS:
            state.unlink(f"{directory}/{name}")
        try:
            posix.rmdir(directory)
        except OSError:
            pass
