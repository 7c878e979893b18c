# SPDX-License-Identifier: Apache-2.0
"""tests/gpu's uses of a GPU, rehearsed in a node: the fake driver, and programs that do what PyTorch's do.

The same files run on real GPUs (`make test-gpu`), where a minute is dear.
"""

from __future__ import annotations

import io
import site
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.fakegpu import build
from tests.nodes import tree, workload
from tests.nodes.namespace import NamespaceNode

pytestmark = [pytest.mark.node, pytest.mark.timeout(600)]
REPO = "/opt/repo"
PURE = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py", "pytest_timeout.py")
BASE = "/tmp/base"  # CRIU cannot dump what runs on an overlay over the node's own
PAGE = "/srv/results.md"


def furnish(node: NamespaceNode) -> None:
    """This checkout and pytest, and a driver with one GPU that containers see too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=tree.REPO,
        capture_output=True,
        check=True,
    ).stdout.decode()
    packages = next(Path(p) for p in site.getsitepackages() if (Path(p) / "pytest").is_dir())
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name in filter(None, listed.split("\0")):
            if (tree.REPO / name).exists():
                archive.add(tree.REPO / name, name, recursive=False)
        for name in PURE:
            archive.add(packages / name, f"pure/{name}")
        archive.add(next(packages.glob("pytest_timeout-*.dist-info")), "pure/pytest_timeout-0.dist-info")
    node.run(["mkdir", "-p", REPO])
    node.run(["tar", "-xC", REPO, "--no-same-owner"], input=raw.getvalue())
    node.run(["cp", "-a", workload.ROOTFS, BASE])
    for root in ("", BASE):
        for name in build.NAMES:
            path = f"{root}/usr/lib/x86_64-linux-gnu/{name}"
            node.write(path, (build.library() / name).read_bytes(), mode=0o755)
        node.write(f"{root}/etc/fakegpu/devices", build.devices())


@pytest.mark.parametrize("group", ["share", "guard", "bake"])
def test_rehearsal(node: NamespaceNode, group: str) -> None:
    furnish(node)
    words = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", f"tests/gpu/test_{group}.py"]
    env = {
        "PYTHONPATH": f"{REPO}/pure",
        "GPU_BASE": BASE,
        "GPU_RESULTS": PAGE,
        "GPU_KILLS": "3",
        "GPU_EVERY": "2",
        "GPU_SHARE_SECONDS": "5",
    }
    argv = ["env", "-C", REPO, f"{tree.VENV}/bin/python", *words]
    done = node.run(argv, env=env, timeout=400, check=False)
    said = done.stdout.decode() + done.stderr.decode()
    print(said)
    assert done.returncode == 0, said
    page = node.read(PAGE).decode()
    print(page)
    assert "| passed |" in page and f"{group}: " in page
