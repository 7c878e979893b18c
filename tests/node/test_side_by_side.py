# SPDX-License-Identifier: Apache-2.0
"""What engines do with cryoci-runtime is what they do with the runtime below it: 75 commands, word for word."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.node import commands
from tests.node.subject import CONFIG
from tests.nodes import workload
from tests.nodes.cluster import Cluster

pytestmark = pytest.mark.node

SHIM = "/usr/local/bin/cryoci-runtime"


@pytest.mark.parametrize(("below", "program"), [("runc", "/usr/sbin/runc"), ("crun", "/usr/bin/crun")])
def test_commands(below: str, program: str) -> None:
    with Cluster(tag="commands") as cluster:
        node = cluster.start("node")
        workload.load(node)
        node.write("/srv/seccomp.json", commands.SECCOMP)
        node.write(CONFIG, f'[runtime]\npath = "{below}"\n')
        node.sh("setsid containerd >/var/log/containerd.log 2>&1 </dev/null &")
        node.sh("for i in $(seq 100); do ctr version >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1")
        node.run(["ctr", "image", "import", workload.ARCHIVE])

        def side(runtime: str, binary: str, port: int) -> list[commands.Answer]:
            own = (f"side{port}", str(port), f"--runtime={runtime} ", binary)
            lines = [*commands.podman(own[0], port), *commands.containerd(own[0], binary)]
            with_runtime = [line.replace("podman ", f"podman --runtime={runtime} ") for line in lines]
            return commands.answers(node, with_runtime, *own)

        with ThreadPoolExecutor(2) as pool:
            bare = pool.submit(side, below, program, 8091)
            ours = pool.submit(side, "cryoci-runtime", SHIM, 8092)
        assert len(bare.result()) >= 70
        for theirs, mine in zip(bare.result(), ours.result(), strict=True):
            assert mine == theirs
