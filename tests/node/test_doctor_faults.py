# SPDX-License-Identifier: Apache-2.0
"""Every check of the doctor on a real node: with a fault that is made there, and without.

Faults of a node are made in a mount namespace of the doctor's own, several at once, so that nothing has to be taken
back. What a kernel, processor or security module of another machine would be is put in its place in /proc and /sys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cryoci.shim.doctor import node
from cryoci.shim.doctor.check import Facts
from tests.fakegpu import build
from tests.node import gpu
from tests.node.gpu import DEVICES, LIBRARIES, Trainer
from tests.node.test_doctor import doctor
from tests.node.test_memory import Mosaic
from tests.node.trouble import small_disk
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

pytestmark = pytest.mark.node

Found = dict[str, dict[str, Any]]
FAULTY = Path(__file__).with_name("faults.py")
Wanted = dict[str, tuple[str, str]]  # check -> verdict, and words of what was found

# A program under a filter (x86-64) that refuses what kernels may lack: kcmp, process_vm_readv, userfaultfd.
_FILTER = """
import ctypes, os, struct, sys
refuse, calls = 0x00050000 | 1, (312, 310, 323)
code = [(0x20, 0, 0, 0)]
code += [(0x15, len(calls) - n, 0, call) for n, call in enumerate(calls)]
code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, refuse)]
text = b"".join(struct.pack("HBBI", *one) for one in code)
buffer = ctypes.create_string_buffer(text)
program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
assert ctypes.CDLL(None).prctl(38, 1, 0, 0, 0) == 0
assert ctypes.CDLL(None).prctl(22, 2, ctypes.create_string_buffer(program)) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
_HIDE = 'hide() { for path; do mount --bind /dev/null "$path"; done; }\n'
_MODULES = "mount -t tmpfs none /sys/module; mkdir -p /sys/module/nvidia\n"
_SMI = """printf '#!/bin/sh\\ncase "$*" in *mig*) echo %s;; *persistence*) echo %s;; esac\\n' {mig} {persistence} \
    >/usr/local/bin/nvidia-smi; chmod +x /usr/local/bin/nvidia-smi
"""
_CDI = "cdiVersion: 0.5.0\\nkind: nvidia.com/gpu\\ncontainerEdits:\\n  mounts:\\n  - hostPath: {path}\\n"

# Name -> how it is made (before `exec "$@"`, which is the doctor), and what the doctor must say.
FAULTS: dict[str, tuple[str, Wanted]] = {
    "kernel": (
        """mount -t tmpfs none /proc/sys/kernel
        mkdir /proc/sys/kernel/yama; echo 3 >/proc/sys/kernel/yama/ptrace_scope
        mount -t tmpfs none /sys/module; mkdir -p /sys/module/apparmor/parameters
        echo Y >/sys/module/apparmor/parameters/enabled; hide $(command -v apparmor_parser || true)
        echo 'always madvise [never]' >/tmp/never
        mount --bind /tmp/never /sys/kernel/mm/transparent_hugepage/enabled
        mount -t tmpfs none /sys/fs/cgroup; mkdir /sys/fs/cgroup/memory""",
        {
            "kernel.checkpoint-restore": ("fail", "ns_last_pid"),
            "kernel.ptrace": ("fail", "nobody may attach"),
            "kernel.lsm": ("warn", "apparmor_parser is missing"),
            "kernel.thp": ("warn", "never"),
            "kernel.cgroup": ("warn", "cgroup v1"),
            "criu.check": ("fail", "Error"),
        },
    ),
    "calls": (
        'set -- python3 /tmp/filter.py "$@"',
        {
            "kernel.kcmp": ("fail", "EPERM"),
            "kernel.process-vm": ("warn", "EPERM"),
            "kernel.userfaultfd": ("warn", "EPERM"),
            "kernel.seccomp": ("warn", "a filter is on"),
        },
    ),
    "rights": (
        'set -- setpriv --bounding-set=-sys_admin,-sys_ptrace "$@"',
        {
            "kernel.capabilities": ("fail", "CAP_SYS_ADMIN, CAP_SYS_PTRACE"),
            "criu.features": ("fail", "seccomp_suspend"),
        },
    ),
    "tools": (
        """hide /usr/sbin/runc /usr/bin/crun /usr/sbin/ip6tables-restore /usr/local/bin/cryoci-runtime
        echo 6.18.0 >/tmp/release; mount --bind /tmp/release /proc/sys/kernel/osrelease
        printf '#!/bin/sh\\n[ "$1" != --version ] || { echo Version: 4.1.1; exit; }\\nexec /tmp/criu "$@"\\n' >/tmp/old
        chmod +x /tmp/old; touch /tmp/criu; mount --bind /usr/sbin/criu /tmp/criu; mount --bind /tmp/old /usr/sbin/criu
        mkdir -p /usr/lib/criu /usr/lib64/criu /etc/cryoci
        touch /usr/lib/criu/cuda_plugin.so /usr/lib64/criu/cuda_plugin.so
        printf '[criu]\\ntimeot = 1\\n' >/etc/cryoci/config.toml""",
        {
            "runtime.runc": ("fail", "neither runc nor crun"),
            "runtime.crun": ("fail", "neither runc nor crun"),
            "runtime.cryoci": ("fail", "cannot find"),
            "criu.kernel": ("fail", "TCP and UDP sockets"),
            "criu.network-lock": ("fail", "ip6tables-restore"),
            "criu.plugins": ("warn", "several directories"),
            "cryoci.config": ("fail", "timeot"),
        },
    ),
    "old tools": (
        """printf '#!/bin/sh\\necho Version: 3.17.1\\n' >/tmp/old; chmod +x /tmp/old
        mount --bind /tmp/old /usr/sbin/criu
        rm /usr/lib/x86_64-linux-gnu/libcriu.so.2*""",
        {"criu.version": ("fail", "cannot dump a frozen"), "runtime.crun": ("fail", "libcriu.so.2")},
    ),
    "engines": (
        """mkdir -p /etc/crio /etc/criu
        printf '[crio.runtime]\\nenable_criu_support = false\\n' >/etc/crio/crio.conf
        printf '%s\\n' 'version = 3' '[plugins."io.containerd.cri.v1.runtime"]' 'enable_criu = false' \
            '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.x.options]' \
            'BinaryName = "/usr/local/bin/cryoci-runtime"' >/etc/containerd/config.toml
        printf '[engine.runtimes]\\ncryoci-runtime = ["/nowhere"]\\n' >/etc/containers/containers.conf.d/99-x.conf
        echo tcp-established >/etc/criu/default.conf
        mkdir -p /usr/share/containers/oci/hooks.d
        echo '{"hook": {"path": "/usr/bin/nvidia-container-toolkit"}}' >/usr/share/containers/oci/hooks.d/n.json""",
        {
            "crio.checkpoint": ("fail", "enable_criu_support is false"),
            "crio.handler": ("warn", "none"),
            "containerd.checkpoint": ("fail", "enable_criu is false"),
            "containerd.handler": ("fail", "does not read"),
            "podman.runtime": ("fail", "/nowhere does not exist"),
            "criu.conf": ("warn", "which runtimes override"),
            "gpu.legacy-hook": ("fail", "n.json calls it"),
        },
    ),
    "gpu": (
        _MODULES + "echo 560.35.03 >/sys/module/nvidia/version\n"
        + _SMI.format(mig="Enabled", persistence="Disabled")
        + """cp /bin/sleep /tmp/nvidia-cuda-mps-server; /tmp/nvidia-cuda-mps-server 60 &
        mount -t tmpfs none /sys/class; mkdir -p /sys/class/kfd/kfd/topology/nodes/1
        cd /sys/class/kfd/kfd/topology/nodes/1; echo 7 >gpu_id; echo device_id 29877 >properties; cd /
        sleep 0.1; touch /dev/kfd /.dockerenv
        set -- sh -c '"$@"; kill '$!'; rm /dev/kfd /.dockerenv' sh "$@" """,
        {
            "gpu.driver": ("fail", "no NVML"),
            "gpu.libcuda": ("fail", "no libcuda"),
            "gpu.devices": ("fail", "/dev/nvidia-uvm"),
            "gpu.mig": ("fail", "GPU 0"),
            "gpu.persistence": ("warn", "GPU 0"),
            "gpu.mps": ("fail", "nvidia-cuda-mps"),
            "gpu.cdi": ("fail", "none in"),
            "kernel.nested": ("warn", "/.dockerenv"),
            "gpu.amd": ("fail", "amdgpu_plugin.so is not"),
            "gpu.amd-known": ("warn", "MI300X VF"),
        },
    ),
    "a half updated gpu": (
        _MODULES + "echo 615.10.02 >/sys/module/nvidia/version; touch /usr/lib/x86_64-linux-gnu/libcuda.so.610.1\n"
        f"mkdir -p /etc/cdi; printf '{_CDI.format(path='/usr/lib/libcuda.so.610')}' >/etc/cdi/nvidia.yaml",
        {
            "gpu.libcuda": ("fail", "libraries are 610.1"),
            "gpu.custom-storage": ("warn", "615.10.02 should"),
            "gpu.cdi": ("fail", "is stale"),
        },
    ),
}  # fmt: skip

# What a node needs that all of the above is well: a driver, an AMD GPU, engines that know cryoci.
_WELL = (
    _MODULES
    + _SMI.format(mig="Disabled", persistence="Enabled")
    + f"""echo 580.159.04 >/sys/module/nvidia/version
    touch /usr/lib/x86_64-linux-gnu/libcuda.so.580.159.04 /dev/nvidiactl /dev/nvidia-uvm /dev/nvidia0 /dev/kfd
    mkdir -p /etc/cdi /etc/crio /usr/lib/criu; touch /usr/lib/criu/amdgpu_plugin.so
    printf '{_CDI.format(path="/usr/lib/x86_64-linux-gnu/libcuda.so.1")}' >/etc/cdi/nvidia.yaml
    printf '[crio.runtime.runtimes.c]\\nruntime_path = "/usr/local/bin/cryoci-runtime"\\n' >/etc/crio/crio.conf
    cryoci install --engine containerd >/dev/null"""
)
# crun 1.21 is too old for configuration files, and whether pages can be soft-dirty is the kernel's
_NEVER_WELL = {"runtime.crun", "kernel.soft-dirty"}


def ids() -> set[str]:
    return {check.id for check in node.examine(Facts())}


def under(there: NamespaceNode, script: str, *words: str) -> Found:
    """The doctor's report of a node on which a shell has made something, in a mount namespace of its own."""
    own = "mount -t overlay -o lowerdir=/{0},upperdir=/tmp/over/{1}/up,workdir=/tmp/over/{1}/work none /{0}"
    shell = [
        "set -e; mount -t tmpfs none /tmp",
        *(f"mkdir -p /tmp/over/{n}/up /tmp/over/{n}/work; {own.format(d, n)}" for n, d in enumerate(("usr", "etc"))),
        f"cat >/tmp/filter.py <<'END'\n{_FILTER}\nEND",
        _HIDE + script,
        'exec "$@"',
    ]  # fmt: skip
    argv = ["unshare", "-m", "sh", "-c", "\n".join(shell), "sh", "cryoci", "doctor", "--json", *words]
    result = there.run(argv, check=False)
    assert result.stdout.startswith(b"{"), result.stderr.decode()
    return {check["id"]: check for check in json.loads(result.stdout)["checks"]}


@pytest.fixture(scope="module")
def there() -> Iterator[NamespaceNode]:
    with Cluster(tag="faults") as cluster:
        yield cluster.start("a")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_node(there: NamespaceNode, name: str) -> None:
    script, wanted = FAULTS[name]
    found = under(there, script)
    for check, (verdict, words) in wanted.items():
        assert (found[check]["verdict"], words in found[check]["found"]) == (verdict, True), found[check]
        assert found[check]["fix"]


def test_a_node_on_which_all_is_well(there: NamespaceNode) -> None:
    for name in build.NAMES:
        there.write(f"{LIBRARIES}/{name}", (build.library() / name).read_bytes(), mode=0o755)
    there.write(DEVICES, "")
    found = under(there, _WELL)
    there.run(["rm", "-f", *(f"/dev/{name}" for name in ("kfd", "nvidiactl", "nvidia-uvm", "nvidia0"))])
    there.run(["rm", "-f", *(f"{LIBRARIES}/{name}" for name in build.NAMES)])
    assert {
        name: one["found"] for name, one in found.items() if one["verdict"] != "ok"
    }.keys() <= _NEVER_WELL, found
    dirty = there.run(["criu", "check", "--feature", "mem_dirty_track"], check=False)
    assert (found["kernel.soft-dirty"]["verdict"] == "ok") == (dirty.returncode == 0)


def test_each_check_of_a_node_has_a_fault() -> None:
    made = {check for _, wanted in FAULTS.values() for check in wanted}
    assert ids() - made - {"kernel.soft-dirty"} == set()


# What is made in a container, and the check that must fail for it.
CONTAINER = {
    "io-uring": ("container.io-uring", "descriptor"),
    "fds": ("container.fds", "landlock"),
    "ghost": ("container.ghost-files", "3145728 bytes"),
    "tcp": ("container.tcp", "2 connections"),
    "sockets": ("container.sockets", "kind MPTCP"),
    "stdio": ("container.external-files", "descriptor 0: /dev/null"),  # the node's
    "namespace": ("container.namespaces", "user namespace"),
    "traced": ("container.traced", "is traced"),
    "profiler": ("container.gpu", "CUPTI"),
    "managed": ("container.gpu-managed", "1 ranges"),
    "nccl": ("container.gpu-ipc", "speak NCCL"),
    "nccl2": ("container.gpu-ipc", "speak NCCL"),
    "mount": ("container.mounts", "/run/nvidia was mounted"),
    "full": ("container.memory", "are needed"),
}


_MOUNT = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
os.setns(os.open(f"/proc/{sys.argv[1]}/ns/mnt", os.O_RDONLY), 0)
os.makedirs(sys.argv[2])
assert libc.mount(b"none", sys.argv[2].encode(), b"tmpfs", 0, None) == 0
"""


def test_faults_of_a_container(there: NamespaceNode) -> None:
    """Before they are made all is well; test_doctor.py has that of a user namespace."""
    with Mosaic(there, "runc", 7, mib=4) as made:
        before = doctor(there, made.name)
        assert {one["verdict"] for one in before.values()} <= {"ok", "skip"}, before
        there.write(f"{made.base}/rootfs/app/faults.py", FAULTY.read_text())
        for name in CONTAINER:
            if name not in ("mount", "full"):
                there.sh(
                    f"runc exec -d {made.name} python3 /app/faults.py {name} >/srv/said 2>&1 </dev/null"
                )
        wanted = " ".join(
            f"{made.base}/rootfs/data/{name}" for name in CONTAINER if name not in ("mount", "full")
        )
        there.sh(
            f"for i in $(seq 200); do ls {wanted} >/dev/null 2>&1 && exit 0; sleep 0.05; done; ls {wanted}"
        )
        first = int(json.loads(there.run(["runc", "state", made.name]).stdout)["pid"])
        there.run(["python3", "-c", _MOUNT, str(first), "/run/nvidia"])
        with small_disk(there, 64) as full:
            result = there.run(["cryoci", "doctor", "--json", made.name], check=False, env={"TMPDIR": full})
        assert result.returncode == 1
        found = {check["id"]: check for check in json.loads(result.stdout)["checks"]}
        for check, words in CONTAINER.values():
            assert (found[check]["verdict"], words in found[check]["found"]) == ("fail", True), found[check]
            assert found[check]["fix"]
    assert set(found) - {check for check, _ in CONTAINER.values()} == {"container.user-namespace"}


# A node for an image of a GPU's container: its driver, its chips as nvidia-smi names them, and their free MiB.
_NODE = (
    _MODULES
    + """echo {driver} >/sys/module/nvidia/version
    printf '#!/bin/sh\\necho "{chip}, {free}"\\n' >/usr/local/bin/nvidia-smi; chmod +x /usr/local/bin/nvidia-smi
    """
)
IMAGE: tuple[tuple[dict[str, str], str, Wanted], ...] = (
    (
        {"driver": "570.86.15", "chip": "NVIDIA T4", "free": "1000"},
        """hide /usr/sbin/runc
        printf '#!/bin/sh\\necho Version: 4.1.1\\n' >/tmp/old; chmod +x /tmp/old; mount --bind /tmp/old /usr/sbin/criu
        echo 5.10.0 >/tmp/release; mount --bind /tmp/release /proc/sys/kernel/osrelease
        set -- setarch i686 "$@" """,
        {
            "image.architecture": ("fail", "this node i686"),
            "image.kernel": ("warn", "here is 5.10"),
            "image.criu": ("warn", "here is 4.1.1"),
            "image.runtime": ("fail", "made by runc"),
            "image.gpu-driver": ("fail", "here is 570.86.15"),
            "image.gpu-chip": ("fail", "here: NVIDIA T4"),
        },
    ),
    ({"driver": "580.159.04", "free": "0"}, "", {"image.gpu-memory": ("fail", "0 MiB are free")}),
)


def test_faults_of_an_image(there: NamespaceNode) -> None:
    """Of a container with a GPU, on nodes that are not its own; test_doctor.py has processor and base image."""
    devices = build.devices(build.UUIDS[:1])
    gpu.equip(there, devices)
    trainer = Trainer(there, "doctored", devices=devices).start()
    trainer.cryoci("checkpoint", "-o", "doctored:1")
    trainer.remove()
    inspected = json.loads(there.run(["cryoci", "inspect", "doctored:1", "--json"]).stdout)["annotations"]
    own = {"driver": "580.159.04", "chip": json.loads(inspected["io.cryoci.gpu.names"])[0], "free": "1000"}
    well = under(there, _NODE.format(**own), "doctored:1")
    checks = {check for _, _, wanted in IMAGE for check in wanted}
    assert {well[check]["verdict"] for check in checks} == {"ok"}, well
    for given, script, wanted in IMAGE:
        found = under(there, _NODE.format(**{**own, **given}) + script, "doctored:1")
        for check, (verdict, words) in wanted.items():
            assert (found[check]["verdict"], words in found[check]["found"]) == (verdict, True), found[check]
            assert found[check]["fix"]
    assert set(well) - checks == {"image.cpu", "image.base"}
