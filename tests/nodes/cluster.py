# SPDX-License-Identifier: Apache-2.0
"""A cluster: test nodes on one bridge, apart from the host and from every other cluster.

    with Cluster(tag="demo") as cluster:
        a, b = cluster.start("a"), cluster.start("b")
        a.run(["podman", "ps"])

Always cleaned up: by `close`, by the supervisors when this process dies (SIGKILL included), by the next
start.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from cryoci.errors import ConflictError
from tests.nodes import defaults, host, tree
from tests.nodes.machine import Machine
from tests.nodes.namespace import NamespaceNode
from tests.nodes.network import Switch
from tests.nodes.node import Node, NodeError

_counter = itertools.count()


class Cluster:
    """Nodes on one bridge, in namespaces and cgroups of their own. A context manager.

    `cgroup` is its cgroup2 directory, `switch` its network. Raises PrivilegeError without root and
    UnsupportedError on a host that cannot have nodes.
    """

    def __init__(self, tag: str = "node") -> None:
        tree.require_root()
        host.sweep()
        self.id = f"{host.PREFIX}{tag}.{os.getpid()}.{host.start_time(os.getpid())}.{next(_counter)}"
        self.cgroup = host.cgroup2() / self.id
        self.nodes: list[Node] = []
        self._lock = threading.Lock()
        with contextlib.ExitStack() as stack:
            for place in host.PLACES:
                stack.callback(shutil.rmtree, place / self.id, ignore_errors=True)
            stack.callback(host.remove_cgroup, self.cgroup)
            self.cgroup.mkdir()
            host.enable_controllers(self.cgroup)
            self.switch = Switch()
            stack.callback(self.switch.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(
        self,
        name: str,
        *,
        files: Mapping[str, str] | None = None,
        scratch_mib: int = 8192,
        run_mib: int = 512,
        tmp_mib: int = 2048,
        disk: bool = False,
        shown: Mapping[str, Path] | None = None,
    ) -> NamespaceNode:
        """Start a namespace node (0.1 s once the tree is built); `files` maps paths to text.

        `shown` maps paths to directories of the host, which it sees there read-only.

        Its writable storage is a tmpfs of at most `scratch_mib` MiB, or with `disk` a directory of the host.
        Raises ConflictError when the name is taken, UnsupportedError when the host cannot start one.
        """
        with self._lock:
            node = NamespaceNode(self.cgroup / name, self.switch, name, self._next(name))
            self.nodes.append(node)
        etc = {**defaults.files(name), **defaults.namespace_files(), **(files or {})}
        storage = host.DISKS / self.id / name if disk else None
        sizes = {"scratch_mib": scratch_mib, "run_mib": run_mib, "tmp_mib": tmp_mib}
        node.start(etc, disk=storage, shown=shown or {}, **sizes)
        self._tell_hosts()
        return node

    def machine(
        self, name: str, *, files: Mapping[str, str] | None = None, memory_mib: int = 3072, wait: bool = True
    ) -> Machine:
        """Boot a machine node (about 15 s; without `wait`, use `Machine.wait` before anything else).

        Its /etc/hosts names the nodes that were there before it. Raises ConflictError, NotFoundError without
        qemu, NodeError when it does not come up.
        """
        with self._lock:
            node = Machine(self.cgroup / name, self.switch, name, self._next(name))
            self.nodes.append(node)
        names = [n.name for n in self.nodes]
        etc = {**defaults.files(name), "/etc/hosts": defaults.hosts(names), **(files or {})}
        node.start(etc, run=host.RUN / self.id / name, memory_mib=memory_mib)
        if wait:
            node.wait()
        return node

    def registry(self, node: Node) -> str:
        """Start a plain HTTP registry in a node; return "ADDRESS:5000" once it answers. Raises NodeError."""
        log = "/var/log/registry.log"
        node.sh(f"setsid docker-registry serve /etc/docker/registry/nodes.yml >{log} 2>&1 </dev/null &")
        url = f"http://{node.address}:{defaults.REGISTRY_PORT}/v2/"
        end = time.monotonic() + 20
        probe = f"import urllib.request; urllib.request.urlopen('{url}', timeout=2)"
        while (result := node.run(["python3", "-c", probe], check=False)).returncode != 0:
            if time.monotonic() > end:
                said = (node.read(log) + result.stderr).decode(errors="replace")
                raise NodeError(f"the registry on {node.name} does not answer at {url}:\n{said}")
            time.sleep(0.05)
        return f"{node.address}:{defaults.REGISTRY_PORT}"

    def close(self) -> None:
        """Kill every node and remove what the cluster made; fine for nodes that are dead already."""
        with self._stack:
            for node in self.nodes:
                self._stack.callback(node.kill)

    def _next(self, name: str) -> int:
        """The index of a new node."""
        if any(n.name == name for n in self.nodes):
            raise ConflictError(f"the cluster has a node {name} already", hint="names are for one node each")
        if len(self.nodes) >= defaults.MAX_NODES:
            raise ConflictError(f"a cluster has at most {defaults.MAX_NODES} nodes")
        return len(self.nodes)

    def _tell_hosts(self) -> None:
        text = defaults.hosts([n.name for n in self.nodes])
        for node in self.nodes:
            if isinstance(node, NamespaceNode) and node.alive:
                node.path("/etc/hosts").write_text(text)


@contextlib.contextmanager
def single(name: str = "node") -> Iterator[NamespaceNode]:
    """One namespace node in a cluster of its own."""
    with Cluster(tag=name) as cluster:
        yield cluster.start(name)
