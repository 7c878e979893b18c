# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.gpu.kit FILE.tar.xz`: what a GPU machine without packages needs to run the suite.

GPU machines often have PyTorch and a driver, and neither CRIU nor a package registry. The kit holds Debian's criu,
runc, crun and docker-registry from the node tree, and with what cryoci's push is compared, started with the tree's
libraries (all but libc, whose 2.39 is enough), CRIU's CUDA plugin, and the Python packages of cryoci and its tests for
the Python of that machine.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from tests.nodes import cuda_plugin, tree

PROGRAMS = (
    *("usr/sbin/criu", "usr/sbin/runc", "usr/bin/crun", "usr/bin/docker-registry"),
    *("usr/bin/oras", "usr/bin/skopeo", "usr/bin/buildah", "usr/bin/zstd"),  # for bench.push_image --here
)
EXTRA = ("libcriu.so.2",)  # crun loads it by name
LIBC = re.compile(r"(ld-linux|libc\.|libm\.|libpthread|libdl|librt)")
TESTS = ("pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.100")
_WRAPPER = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")/..
export LD_LIBRARY_PATH=$here/lib
exec "$here/libexec/{name}" "$@"
"""


def main() -> None:
    """Write the kit."""
    target, version = Path(sys.argv[1]).absolute(), sys.argv[2] if len(sys.argv) > 2 else "3.12"
    base = tree.debian()
    with tempfile.TemporaryDirectory() as scratch:
        kit = Path(scratch) / "kit"
        for name in ("bin", "lib", "libexec"):
            (kit / name).mkdir(parents=True)
        for path in PROGRAMS:
            name = path.rpartition("/")[2]
            shutil.copy2(base / path, kit / "libexec" / name)
            wrapper = kit / "bin" / name
            wrapper.write_text(_WRAPPER.format(name=name))
            wrapper.chmod(0o755)
        for library in _libraries(base):
            shutil.copy2((base / "usr/lib/x86_64-linux-gnu" / library).resolve(), kit / "lib" / library)
        (kit / "lib/criu").mkdir()
        shutil.copy2(cuda_plugin.directory() / cuda_plugin.LIBRARY, kit / "lib/criu")
        wanted = tomllib.loads((tree.REPO / "pyproject.toml").read_text())["project"]["dependencies"]
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"),
                *("--python-version", version, "--only-binary=:all:", "--target", str(kit / "site")),
                *wanted,
                *TESTS,
            ],
            check=True,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "-C", scratch, "-cJf", str(target), "kit"], check=True)
    print(
        f"{target}: {target.stat().st_size >> 20} MiB; there: tar -xf it, and PATH=kit/bin, PYTHONPATH=kit/site"
    )


def _libraries(base: Path) -> set[str]:
    """What the programs need, and what that needs, by soname."""
    directory = base / "usr/lib/x86_64-linux-gnu"
    found: set[str] = set()
    todo = [base / path for path in PROGRAMS] + [directory / name for name in EXTRA]
    found.update(EXTRA)
    while todo:
        said = subprocess.run(
            ["objdump", "-p", str(todo.pop())], capture_output=True, check=True
        ).stdout.decode()
        for name in re.findall(r"NEEDED\s+(\S+)", said):
            if name not in found and not LIBC.match(name):
                found.add(name)
                todo.append(directory / name)
    return found


if __name__ == "__main__":
    main()
