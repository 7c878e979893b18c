# SPDX-License-Identifier: Apache-2.0
"""Which verbs cryoci adds to, and which go straight to the real runtime.

The verbs that need more load their module; all other lines, and all that the tables of `argv` cannot
explain, reach the real runtime word for word. This module is on the path of every call.
"""

import posix

from cryoci.shim import paths, underlying
from cryoci.shim.argv import Invocation, parse

_ADDED = ("create", "run", "checkpoint", "restore")


def main(argv: list[str], launcher: str) -> None:
    """Run one command line; does not return. `launcher` is the path of this program."""
    line = parse(argv)
    try:
        status = run(line, launcher)
    except Exception as e:
        from cryoci.shim import failure

        status = failure.report(line, e)
    posix._exit(status)


def run(line: Invocation, launcher: str) -> int:
    """Do `line`; returns the exit status, or becomes the real runtime."""
    plain = line.doubt is None and line.id is not None and not line.asks_help
    if plain and line.verb in _ADDED:
        if line.verb in ("create", "run"):
            from cryoci.shim import create

            return create.main(line, launcher)
        if line.verb == "checkpoint":
            from cryoci.shim import checkpoint

            return checkpoint.main(line, launcher)
        from cryoci.shim import restore

        return restore.main(line, launcher)
    path = underlying.recorded(line.root, line.id, launcher) if line.verb else None
    if plain and path is not None:
        if posix.access(paths.container_directory(line.root, line.id or "") + "/waiting", posix.F_OK):
            from cryoci.shim import waiting

            return waiting.main(line, path)
        if line.verb == "delete":
            from cryoci.shim import delete

            return delete.main(line, path)
    underlying.execute(path or underlying.lenient(launcher), line.argv)
    return 1
