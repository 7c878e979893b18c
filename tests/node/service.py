# SPDX-License-Identifier: Apache-2.0
"""A real service in a container that is checkpointed and restored on its node, and its client on that node."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.nodes import services, workload
from tests.nodes.namespace import NamespaceNode

CONFIG = "/etc/cryoci/config.toml"
REDIS = (
    "redis-server", "--port", "6379", "--save", "", "--enable-debug-command", "local", "--daemonize", "no",
)  # fmt: skip
# PostgreSQL at port 5432, as root behind a library that tells it otherwise: its Service takes program user.c.
_POSTGRES = "/usr/lib/postgresql/17/bin"
POSTGRES = ("/bin/sh", "-euc", f"""
    mkdir /data/db; chown 1000 /data/db
    export LD_PRELOAD=/data/library.so
    {_POSTGRES}/initdb -D /data/db -A trust -U postgres --no-sync --no-locale >/data/log
    exec {_POSTGRES}/postgres -D /data/db -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
        -c fsync=off -c jit=off
""")  # fmt: skip
POSTGRES_READY = (f"{_POSTGRES}/pg_isready", "-h", "127.0.0.1")
PROGRAMS = Path(__file__).with_name("services")


class Service:
    """A container of one service, with nothing left of it after the with block; only its bundle, if not `started`."""

    def __init__(
        self,
        node: NamespaceNode,
        kind: str,
        name: str,
        argv: tuple[str, ...],
        *,
        root: str = services.DEBIAN,
        programs: tuple[str, ...] = (),
        started: bool = True,
    ) -> None:
        self.node, self.kind, self.name, self.argv = node, kind, f"{name}-{kind}", argv
        self.root, self.programs, self.started = root, programs, started
        self.base = f"/srv/{self.name}"

    def __enter__(self) -> Service:
        self.configure("criu")
        services.bundle(self.node, self.base, self.argv, root=self.root)
        for program in self.programs:  # into /data
            source = PROGRAMS / program
            if source.suffix == ".c":
                source = services.compiled(source)
            self.node.write(f"{self.base}/rootfs/data/{source.name}", source.read_bytes())
        if self.started:
            argv = ["cryoci-runtime", "run", "-d", "-b", self.base, self.name]
            workload.detach(self.node, argv, f"{self.base}/log")
        return self

    def __exit__(self, *exc: object) -> None:
        self.node.run(["cryoci-runtime", "delete", "-f", self.name], check=False)
        self.node.sh(f"umount {self.base}/rootfs && rm -rf {self.base}")

    def configure(self, engine: str) -> None:
        """Who moves memory in its next checkpoint; small areas are large enough."""
        memory = f'[memory]\nengine = "{engine}"\nthreshold = "1M"\nchunk = "8M"\n'
        self.node.write(CONFIG, f'[runtime]\npath = "{self.kind}"\n{memory}')

    @property
    def images(self) -> str:
        return f"{self.base}/img"

    def checkpoint(self, engine: str) -> int:
        """Checkpoint it; returns the MiB that went past CRIU."""
        self.configure(engine)
        self.node.sh(f"rm -rf {self.images}")
        flags = ["--image-path", self.images, "--tcp-established"]
        self.node.run(["cryoci-runtime", "checkpoint", *flags, self.name], timeout=120)
        files = self.node.sh(f"cd {self.images} && stat -c %s cryoci-memory-*.img 2>/dev/null || true")
        moved = sum(int(size) for size in files.split()) >> 20
        assert (moved > 0) == (engine == "parallel"), files
        return moved

    def restore(self) -> None:
        # runc has deleted it with its checkpoint, crun has not
        self.node.run(["cryoci-runtime", "delete", self.name], check=False)
        argv = ["cryoci-runtime", "restore", "-d", "-b", self.base]
        argv += ["--image-path", self.images, "--tcp-established", self.name]
        workload.detach(self.node, argv, f"{self.base}/log")

    def execute(self, *argv: str) -> str:
        """Run a program in the container; returns what it says."""
        said = self.node.run(["cryoci-runtime", "exec", self.name, *argv])
        return said.stdout.decode()


class Client:
    """A program of tests/node/services that runs on the node: a line of JSON to it, a line of JSON from it."""

    def __init__(self, node: NamespaceNode, program: str, *argv: str) -> None:
        path = f"/srv/{id(self):x}-{program}"  # its own: one written anew while another client reads it is empty
        node.write(path, (PROGRAMS / program).read_text())
        words = ["python3", path, *argv]
        env = {"PYTHONPATH": f"{services.PYTHON}{services.WHEELS}"}
        self.process = node.popen(words, stdin=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, what: str) -> Any:
        """Its answer to a request. Raises AssertionError with what it said when that is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        line = b""
        try:
            self.process.stdin.write(json.dumps({"ask": what}).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            return json.loads(line)
        except (ValueError, BrokenPipeError):
            said = (line + self.process.stdout.read()).decode(errors="replace")
            raise AssertionError(f"the client ended with {self.process.wait()}: {said}") from None


def goes_on(client: Client, written: int, more: int = 100) -> int:
    """Wait until so many writes more than `written` were acknowledged; returns how many were."""

    def reached() -> int | None:
        now: int = client.ask("info")["written"]
        return now if now > written + more else None

    found: int = until(reached)
    return found


def listening(service: Service, port: int) -> None:
    """Wait until something listens on a port of the node."""
    until(lambda: service.node.sh(f"ss -Htln 'sport = :{port}'") or None)


def until(call: Any, timeout: float = 30) -> Any:
    """The first answer of `call` that is no AssertionError and not None."""
    end = time.monotonic() + timeout
    while True:
        try:
            if (answer := call()) is not None:
                return answer
        except AssertionError:
            if time.monotonic() > end:
                raise
        if time.monotonic() > end:
            raise AssertionError(f"no answer within {timeout:g} s")
        time.sleep(0.1)
