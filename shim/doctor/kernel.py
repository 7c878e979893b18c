# SPDX-License-Identifier: Apache-2.0
"""The kernel: what CRIU and cryoci need of it, by trying it."""

from __future__ import annotations

import errno
import os

from cryoci.shim.doctor.check import Check, Facts

_SYS_ADMIN, _SYS_PTRACE = 21, 19  # linux/capability.h


def checkpoint_restore(facts: Facts) -> Check:
    """CONFIG_CHECKPOINT_RESTORE, by what it adds to /proc."""
    name, tested = (
        "kernel.checkpoint-restore",
        "/proc/sys/kernel/ns_last_pid and /proc/self/map_files are there",
    )
    missing = [p for p in ("/proc/sys/kernel/ns_last_pid", "/proc/self/map_files") if not facts.exists(p)]
    if missing:
        fix = "boot a kernel with CONFIG_CHECKPOINT_RESTORE=y (all large distributions have it)"
        return Check(name, tested, "fail", f"missing: {', '.join(missing)}", fix)
    return Check(name, tested, "ok", "CONFIG_CHECKPOINT_RESTORE")


def kcmp(facts: Facts) -> Check:
    """Shared files and memory between processes are found by kcmp(2)."""
    return _call(facts, "kcmp", "kernel.kcmp", "kcmp(2) compares two processes", "fail",
                 "boot a kernel with CONFIG_KCMP=y; in a container allow kcmp in its seccomp profile")  # fmt: skip


def process_vm(facts: Facts) -> Check:
    """Memory is captured and filled with process_vm_readv(2)."""
    return _call(facts, "process_vm_readv", "kernel.process-vm", "process_vm_readv(2) reads memory", "warn",
                 "boot a kernel with CONFIG_CROSS_MEMORY_ATTACH=y; else memory moves at CRIU's speed")  # fmt: skip


def userfaultfd(facts: Facts) -> Check:
    """Lazy restore only."""
    return _call(facts, "userfaultfd", "kernel.userfaultfd", "userfaultfd(2) opens", "warn",
                 "boot a kernel with CONFIG_USERFAULTFD=y, or sysctl vm.unprivileged_userfaultfd=1; "
                 "without it there is no lazy restore")  # fmt: skip


def soft_dirty(facts: Facts) -> Check:
    """Pre-dump only."""
    return _call(facts, "soft-dirty", "kernel.soft-dirty", "a written page is marked soft-dirty in pagemap", "warn",
                 "boot a kernel with CONFIG_MEM_SOFT_DIRTY=y; without it there are no iterative dumps")  # fmt: skip


def _call(facts: Facts, call: str, name: str, tested: str, worst: str, fix: str) -> Check:
    code = facts.call(call)
    if code == 0:
        return Check(name, tested, "ok", "works")
    said = f"{errno.errorcode.get(code, str(code))}: {os.strerror(code)}"
    return Check(name, tested, "fail" if worst == "fail" else "warn", said, fix)


def capabilities(facts: Facts) -> Check:
    """CRIU as the engines run it: root with all capabilities."""
    name, tested = "kernel.capabilities", "CAP_SYS_ADMIN and CAP_SYS_PTRACE are effective"
    value = _status(facts, "CapEff")
    if value is None:
        return Check(name, tested, "skip", "/proc/self/status does not say")
    have = int(value, 16)
    missing = [
        n
        for n, bit in (("CAP_SYS_ADMIN", _SYS_ADMIN), ("CAP_SYS_PTRACE", _SYS_PTRACE))
        if not have >> bit & 1
    ]
    if missing:
        fix = "run as root in the initial user namespace (in Kubernetes: privileged)"
        return Check(name, tested, "fail", f"missing: {', '.join(missing)}", fix)
    return Check(name, tested, "ok", "both")


def seccomp(facts: Facts) -> Check:
    """A filter on us is one on CRIU."""
    name, tested = "kernel.seccomp", "no seccomp filter is on this process"
    value = _status(facts, "Seccomp")
    if value in (None, "0"):
        return Check(name, tested, "ok", "no filter")
    fix = "run the engine, and this, outside of a filtered container (seccompProfile: Unconfined)"
    return Check(name, tested, "warn", "a filter is on: calls that CRIU needs may be refused", fix)


def ptrace(facts: Facts) -> Check:
    """Yama's ptrace_scope; root may attach up to 2."""
    name, tested = "kernel.ptrace", "kernel.yama.ptrace_scope lets root attach"
    value = (facts.read("/proc/sys/kernel/yama/ptrace_scope") or "0").strip()
    if value == "3":
        fix = "set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d and reboot: 3 cannot be undone at run time"
        return Check(name, tested, "fail", "ptrace_scope is 3: nobody may attach, so CRIU cannot dump", fix)
    return Check(name, tested, "ok", f"ptrace_scope is {value}")


def cgroup(facts: Facts) -> Check:
    """v2 is where freezing works as a whole."""
    name, tested = "kernel.cgroup", "/sys/fs/cgroup is cgroup v2"
    if facts.exists("/sys/fs/cgroup/cgroup.controllers"):
        return Check(name, tested, "ok", "cgroup v2")
    if facts.names("/sys/fs/cgroup"):
        hybrid = facts.exists("/sys/fs/cgroup/unified/cgroup.controllers")
        fix = 'boot with systemd.unified_cgroup_hierarchy=1; on v1 keep criu.manage-cgroups = "ignore"'
        return Check(name, tested, "warn", "hybrid v1 and v2" if hybrid else "cgroup v1", fix)
    return Check(name, tested, "fail", "no cgroup file system is mounted", "mount cgroup2 at /sys/fs/cgroup")


def huge_pages(facts: Facts) -> Check:
    """Staged GPU memory moves faster in huge pages (38 to 4 s in NVIDIA/nvcf's measurements)."""
    name, tested = "kernel.thp", "transparent huge pages are not off"
    value = facts.read("/sys/kernel/mm/transparent_hugepage/enabled")
    if value is None:
        return Check(name, tested, "skip", "this kernel has no transparent huge pages")
    chosen = value.partition("[")[2].partition("]")[0]
    if chosen == "never":
        fix = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: GPU memory is staged faster"
        return Check(name, tested, "warn", "never", fix)
    return Check(name, tested, "ok", chosen)


def lsm(facts: Facts) -> Check:
    """SELinux and AppArmor: labels and profiles must be the same at restore."""
    name, tested = "kernel.lsm", "security modules let CRIU work"
    if (facts.read("/sys/fs/selinux/enforce") or "").strip() == "1":
        label = "container_runtime_exec_t"
        fix = (f"label the runtime: semanage fcontext -a -t {label} '/usr/local/bin/cryoci-runtime' && restorecon; "
               "see crio-config/SELINUX-APPARMOR.md")  # fmt: skip
        return Check(
            name, tested, "warn", "SELinux enforces: transport sockets and labels may be refused", fix
        )
    if (facts.read("/sys/module/apparmor/parameters/enabled") or "").strip() == "Y":
        if facts.program("apparmor_parser") is None:
            fix = "apt-get install apparmor: engines cannot load the profile that a restored container asks for"
            return Check(name, tested, "warn", "AppArmor is on, and apparmor_parser is missing", fix)
        return Check(name, tested, "ok", "AppArmor, with its tools")
    return Check(name, tested, "ok", "neither SELinux enforces nor AppArmor is on")


def nested(facts: Facts) -> Check:
    """Mounts of the outer container are in no specification of the inner one (criu#2601)."""
    name, tested = "kernel.nested", "this is a node, and no container itself"
    marks = [p for p in ("/.dockerenv", "/run/.containerenv", "/run/systemd/container") if facts.exists(p)]
    if any(word.startswith("container=") for word in (facts.read("/proc/1/environ") or "").split("\0")):
        marks.append("$container of process 1")
    if marks:
        fix = "run the engine on the node itself, or try a restore of each program before you rely on it"
        why = f"it is one ({marks[0]}): a container inside of it may be dumped and then not restore"
        return Check(name, tested, "warn", why, fix)
    return Check(name, tested, "ok", "no sign of one")


def _status(facts: Facts, key: str) -> str | None:
    for line in (facts.read("/proc/self/status") or "").splitlines():
        if line.startswith(key + ":"):
            return line.split()[1]
    return None


CHECKS = (
    checkpoint_restore, kcmp, process_vm, userfaultfd, soft_dirty, capabilities, seccomp, ptrace, cgroup, huge_pages,
    lsm, nested,
)  # fmt: skip
