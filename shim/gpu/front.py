#!/usr/bin/python3 -IS
# SPDX-License-Identifier: Apache-2.0
"""cuda-checkpoint: NVIDIA's command line over the driver's functions, as CRIU's CUDA plugin calls it.

The plugin (criu 4.0 to 4.2, criu-dev) reads stdout and stderr together, so there is one line and nothing else: the
answer, or why not. It calls this two or three times for each process of a container, so it starts fast.

    cuda-checkpoint --get-restore-tid --pid PID
    cuda-checkpoint --get-state --pid PID
    cuda-checkpoint --action lock|checkpoint|restore|unlock --pid PID [--timeout MS] [--device-map OLD=NEW,...]
    cuda-checkpoint --toggle --pid PID [--device-map OLD=NEW,...]

Installed as a link named cuda-checkpoint, it works from a source tree and from site-packages.
"""

import os
import sys

USAGE = """\
Usage: cuda-checkpoint OPERATION --pid PID
  -h, --help               this text
  -p, --pid PID            the process to act on
  --get-restore-tid        print the restore thread's id
  -g, --get-state          print running, locked, checkpointed or failed
  -a, --action ACTION      lock, checkpoint, restore or unlock
  --timeout MS             for lock: give up after so many milliseconds; 0 waits for ever
  -d, --device-map MAP     for restore: OLD=NEW,... by UUID, every GPU that the process saw
  -t, --toggle             checkpoint a running process, restore a checkpointed one
"""
_SHORT = {
    "-h": "--help",
    "-p": "--pid",
    "-g": "--get-state",
    "-a": "--action",
    "-d": "--device-map",
    "-t": "--toggle",
}
_VALUES = ("--pid", "--action", "--timeout", "--device-map")
_MOST = {"--pid": (1 << 31) - 1, "--timeout": (1 << 32) - 1}  # the driver's int and unsigned
_SWITCHES = ("--help", "--get-restore-tid", "--get-state", "--toggle")
_ACTIONS = ("lock", "checkpoint", "restore", "unlock")


class Misuse(Exception):
    """The words on the command line are off."""


def main(argv: list[str]) -> int:
    """Do what `argv` says. Returns 0, 1 for an error of the driver, 2 for wrong usage."""
    try:
        asked = _parse(argv[1:])
        if "--help" in asked:
            sys.stdout.write(USAGE)
            return 0
        text = _do(asked)
    except Misuse as e:
        sys.stderr.write(f"{e}; see cuda-checkpoint --help\n")
        return 2
    except _errors() as e:
        sys.stderr.write(_line(e))
        return 1
    if text:
        sys.stdout.write(text + "\n")
    return 0


def _parse(words: list[str]) -> dict[str, str]:
    asked: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if name in _SWITCHES and not equals:
            asked[name] = ""
        elif name in _VALUES:
            given = value if equals else next(rest, None)
            if given is None:
                raise Misuse(f"{name} needs a value")
            asked[name] = given
        else:
            raise Misuse(f"unknown option {word}")
    operations = [n for n in ("--get-restore-tid", "--get-state", "--action", "--toggle") if n in asked]
    if "--help" not in asked:
        if len(operations) != 1:
            raise Misuse("one operation is needed")
        for name, most in _MOST.items():
            text = asked.get(name, "0" if name == "--timeout" else "")
            if not (text.isascii() and text.isdecimal()):
                raise Misuse(f"{name} takes a number")
            if len(text) > 10 or int(text) > most:
                raise Misuse(f"{name} is at most {most}")
        if asked.get("--action", "lock") not in _ACTIONS:
            raise Misuse(f"{asked['--action']} is no action")
    return asked


def _do(asked: dict[str, str]) -> str:
    from cryoci.shim.gpu.cuda import Driver, State

    driver = Driver()
    pid = int(asked["--pid"])
    if "--get-restore-tid" in asked:
        tid = driver.restore_thread(pid)
        if tid is None:
            raise _NotCuda(f"Could not find restore thread for process ID {pid}")
        return str(tid)
    if "--get-state" in asked:
        return str(driver.state(_process(pid)))
    action = asked.get("--action")
    if action is None:
        if driver.state(pid) is State.RUNNING:
            driver.lock(pid, int(asked.get("--timeout", "0")))
            driver.checkpoint(pid)
        else:
            driver.restore(pid, _pairs(asked))
            driver.unlock(pid)
    elif action == "lock":
        driver.lock(pid, int(asked.get("--timeout", "0")))
    elif action == "restore":
        driver.restore(pid, _pairs(asked))
    else:
        getattr(driver, action)(pid)
    return ""


class _NotCuda(Exception):
    """The process has no CUDA: for the plugin an answer like any other."""


def _errors() -> tuple[type[Exception], ...]:
    from cryoci.errors import CryociError

    return (CryociError, _NotCuda)


def _line(error: Exception) -> str:
    """An error as NVIDIA's tool words it, in one line."""
    from cryoci.shim.gpu.cuda import CudaError

    if isinstance(error, CudaError):
        verb = "get state" if error.verb == "query" else error.verb
        return f'Could not {verb} on process ID {error.pid}: "{error.text}"\n'
    return f"{getattr(error, 'message', error)}\n".replace("\n", " ").rstrip() + "\n"


def _process(number: int) -> int:
    """The process of a thread: the plugin of criu 4.1 and 4.2 asks for the state of the restore thread."""
    try:
        with open(f"/proc/{number}/status") as f:
            for line in f:
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return number


def _pairs(asked: dict[str, str]) -> dict[bytes, bytes] | None:
    text = asked.get("--device-map")
    if text is None:
        return None
    from cryoci.shim.gpu.nvml import uuid_bytes

    try:
        return {
            uuid_bytes(old): uuid_bytes(new) for old, _, new in (p.partition("=") for p in text.split(","))
        }
    except ValueError as e:
        raise Misuse(f"--device-map: {e}") from None


def _find_package() -> None:
    """Put the directory of package cryoci first on sys.path, from this file's own real path."""
    gpu = os.path.dirname(os.path.realpath(__file__))  # os is there: ctypes needs it too
    for root in (gpu + "/../..", gpu + "/../../.."):
        try:
            os.stat(root + "/cryoci/shim/gpu/cuda.py")
        except OSError:
            continue
        sys.path.append(root)
        return
    raise SystemExit(f"cuda-checkpoint: no package cryoci beside {gpu}; reinstall cryoci")


if __name__ == "__main__":
    _find_package()
    sys.exit(main(sys.argv))
