# SPDX-License-Identifier: Apache-2.0
"""How the runtime says that something failed: for people on stderr, for engines in their log file.

Engines show the last error of the file they named with --log: containerd and podman's conmon ask for
`--log-format json`, lines as logrus writes them: {"level":"error","msg":"...","time":"..."}.
"""

import json
import os
import time
import traceback

from cryoci.errors import CryociError
from cryoci.shim.argv import Invocation


def report(line: Invocation, error: Exception) -> int:
    """Say what failed; returns the exit status that reports it."""
    if isinstance(error, CryociError):
        say(line, error.message, error.hint)
        return error.exit_code
    traceback.print_exception(error)
    say(line, f"internal error: {type(error).__name__}: {error}", "report this with the traceback on stderr")
    return 1


def say(line: Invocation, message: str, hint: str | None = None, *, level: str = "error") -> None:
    """Write one message to stderr and, in its format, to the engine's log file. Never raises."""
    as_json = line.globals.get("log-format") == "json"
    target = line.globals.get("log") or ""
    target = target.removeprefix("file:")  # crun's spelling; its journald: and syslog: go to stderr alone
    text = f"{message} (hint: {hint})" if hint else message
    entry = _entry(text, level, as_json)
    try:
        if target and target != "/dev/stderr" and not target.startswith(("journald:", "syslog:")):
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            fd = os.open(target, flags, 0o644)
            try:
                os.write(fd, entry.encode(errors="replace"))
            finally:
                os.close(fd)
            as_json = False  # stderr is for people then, as runc has it
    except OSError:
        pass
    plain = f"cryoci-runtime: {message}\n" + (f"hint: {hint}\n" if hint else "")
    try:
        os.write(2, (entry if as_json else plain).encode(errors="replace"))
    except OSError:
        pass


def _entry(text: str, level: str, as_json: bool) -> str:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if as_json:
        return json.dumps({"level": level, "msg": text, "time": now}, separators=(",", ":")) + "\n"
    return f"time={json.dumps(now)} level={level} msg={json.dumps(text)}\n"
