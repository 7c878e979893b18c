# SPDX-License-Identifier: Apache-2.0
"""Real services for tests of checkpoints: redis, PostgreSQL, Node.js, and Python with Jupyter's server and kernel.

`Cluster.start(shown=services.shown())` has a node see the containers' root directories at DEBIAN (packages that are
unpacked only, so no /etc/alternatives) and PYTHON (the counter's, and wheels in WHEELS). They are no layers of the
node's own overlay, as files that are mapped through two overlays have no mount that CRIU could find.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryoci.command import run, which
from tests.nodes import tree, workload
from tests.nodes.node import Node

DEBIAN, PYTHON = "/opt/services/debian", "/opt/services/python"
WHEELS, LIBRARIES = "/wheels", "usr/lib/x86_64-linux-gnu"
ENVIRONMENT = ("LANG=C.UTF-8", "HOME=/data")
CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
)  # which engines give, and `runc spec` does not
# As in the default profiles of engines: CRIU cannot dump io_uring, and Node.js takes it wherever it may.
SECCOMP = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
}
PACKAGES = (
    "base-files", "bash", "coreutils", "dash", "libc-bin", "nodejs", "postgresql-17", "redis-server",
)  # fmt: skip
# Two thirds of their size, for nothing that is used here: PostgreSQL's compiler of queries, perl, headers.
EXCLUDED = (
    "/usr/lib/x86_64-linux-gnu/libLLVM*", "/usr/lib/x86_64-linux-gnu/libz3*", "/usr/lib/*perl*", "/usr/share/perl*",
    "/usr/share/i18n/*", "/usr/share/nodejs/npm/*", "/usr/share/nodejs/corepack/*",
)  # fmt: skip
# Without --no-deps pip would bring 20 MB more: a debugger, and a completer of Python.
KERNEL = (
    "ipykernel<8", "ipython<10", "ipython-pygments-lexers", "traitlets", "jupyter-client<9", "jupyter-core",
    "tornado", "pyzmq", "comm", "nest-asyncio", "packaging", "psutil", "matplotlib-inline", "decorator", "stack-data",
    "executing", "asttokens", "pure-eval", "prompt-toolkit", "wcwidth", "pygments", "python-dateutil", "six",
    "platformdirs", "typing-extensions",
)  # fmt: skip
# And a notebook server, without what converts notebooks and opens terminals.
SERVER = (
    "jupyter-server<3", "jupyter-events", "anyio", "idna", "argon2-cffi", "argon2-cffi-bindings", "cffi", "jinja2",
    "markupsafe", "jsonschema", "jsonschema-specifications", "attrs", "referencing", "rpds-py", "pyyaml",
    "python-json-logger", "rfc3339-validator", "rfc3986-validator", "nbformat", "fastjsonschema", "overrides",
    "prometheus-client", "send2trash", "websocket-client",
)  # fmt: skip


def shown() -> dict[str, Path]:
    """What a node with services is to see."""
    return {DEBIAN: debian(), PYTHON: python()}


@functools.cache
def debian() -> Path:
    """The root directory of redis, PostgreSQL and Node.js on the host."""
    name = f"services-{tree.digest([tree.SUITE, *PACKAGES, *EXCLUDED, inspect.getsource(fill)])}"
    return tree.cached(name, fill)


@functools.cache
def python() -> Path:
    """The root directory of Python services on the host."""
    base = workload.layer()
    name = f"pyservices-{tree.digest([base.name, *KERNEL, *SERVER, inspect.getsource(fill_python)])}"
    return tree.cached(name, lambda root: fill_python(root, base))


def fill(root: Path) -> None:
    """Make the former at `root`."""
    tree.mmdebstrap(root, PACKAGES, variant="extract", exclude=EXCLUDED)
    (root / "data").mkdir()
    (root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/data:/bin/sh\n")


def fill_python(root: Path, base: Path) -> None:
    """Make the latter at `root`."""
    shutil.copytree(base / workload.ROOTFS.lstrip("/"), root, symlinks=True)
    for library in ("libstdc++.so.6", "libgcc_s.so.1", "libsqlite3.so.0"):
        shutil.copy(tree.debian() / LIBRARIES / library, root / LIBRARIES)
    run([
        sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--python-version", "3.13",
        "--only-binary=:all:", "--no-deps", "--no-compile", "--target", root / WHEELS.lstrip("/"), *KERNEL, *SERVER,
    ])  # fmt: skip


def compiled(source: Path) -> Path:
    """A shared library from one file of C, without libc."""

    def build(path: Path) -> None:
        path.mkdir(parents=True)
        compiler = which("gcc", package="gcc libc6-dev")
        run(
            [
                compiler,
                "-Wall",
                "-Werror",
                "-O1",
                "-shared",
                "-fPIC",
                "-nostdlib",
                "-o",
                path / "library.so",
                source,
            ]
        )

    return tree.cached(f"preload-{tree.digest([source.read_text()])}", build) / "library.so"


def bundle(node: Node, destination: str, argv: Sequence[str], *, root: str = DEBIAN) -> None:
    """Make a bundle that runs `argv` at `destination`, in the network of the node; its root is an overlay."""
    script = f"""
        mkdir -p "$1/rootfs" "$1/upper/data" "$1/work" && cd "$1"
        mount -t overlay overlay -o "lowerdir={root},upperdir=$1/upper,workdir=$1/work" rootfs
        runc spec && cat config.json
    """
    config: dict[str, Any] = json.loads(node.run(["/bin/sh", "-euc", script, "sh", destination]).stdout)
    config["process"].update(terminal=False, args=list(argv), cwd="/")
    config["process"]["env"] += [*ENVIRONMENT, f"PYTHONPATH={WHEELS}"]
    for found in config["process"]["capabilities"].values():
        found += CAPABILITIES
    config["root"]["readonly"] = False
    linux = config["linux"]
    linux["seccomp"] = SECCOMP
    linux.pop("resources", None)  # cgroup2 may have no controllers in a node
    linux["cgroupsPath"] = f"/{os.path.basename(destination)}"
    linux["namespaces"] = [n for n in linux["namespaces"] if n["type"] != "network"]
    node.write(f"{destination}/config.json", json.dumps(config, indent=1))
