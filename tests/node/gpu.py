# SPDX-License-Identifier: Apache-2.0
"""A node with (fake) GPUs, and a container on it that computes on them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from tests.fakegpu import build
from tests.node.subject import CONFIG
from tests.nodes import workload
from tests.nodes.node import Node

LIBRARIES = "/usr/lib/x86_64-linux-gnu"
DEVICES = "/run/fakegpu/devices"
FAULTS = "/run/fakegpu/faults"
STATUS = "/tmp/status"


def equip(node: Node, text: str, *, below: str = "runc") -> None:
    """Install the driver on a node, with the GPUs that `text` lists, and choose the runtime below cryoci's."""
    for name in build.NAMES:
        node.write(f"{LIBRARIES}/{name}", (build.library() / name).read_bytes(), mode=0o755)
    node.write(DEVICES, text)
    node.write(CONFIG, f'[runtime]\npath = "{below}"\n[gpu]\nlock-timeout = 5\n')


def faults(node: Node, *lines: str) -> None:
    """Errors that the node's driver is to make from now on (driver.c)."""
    node.sh("rm -f /run/fakegpu/count.*")
    node.write(FAULTS, "".join(f"{line}\n" for line in lines))


# Starts the program that computes, and tells over HTTP what it says.
_SERVER = """
import http.server, subprocess, sys
port, status, *words = sys.argv[1:]
subprocess.Popen(["python3", "-u", "/app/trainer.py", status, *words])
class Status(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = open(status, "rb").read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("", int(port)), Status).serve_forever()
"""


class Trainer:
    """A bare container `name` on `node` whose first process computes on a GPU, and `children` beside it.

    With `port` its first process is a server there, which tells the status of the other, that computes.
    """

    def __init__(
        self, node: Node, name: str, *, devices: str, children: int = 0, mib: int = 1, port: int = 0
    ) -> None:
        self.node = node
        self.name = name
        self.children = children
        self._devices = devices
        self._mib = mib
        self._port = port

    @property
    def bundle(self) -> str:
        return f"/srv/{self.name}"

    def start(self) -> Trainer:
        """Start it under cryoci-runtime and wait for its first steps."""
        config = workload.bundle(self.node, self.bundle, network=True)
        for name in build.NAMES[:1]:
            raw = (build.library() / name).read_bytes()
            self.node.write(f"{self.bundle}/rootfs{LIBRARIES}/{name}", raw, mode=0o755)
        self.node.write(f"{self.bundle}/rootfs/etc/fakegpu/devices", self._devices)
        self.node.write(f"{self.bundle}/rootfs/app/trainer.py", build.WORKLOAD.read_bytes())
        argv = [
            "python3",
            "-u",
            "/app/trainer.py",
            STATUS,
            "--mib",
            str(self._mib),
            "--children",
            str(self.children),
            "--pause-ms",  # several of them at 100 steps a second take half a processor
            "30",
        ]
        if self._port:
            argv = ["python3", "-u", "-c", _SERVER, str(self._port), *argv[3:]]
        config["process"]["args"] = argv
        for kind in config["process"]["capabilities"].values():
            kind.append("CAP_IPC_LOCK")  # what stands for GPU memory is locked memory
        self.node.write(f"{self.bundle}/config.json", json.dumps(config))
        run = ["cryoci-runtime", "run", "--detach", "--bundle", self.bundle, self.name]
        workload.detach(self.node, run, f"{self.bundle}.log")
        self.runs_on(0)
        return self

    @property
    def status(self) -> str:
        """What the runtime says, or gone."""
        asked = self.node.run(["cryoci-runtime", "state", self.name], check=False)
        return str(json.loads(asked.stdout)["status"]) if asked.returncode == 0 else "gone"

    @property
    def pid(self) -> int:
        return int(json.loads(self.node.run(["cryoci-runtime", "state", self.name]).stdout)["pid"])

    def steps(self) -> list[dict[str, Any]]:
        """What each process said last."""
        root = f"/proc/{self.pid}/root"
        names = [STATUS, *(f"{STATUS}.{n}" for n in range(self.children))]
        return [json.loads(self.node.read(root + name)) for name in names]

    def runs_on(self, count: int | None = None, seconds: float = 90) -> list[dict[str, Any]]:
        """Wait until every process has computed two steps more, its GPU memory intact."""
        end = time.monotonic() + seconds
        start = [count] * (self.children + 1) if count is not None else [s["count"] for s in self.steps()]
        while True:
            try:
                seen = self.steps()
            except AssertionError:  # not written yet
                assert time.monotonic() < end, self.status
                seen = []
            if seen and all(s["count"] >= n + 2 for s, n in zip(seen, start, strict=True)):
                assert all(s["good"] for s in seen), "GPU memory has changed"
                return seen
            assert time.monotonic() < end, f"it stands still at {seen}, and is {self.status}"
            time.sleep(0.02)

    def cryoci(self, verb: str, *words: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        """`cryoci VERB NAME --json`."""
        value: dict[str, Any] = json.loads(
            self.node.run(["cryoci", verb, self.name, "--json", *words], env=env, timeout=120).stdout
        )
        return value

    def restore(self, reference: str, *words: str, on: Node | None = None) -> Trainer:
        """`cryoci restore` of it, here or on another node."""
        copy = Trainer(
            on or self.node, self.name, devices=self._devices, children=self.children, mib=self._mib
        )
        argv: Sequence[str] = ["cryoci", "restore", reference, "--detach", *words]
        workload.detach(copy.node, list(argv), f"/srv/{self.name}.restored.log")
        return copy

    def remove(self) -> None:
        """End it and leave nothing."""
        self.node.run(["cryoci-runtime", "delete", "--force", self.name], check=False)
        self.node.run(["rm", "-rf", self.bundle])
