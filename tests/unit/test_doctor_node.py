# SPDX-License-Identifier: Apache-2.0
"""Every check of a node: one node on which it fails for its real reason, and one on which it passes."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cryoci.shim.doctor import container, container_gpu, engines, gpus, image, kernel, node, tools
from cryoci.shim.doctor.check import Check, Facts, Verdict
from tests.unit.doctor_node import Given, build

CRIU42 = 'case "$1" in --version) echo "Version: 4.2.1";; check) echo "Looks good.";; esac'
CRIU41 = 'case "$1" in --version) echo "Version: 4.1.1";; esac'
OS_NEW, OS_OLD = {"/proc/sys/kernel/osrelease": "6.18.3\n"}, {"/proc/sys/kernel/osrelease": "6.12.0-amd64\n"}
NVIDIA = {"/sys/module/nvidia/version": "580.159.04\n"}
CRUN = "echo 'crun version 1.26'; echo '+SYSTEMD +CRIU +YAJL'"
SMI = 'case "$1" in *mig*) echo {mig};; *persist*) echo {pm};; esac'
LIBCRIU = {"/usr/lib/x86_64-linux-gnu/libcriu.so.2": ""}
CDI = "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ncontainerEdits:\n  mounts:\n  - hostPath: /usr/lib/libcuda.so.580\n"
CRIO = '[crio.runtime.runtimes.cryoci]\nruntime_path = "/usr/local/bin/cryoci-runtime"\n'
V2 = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.cryoci.options]\nBinaryName = "/bin/cryoci-runtime"\n'
V3 = V2.replace("grpc.v1.cri", "cri.v1.runtime")
PODMAN = '[engine]\nruntime_supports_json = ["cryoci-runtime"]\n[engine.runtimes]\ncryoci-runtime = ["/usr/bin/c"]\n'
HOOK = '{"version": "1.0.0", "hook": {"path": "/usr/bin/nvidia-container-toolkit"}}'
KFD = "/sys/class/kfd/kfd/topology/nodes"
IPT = {"iptables-restore": "exit 0", "ip6tables-restore": "exit 0"}
CASES: list[tuple[Callable[[Facts], Check], Given, Verdict, str]] = [
    (kernel.checkpoint_restore, Given(), "fail", "ns_last_pid"),
    (kernel.checkpoint_restore, Given({"/proc/sys/kernel/ns_last_pid": "1", "/proc/self/map_files": None}), "ok", ""),
    (kernel.kcmp, Given(calls={"kcmp": errno.ENOSYS}), "fail", "ENOSYS"),
    (kernel.kcmp, Given(calls={"kcmp": 0}), "ok", ""),
    (kernel.process_vm, Given(calls={"process_vm_readv": errno.ENOSYS}), "warn", "ENOSYS"),
    (kernel.process_vm, Given(), "ok", "works"),
    (kernel.userfaultfd, Given(calls={"userfaultfd": errno.EPERM}), "warn", "EPERM"),
    (kernel.userfaultfd, Given(calls={"userfaultfd": 0}), "ok", ""),
    (kernel.soft_dirty, Given(calls={"soft-dirty": errno.EOPNOTSUPP}), "warn", "not supported"),
    (kernel.soft_dirty, Given(calls={"soft-dirty": 0}), "ok", ""),
    (kernel.capabilities, Given({"/proc/self/status": "CapEff:\t00000000a80425fb\n"}), "fail", "CAP_SYS_ADMIN"),
    (kernel.capabilities, Given({"/proc/self/status": "CapEff:\t000001ffffffffff\n"}), "ok", ""),
    (kernel.seccomp, Given({"/proc/self/status": "Seccomp:\t2\n"}), "warn", "filter is on"),
    (kernel.seccomp, Given({"/proc/self/status": "Seccomp:\t0\n"}), "ok", ""),
    (kernel.ptrace, Given({"/proc/sys/kernel/yama/ptrace_scope": "3\n"}), "fail", "nobody may attach"),
    (kernel.ptrace, Given({"/proc/sys/kernel/yama/ptrace_scope": "1\n"}), "ok", ""),
    (kernel.cgroup, Given(), "fail", "no cgroup"),
    (kernel.cgroup, Given({"/sys/fs/cgroup/memory": None}), "warn", "cgroup v1"),
    (kernel.cgroup, Given({"/sys/fs/cgroup/unified/cgroup.controllers": ""}), "warn", "hybrid"),
    (kernel.cgroup, Given({"/sys/fs/cgroup/cgroup.controllers": "cpu"}), "ok", "v2"),
    (kernel.huge_pages, Given({"/sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]"}), "warn", ""),
    (kernel.huge_pages, Given({"/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never"}), "ok", ""),
    (kernel.lsm, Given({"/sys/fs/selinux/enforce": "1"}), "warn", "SELinux enforces"),
    (kernel.lsm, Given({"/sys/module/apparmor/parameters/enabled": "Y\n"}), "warn", "apparmor_parser is missing"),
    (kernel.lsm, Given({"/sys/module/apparmor/parameters/enabled": "Y\n"}, {"apparmor_parser": ""}), "ok", ""),
    (kernel.nested, Given({"/run/.containerenv": ""}), "warn", "/run/.containerenv"),
    (kernel.nested, Given({"/proc/1/environ": "HOME=/\0container=lxc\0"}), "warn", "process 1"),
    (kernel.nested, Given({"/proc/1/environ": "HOME=/\0"}), "ok", ""),
    (tools.criu, Given(), "fail", "no criu on PATH"),
    (tools.criu, Given(programs={"criu": "echo Version: 3.17.1"}), "fail", "cannot dump a frozen"),
    (tools.criu, Given(programs={"criu": "echo libnet.so.1: not found; exit 127"}), "fail", "libnet.so.1"),
    (tools.criu, Given(programs={"criu": CRIU42}), "ok", "4.2.1"),
    (tools.criu_kernel, Given(OS_NEW, {"criu": CRIU41}), "fail", "TCP and UDP sockets"),
    (tools.criu_kernel, Given(OS_OLD, {"criu": CRIU41}), "ok", "Linux 6.12"),
    (tools.criu_kernel, Given(OS_NEW, {"criu": CRIU42}), "ok", "Linux 6.18"),
    (tools.criu_check, Given(programs={"criu": "echo 'Error (criu/x.c:1): no kcmp'; exit 1"}), "fail", "no kcmp"),
    (tools.criu_check, Given(programs={"criu": CRIU42}), "ok", "Looks good."),
    (tools.criu_features, Given(programs={"criu": 'test "$3" != seccomp_suspend'}), "fail", "seccomp_suspend"),
    (tools.criu_features, Given(programs={"criu": 'test "$3" != clone3_set_tid'}), "warn", "clone3_set_tid"),
    (tools.criu_features, Given(programs={"criu": CRIU42}), "ok", ""),
    (tools.plugins, Given({"/usr/lib/criu/a.so": "", "/usr/lib64/criu/a.so": ""}), "warn", "several directories"),
    (tools.plugins, Given({"/usr/lib/criu/cuda_plugin.so": ""}), "warn", "turns itself off"),
    (tools.plugins, Given({"/usr/lib/criu/cuda_plugin.so": ""}, {"cuda-checkpoint": ""}), "ok", "cuda_plugin.so"),
    (tools.network_lock, Given(), "fail", "iptables-restore, ip6tables-restore"),
    (tools.network_lock, Given(programs={**IPT, "iptables-restore": "echo denied; exit 1"}), "fail", "denied"),
    (tools.network_lock, Given({tools.CONFIG: '[criu]\nnetwork-lock = "skip"\n'}), "ok", "skip"),
    (tools.network_lock, Given({tools.CONFIG: '[criu]\nnetwork-lock = "nftables"\n'}, {"criu": "exit 1"}), "fail", ""),
    (tools.network_lock, Given(programs=IPT), "ok", "iptables"),
    (tools.runc, Given(), "fail", "neither runc nor crun"),
    (tools.runc, Given(programs={"runc": 'test "$1" = --version'}), "fail", "no checkpoint verb"),
    (tools.runc, Given(programs={"runc": "echo runc version 1.1.15"}), "ok", "1.1.15"),
    (tools.runc, Given(programs={"crun": ""}), "skip", "crun is there"),
    (tools.crun, Given(programs={"crun": "echo crun version 1.21; echo +SYSTEMD"}), "fail", "without CRIU"),
    (tools.crun, Given(programs={"crun": CRUN}), "fail", "libcriu.so.2"),
    (tools.crun, Given(LIBCRIU, {"crun": CRUN, "criu": CRIU41}), "warn", "no configuration file"),
    (tools.crun, Given(LIBCRIU, {"crun": CRUN, "criu": CRIU42}), "ok", "1.26"),
    (tools.cryoci_runtime, Given(), "fail", "cannot find"),
    (tools.cryoci_runtime, Given(programs={"cryoci-runtime": "echo no runc; exit 1"}), "fail", "no runc"),
    (tools.cryoci_runtime, Given(programs={"cryoci-runtime": ""}), "ok", ""),
    (tools.configuration, Given({tools.CONFIG: "[criu]\ntimeot = 3\n"}), "fail", "timeot"),
    (tools.configuration, Given({tools.CONFIG: "[criu]\ntimeout = 3\n"}), "ok", "valid"),
    (gpus.driver, Given({"/sys/module/nvidia/version": "550.54.15"}), "fail", "only --toggle"),
    (gpus.driver, Given({"/sys/module/nvidia/version": "560.35.03"}), "fail", "no NVML"),
    (gpus.driver, Given({"/sys/module/nvidia/version": "570.86.15"}), "warn", "restore bugs"),
    (gpus.driver, Given(NVIDIA, machine="aarch64"), "fail", "aarch64"),
    (gpus.driver, Given({"/proc/driver/nvidia/version": "NVRM version: x86_64  615.10.02  Release"}), "ok", "custom"),
    (gpus.libcuda, Given(NVIDIA), "fail", "no libcuda"),
    (gpus.libcuda, Given({**NVIDIA, "/usr/lib64/libcuda.so.570.1": ""}), "fail", "libraries are 570.1"),
    (gpus.libcuda, Given({**NVIDIA, "/usr/lib64/libcuda.so.580.159.04": ""}), "ok", ""),
    (gpus.custom_storage, Given(NVIDIA, calls={"cuda-custom-storage": 38}), "ok", "does not"),
    (gpus.custom_storage, Given({"/sys/module/nvidia/version": "615.10.02"}, calls={"cuda-custom-storage": 38}),
        "warn", "615.10.02 should"),
    (gpus.custom_storage, Given(NVIDIA, calls={"cuda-custom-storage": 0}), "ok", "it does; cryoci goes through"),
    (gpus.devices, Given({**NVIDIA, "/dev/nvidiactl": ""}), "fail", "/dev/nvidia-uvm, /dev/nvidia0"),
    (gpus.devices, Given({**NVIDIA, "/run/nvidia/driver/dev/nvidiactl": ""}), "fail", "/dev/nvidiactl"),
    (gpus.devices, Given({**NVIDIA, "/dev/nvidiactl": "", "/dev/nvidia-uvm": "", "/dev/nvidia3": ""}), "ok", ""),
    (gpus.mig, Given(NVIDIA, {"nvidia-smi": SMI.format(mig="Enabled", pm="Enabled")}), "fail", "GPU 0"),
    (gpus.mig, Given(NVIDIA, {"nvidia-smi": SMI.format(mig="Disabled", pm="Enabled")}), "ok", ""),
    (gpus.persistence, Given(NVIDIA, {"nvidia-smi": SMI.format(mig="", pm="Disabled")}), "warn", "GPU 0"),
    (gpus.persistence, Given(NVIDIA, {"nvidia-smi": SMI.format(mig="", pm="Enabled")}), "ok", ""),
    (gpus.mps, Given({**NVIDIA, "/proc/77/comm": "nvidia-cuda-mps-server\n"}), "fail", "process 77"),
    (gpus.mps, Given({**NVIDIA, "/proc/77/comm": "bash\n"}), "ok", ""),
    (gpus.cdi, Given(NVIDIA), "fail", "none in"),
    (gpus.cdi, Given({**NVIDIA, "/etc/cdi/nvidia.yaml": CDI}), "fail", "libcuda.so.580 does not exist"),
    (gpus.cdi, Given({**NVIDIA, "/etc/cdi/n.yaml": CDI, "/usr/lib/libcuda.so.580": ""}), "ok", "n.yaml"),
    (gpus.legacy_hook, Given({"/usr/share/containers/oci/hooks.d/oci-nvidia-hook.json": HOOK}), "fail", "calls it"),
    (gpus.legacy_hook, Given({"/usr/share/containers/oci/hooks.d/other.json": "{}"}), "ok", ""),
    (gpus.amd, Given({"/dev/kfd": ""}), "fail", "amdgpu_plugin.so is not"),
    (gpus.amd, Given({"/dev/kfd": "", "/usr/lib/criu/amdgpu_plugin.so": ""}), "ok", ""),
    (gpus.amd_known, Given(), "skip", "no /dev/kfd"),
    (gpus.amd_known, Given({"/dev/kfd": "", "/usr/lib/criu/amdgpu_plugin.so": "\0Parallel restore disabled\n\0"}),
        "warn", "criu#2812"),
    (gpus.amd_known, Given({"/dev/kfd": "", **{f"{KFD}/{n}/gpu_id": f"{n}00" for n in (1, 2)},
        f"{KFD}/1/properties": "device_id 29704\n", f"{KFD}/2/properties": "device_id 29877\n"}), "warn", "MI300X VF"),
    (gpus.amd_known, Given({"/dev/kfd": "", f"{KFD}/1/gpu_id": "7", f"{KFD}/1/properties": "device_id 29704\n"}),
        "ok", "none of 1"),
    (engines.crio_criu, Given({"/etc/crio/crio.conf": "[crio.runtime]\nenable_criu_support = false\n"}), "fail", ""),
    (engines.crio_criu, Given({"/etc/crio/crio.conf.d/1.conf":
        '[crio.checkpoint_restore]\ncontainer_level_enabled = "checkpoint_only"\n'}), "fail", "checkpoint_only"),
    (engines.crio_criu, Given({"/etc/crio/crio.conf": "[crio.runtime]\nenable_criu_support = false\n",
        "/etc/crio/crio.conf.d/9.conf": "[crio.runtime]\nenable_criu_support = true\n"}), "ok", ""),
    (engines.crio_criu, Given({"/etc/crio/crio.conf": "[crio\n"}), "fail", "not valid TOML"),
    (engines.crio_handler, Given({"/etc/crio/crio.conf": ""}), "warn", "none"),
    (engines.crio_handler, Given({"/etc/crio/crio.conf.d/9.conf": CRIO}), "ok", "cryoci"),
    (engines.containerd_criu, Given({"/etc/containerd/config.toml":
        'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\nenable_criu = false\n'}), "fail", "enable_criu"),
    (engines.containerd_criu, Given({"/etc/containerd/config.toml": "version = 3\n"}), "ok", ""),
    (engines.containerd_handler, Given({"/etc/containerd/config.toml": "version = 3\n" + V2}), "fail", "not read"),
    (engines.containerd_handler, Given({"/etc/containerd/config.toml": "version = 2\n"}), "warn", "none"),
    (engines.containerd_handler, Given({"/etc/containerd/config.toml": "version = 2\n" + V2}), "ok", "grpc.v1.cri"),
    (engines.containerd_handler, Given({"/etc/containerd/config.toml":
        'version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n',
        "/etc/containerd/conf.d/9.toml": "version = 3\n" + V3}), "ok", "cri.v1.runtime"),
    (engines.podman_runtime, Given({"/etc/containers/containers.conf": ""}), "warn", "no"),
    (engines.podman_runtime, Given({"/etc/containers/containers.conf": PODMAN}), "fail", "does not exist"),
    (engines.podman_runtime, Given({"/etc/containers/containers.conf": PODMAN, "/usr/bin/c": "",
        "/etc/containers/containers.conf.d/z.conf": "[engine]\nruntime_supports_json = []\n"}), "warn", "without"),
    (engines.podman_runtime, Given({"/etc/containers/containers.conf.d/a.conf": PODMAN, "/usr/bin/c": ""},
                                   {"podman": ""}), "ok", "/usr/bin/c"),
    (engines.criu_files, Given({"/etc/criu/default.conf": "tcp-established # here\n"}), "warn", "default.conf"),
    (engines.criu_files, Given({"/etc/criu/crun.conf": "tcp-established\n"}, {"runc": ""}), "warn", "crun.conf"),
    (engines.criu_files, Given({"/etc/criu/runc.conf": "tcp-established\n"}), "ok", "runc.conf"),
]  # fmt: skip


def _name(case: tuple[Callable[[Facts], Check], Given, Verdict, str]) -> str:
    return f"{case[0].__name__}-{case[2]}-{case[3]}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_check(tmp_path: Path, case: tuple[Callable[[Facts], Check], Given, Verdict, str]) -> None:
    check, given, verdict, words = case
    found = check(build(tmp_path, given))
    assert (found.verdict, words in found.found) == (verdict, True), found
    assert found.tested and (found.fix or verdict in ("ok", "skip")), found


def test_every_check_fails_somewhere_and_passes_somewhere() -> None:
    bad = {case[0] for case in CASES if case[2] in ("fail", "warn")}
    good = {case[0] for case in CASES if case[2] == "ok"}
    assert [c.__name__ for c in node.CHECKS if c not in bad & good] == []


def test_the_page_has_every_check() -> None:
    page = (Path(__file__).parents[2] / "docs/doctor.md").read_text()
    facts = Facts()
    ids = {check.id for check in node.examine(facts)}
    ids |= {check.id for check in container_gpu.examine(container.Subject(facts, (os.getpid(),), {}))}
    ids |= {check.id for check in image.examine(facts, {})}
    assert ids == set(
        re.findall(r"^\| `((?:\w|-)+\.[\w.-]+)` \|", page.partition("## The catalogue")[0], re.M)
    )


def test_an_empty_node_is_examined_to_the_end(tmp_path: Path) -> None:
    found = node.examine(build(tmp_path, Given()))
    assert len({c.id for c in found}) == len(node.CHECKS)
    report = json.loads(json.dumps(node.report("node", found)))
    assert report["schema"] == "io.cryoci.doctor/1" and report["ok"] is False
    assert set(report["checks"][0]) == {"id", "tested", "verdict", "found", "fix"}


def test_a_check_that_breaks_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(facts: Facts) -> Check:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(node, "CHECKS", (broken, kernel.process_vm))
    first, second = node.examine(build(tmp_path, Given()))
    assert first.verdict == "fail" and "ZeroDivisionError" in first.found
    assert second.verdict == "ok"


def test_the_system_calls_of_this_kernel() -> None:
    """Whatever this kernel has, they give an answer and do no harm."""
    facts = Facts()
    assert facts.call("process_vm_readv") == 0
    assert all(isinstance(facts.call(name), int) for name in facts.calls)
    assert facts.kernel > (4, 0)
