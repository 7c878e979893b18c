# SPDX-License-Identifier: Apache-2.0
"""`delete`: the real runtime deletes, then the container's record goes, and the bundle and chunks kept for it."""

import posix

from cryoci.shim import child, remains
from cryoci.shim.argv import Invocation
from cryoci.shim.paths import bundle_directory, chunks_directory, container_directory


def main(line: Invocation, path: str, argv: list[str] | None = None) -> int:
    """Run the runtime at `path`; when it succeeds the record is removed. Returns its exit status.

    `argv` is what the runtime gets, by default `line` word for word.

    The caller has found the record, so the id is valid.
    """
    directory = f"{line.root or '/run/runc'}/{line.id}"
    if posix.access(f"{directory}/criu-root", posix.F_OK):  # of a runc that was killed
        from cryoci.shim import criu_root

        criu_root.unmount(directory)
    # A deletion that outlives its caller does no harm, and to prevent it costs the import of ctypes.
    status = child.run(path, argv or line.argv, tied=False)
    if status == 0 and line.id:
        remains.remove(container_directory(line.root, line.id))
        for place in (bundle_directory(line.root, line.id), chunks_directory(line.root, line.id)):
            if posix.access(place, posix.F_OK):
                import shutil  # 10 ms, only for containers of `cryoci restore`, and for incremental checkpoints

                if posix.access(f"{place}/netns", posix.F_OK):
                    from cryoci.shim.engines import engines_own

                    engines_own.release(place)
                shutil.rmtree(place, ignore_errors=True)
    return status
