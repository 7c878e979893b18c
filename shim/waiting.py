# SPDX-License-Identifier: Apache-2.0
"""A container that `create` has restored and that waits, frozen, for its `start`.

File `waiting` in its record says so; while it is there the launcher's fast path leaves the container to this
module. The real runtime calls such a container paused; engines must see one that is created.
"""

import posix

from cryoci.errors import ConflictError
from cryoci.shim import child, state, underlying
from cryoci.shim.argv import Invocation
from cryoci.shim.paths import container_directory

NAME = "waiting"


def mark(directory: str, source: str) -> None:
    """The container with the record `directory` waits; `source` is what it was restored from. Raises OSError."""
    state.write(f"{directory}/{NAME}", (source + "\n").encode())


def main(line: Invocation, path: str) -> int:
    """Run a verb on a waiting container; `path` is the real runtime. Returns the exit status, or becomes it.

    Raises ConflictError for what cannot be done before the start.
    """
    if line.verb == "state":
        return _state(line, path)
    if line.verb == "start":
        status = child.run(path, _words(line, "resume"))
        if status == 0:
            state.unlink(f"{container_directory(line.root, line.id or '')}/{NAME}")
        return status
    if line.verb == "delete":
        from cryoci.shim import delete

        # a created container may be deleted as it is, a paused one only by force
        return delete.main(line, path, line.argv if line.has("force") else _words(line, "delete", "--force"))
    if line.verb in ("pause", "resume"):
        raise ConflictError(
            f"container {line.id} is created from a checkpoint and not started: there is nothing to {line.verb}",
            hint="start it first",
        )
    underlying.execute(path, line.argv)
    return 1


def _words(line: Invocation, verb: str, *flags: str) -> list[str]:
    return [*line.argv[: line.verb_index], verb, *flags, line.id or ""]


def _state(line: Invocation, path: str) -> int:
    """The real runtime's own words, but for the status."""
    import subprocess  # 10 ms, only between create and start

    result = subprocess.run(
        [path, *line.argv[1:]], stdout=subprocess.PIPE, env=underlying.child_environment()
    )
    posix.write(1, result.stdout.replace(b'"status": "paused"', b'"status": "created"'))
    return result.returncode
