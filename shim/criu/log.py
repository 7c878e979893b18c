# SPDX-License-Identifier: Apache-2.0
"""From a CRIU log to one sentence: the cause of a failed dump or restore, and the fix.

CRIU prints several `Error` lines for one failure, the real cause usually first and its callers
after it. `explain` looks for the known causes in the whole log, most specific first, and falls back
to the first error that is not noise. The rows are in causes*.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cryoci.shim.criu.causes import CAUSES
from cryoci.shim.criu.known import Known, Verb

__all__ = ["CAUSES", "TAIL", "Cause", "Verb", "explain", "explain_text", "verb_of"]

# The end of a log is enough: errors are written last, and verbose logs reach hundreds of MB.
TAIL = 4 << 20


@dataclass(frozen=True)
class Cause:
    """Why CRIU failed: `summary` in one sentence, `hint` what to do, `line` the log line it stands on.

    `id` and `source` are those of the catalogue's row; "" for an error that is in none.
    """

    summary: str
    hint: str
    line: str
    id: str = ""
    source: str = ""


# Error lines that also stand in the logs of successful runs: CRIU without CAP_SYS_RESOURCE, and what ip(8) says.
_NOISE = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE|[Aa]ddress already assigned")
# What follows from an error and says nothing itself; the cause only when there is no other.
_FOLLOWS = re.compile(
    r"(?:Pre-dumping|Dumping|Restoring) FAILED|killed by signal|exited, status=|files \(pid: \d+\) failed with"
)

# A log at CRIU's usual level: it says more than errors. Then it says last how it ended.
_TALKS = re.compile(r"(?m)^\([\d.]+\) (?!.*(?:Error|Warn) )")
_ENDED = re.compile(r"(?:Dumping|Restore) finished successfully")


def explain(path: str, verb: Verb, *, anywhere: bool = False) -> Cause | None:
    """The cause that a CRIU log gives, or None when there is no log or no error in it."""
    text = _end(path)
    return None if text is None else explain_text(text, verb, anywhere=anywhere)


def explain_text(text: str, verb: Verb, *, anywhere: bool = False) -> Cause | None:
    """`explain` for a log already in memory.

    With `anywhere` it may be another program's: lines without CRIU's `Error` count where a row says so.
    """
    # names of the container's files stand in it, and this goes to a terminal
    said = ["".join(c if c.isprintable() else "?" for c in line) for line in text.split("\n")]
    lines = [line for line in said if "Error" in line and not _NOISE.search(line)]
    cause = _known(lines, [known for known in CAUSES if known.verb in (None, verb)])
    if cause is None and anywhere:
        cause = _known(said, [known for known in CAUSES if known.anywhere])
    if cause is not None or not lines:
        return cause
    line = next((line for line in lines if not _FOLLOWS.search(line)), lines[0]).strip()
    bare = re.sub(r"^(?:\([\d.]+\)\s*)?(?:(?:pie: )?\d+:\s*)?Error \([^)]*\):\s*", "", line)
    return Cause(f"CRIU: {bare}", "read the log; the lines before this error say what CRIU was doing", line)


def explain_failure(path: str, verb: Verb) -> Cause | None:
    """`explain` for an operation that has failed: a log without an error and without an end is of a killed CRIU."""
    text = _end(path)
    if text is None:
        return None
    cause = explain_text(text, verb)
    if cause is None and _TALKS.search(text) and not _ENDED.search(text):
        return killed(0)
    return cause


def _end(path: str) -> str | None:
    """The end of a log; None when there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - TAIL))
            return f.read().decode(errors="replace")
    except OSError:
        return None


def killed(number: int) -> Cause:
    """The cause where CRIU was ended by a signal; 0 when it is not known by which."""
    return Cause(
        "CRIU was killed in the middle of it"
        + (f" (signal {number})" if number else "")
        + ", by nothing in its log",
        "see the kernel's log (dmesg) for a kill for want of memory, and try again",
        "",
    )


def _known(lines: list[str], rows: list[Known]) -> Cause | None:
    for known in rows:
        for line in lines:
            match = known.pattern.search(line)
            if match:
                groups = [g for g in match.groups() if g is not None] + ["?"] * 4
                summary, hint = known.summary.format(*groups), known.hint.format(*groups)
                return Cause(summary, hint, line.strip(), known.id, known.source)
    return None


def verb_of(text: str, name: str = "") -> Verb:
    """Whether a log is of a dump or a restore: by its file name, else by what it says."""
    base = name.rpartition("/")[2]
    if "restore" in base or "dump" in base:
        return "restore" if "restore" in base else "dump"
    restoring = re.search(r"Restoring FAILED|RESTORE|[Rr]estor(?:e|ing)\b", text)
    return "restore" if restoring and "Dumping FAILED" not in text else "dump"
