# SPDX-License-Identifier: Apache-2.0
"""AMD render nodes of another number: the image of /dev that cryoci changes, dumped and restored by real CRIU."""

from __future__ import annotations

import json

import pytest

from tests.node.subject import CONFIG
from tests.nodes import tree, workload
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node
_RESTORE = """
import subprocess, sys
from cryoci.shim.gpu import amd_nodes
images, *argv = sys.argv[1:]
with amd_nodes.provided(images, {}, {"/dev/dri/renderD128": "/dev/dri/renderD140"}) as added:
    print(added)
    sys.exit(subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=open("/srv/restore.log", "w"), stderr=2).returncode)
"""


@pytest.mark.parametrize("below", ["runc", "crun"])
def test_criu_unpacks_it(node: NamespaceNode, below: str) -> None:
    """The runtime itself restores, and nothing else makes devices: what is there has CRIU unpacked."""
    name, base = f"amd-{below}", f"/srv/amd-{below}"
    node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
    spec = workload.bundle(node, base)
    spec["linux"]["devices"] = [
        {
            "path": "/dev/dri/renderD128",
            "type": "c",
            "major": 226,
            "minor": 128,
            "fileMode": 0o660,
            "gid": 44,
        }
    ]
    node.write(f"{base}/config.json", json.dumps(spec))
    workload.detach(
        node, [below, "run", "-d", "-b", base, "--pid-file", f"{base}/pid", name], "/srv/run.log"
    )
    before = workload.wait(node, 3, pid=int(node.read(f"{base}/pid")))
    images = f"{base}.images"
    node.run(["mkdir", "-p", images, f"{base}.work"])  # crun makes none
    node.run([below, "checkpoint", "--image-path", images, "--work-path", f"{base}.work", name])
    kept = node.sh(f"cd {images} && sha256sum tmpfs-*")
    node.run([below, "delete", "--force", name], check=False)
    words = ["restore", "-d", "-b", base, "--image-path", images, "--work-path", f"{base}.work"]
    argv = [
        f"{tree.VENV}/bin/python",
        "-c",
        _RESTORE,
        images,
        below,
        *words,
        "--pid-file",
        f"{base}/pid",
        name,
    ]
    assert node.run(argv).stdout == b"['/dev/dri/renderD140']\n"
    pid = int(node.read(f"{base}/pid"))
    there = node.sh(f"cd /proc/{pid}/root/dev/dri && stat -c '%n %t:%T %a %g' renderD*").splitlines()
    assert there == ["renderD128 e2:80 660 44", "renderD140 e2:8c 660 44"]
    assert workload.wait(node, before["count"] + 2, pid=pid)["boot"] == before["boot"]
    assert node.sh(f"cd {images} && sha256sum tmpfs-*") == kept
    node.run([below, "delete", "--force", name])
