# SPDX-License-Identifier: Apache-2.0
"""What /etc of a node says: engines that work without cgroup controllers, and registries over plain HTTP."""

from __future__ import annotations

SUBNET = "10.77.0"
REGISTRY_PORT = 5000
MAX_NODES = 32

# No controller is on cgroup2 in a namespace node, so a pids limit cannot be set; no systemd, so no
# cgroup manager and no journal either. k8s-file is what survives a checkpoint of podman.
CONTAINERS_CONF = """\
[containers]
pids_limit = 0
log_driver = "k8s-file"

[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
# Where the host keeps controllers on cgroup v1, /proc/PID/cgroup shows them in a node too, and CRIU would
# dump and restore them: in the host's hierarchies, and failing there under crun ("Failed writing 0-1 to
# cpuset//..."). Naming one controller that does not exist makes CRIU leave cgroups to the runtime.
# default.conf, as RPC options win over manage-cgroups here and no runtime sets this one, nor do per-
# container configs.
CRIU_CONF = "cgroup-dump-controller none\n"
# Without its name in runtime_supports_json podman reads errors as text, and gives other exit statuses.
RUNTIMES_CONF = """\
[engine]
runtime_supports_json = ["crun", "runc", "kata", "runsc", "youki", "krun", "cryoci-runtime"]

[engine.runtimes]
cryoci-runtime = ["/usr/local/bin/cryoci-runtime"]
"""


def address(index: int) -> str:
    """IPv4 address of the node with this index (0 is the first node)."""
    return f"{SUBNET}.{index + 2}"


def registries() -> str:
    """registries.conf: port 5000 of every address a node can have speaks plain HTTP (it knows no CIDR)."""
    blocks = [
        f'[[registry]]\nlocation = "{address(i)}:{REGISTRY_PORT}"\ninsecure = true\n'
        for i in range(MAX_NODES)
    ]
    return 'unqualified-search-registries = ["localhost"]\n' + "\n".join(blocks)


def hosts(names: list[str]) -> str:
    """/etc/hosts with every node of a cluster under its name."""
    return "127.0.0.1 localhost\n" + "".join(f"{address(i)} {name}\n" for i, name in enumerate(names))


def namespace_files() -> dict[str, str]:
    """Path to text of what only a namespace node gets: the engines there have no cgroup controllers."""
    return {"/etc/containers/containers.conf": CONTAINERS_CONF, "/etc/criu/default.conf": CRIU_CONF}


def files(name: str) -> dict[str, str]:
    """Path to text of the files that every node gets."""
    return {
        "/etc/hostname": f"{name}\n",
        "/etc/resolv.conf": "",
        "/etc/hosts": hosts([]),
        "/etc/containers/registries.conf.d/50-nodes.conf": registries(),
        "/etc/containers/containers.conf.d/50-cryoci.conf": RUNTIMES_CONF,
        "/etc/docker/registry/nodes.yml": REGISTRY_CONF,
    }


REGISTRY_CONF = f"""\
version: 0.1
log: {{level: warn}}
storage:
  filesystem: {{rootdirectory: /srv/registry}}
  delete: {{enabled: true}}
http: {{addr: ":{REGISTRY_PORT}"}}
"""
