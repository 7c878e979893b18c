# SPDX-License-Identifier: Apache-2.0
"""CRIU's CUDA plugin, built from the source package of the nodes' CRIU: Debian ships CRIU without its plugins.

It is one file (plugins/cuda/cuda_plugin.c). What a build of all of CRIU would make for it before is little: two links,
a config.h that may be empty (only an option of Virtuozzo's changes a structure that the plugin sees), and the
numbers of system calls, which the kernel's headers have.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from pathlib import Path

from cryoci.command import run, which
from tests.nodes import tree

LIBRARY = "cuda_plugin.so"
PLACE = "/opt/criu-plugins"


@functools.cache
def directory() -> Path:
    """The host's directory with the plugin (a few seconds to make, and 18 to fetch what it needs)."""
    tree.debian()  # the CRIU that it is for
    name = f"cudaplugin-{tree.digest([tree.PREFERENCES, inspect.getsource(inspect.getmodule(fill))])}"  # type: ignore[arg-type]
    return tree.cached(name, fill)


def shown() -> dict[str, Path]:
    """What a node with the plugin is to see: `Cluster.start(shown=cuda_plugin.shown())`."""
    return {PLACE: directory()}


def fill(path: Path) -> None:
    """Fetch the source, and build the plugin into `path`."""
    work = path.with_name(f"{path.name}.src")
    shutil.rmtree(work, ignore_errors=True)
    try:
        tree.mmdebstrap(work, ("libcap-dev",), variant="extract", source="criu")
        (archive,) = work.glob("criu_*.orig.tar.*")
        source = work / "source"
        source.mkdir()
        run(["tar", "-xf", archive, "-C", source, "--strip-components=1"])
        (source / "include/common/asm").symlink_to("arch/x86/asm")
        (source / "compel/include/asm").symlink_to("../arch/x86/src/lib/include")
        made = work / "generated"
        (made / "common").mkdir(parents=True)
        (made / "common/config.h").touch()
        std = made / "compel/plugins/std"
        (std / "asm").mkdir(parents=True)
        (std / "syscall-codes.h").write_text("#include <sys/syscall.h>\n")
        shutil.copy(source / "compel/arch/x86/plugins/include/asm/syscall-types.h", std / "asm")
        path.mkdir()
        quoted = ("include", "criu/include", "criu/arch/x86/include", ".")
        run([
            which("gcc", package="gcc libc6-dev"), "-O1", "-Wall", "-shared", "-nostartfiles", "-fPIC",
            "-D_GNU_SOURCE", "-DCONFIG_X86_64", f"-I{made}", f"-I{source}/compel/include/uapi",
            *(word for one in quoted for word in ("-iquote", source / one)),
            "-idirafter", work / "usr/include", "-o", path / LIBRARY, source / "plugins/cuda/cuda_plugin.c",
        ])  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
