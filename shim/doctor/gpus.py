# SPDX-License-Identifier: Apache-2.0
"""GPUs: what the driver can do, and how containers get them.

Sources of the matrix: NVIDIA/cuda-checkpoint's README and issues, CRIU's plugins/cuda/README.md.
"""

from __future__ import annotations

import re

from cryoci.errors import NotFoundError
from cryoci.shim.doctor.check import Check, Facts
from cryoci.shim.doctor.tools import LIBRARIES
from cryoci.shim.gpu import kfd

# first branch that has it -> what it is
MATRIX = (
    (570, "driver API, NVML open, process trees"),
    (575, "restore fixes"),
    (580, "other GPUs of the same chip"),
    (590, "forked workers by --launch-job"),
    (595, "aarch64"),
    (610, "CUDA IPC inside of a job"),
    (615, "custom storage"),
)
MINIMUM, FIXED, AARCH64, CUSTOM = 570, 575, 595, 615
CDI = ("/etc/cdi", "/var/run/cdi", "/run/cdi")
HOOKS = ("/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d")
_PARALLEL = (
    "Parallel restore disabled"  # what the plugin of CRIU's development branch can say (amdgpu_plugin.c)
)
_HUNG = {0x74A1: "MI300X", 0x74B5: "MI300X VF"}  # device_id of the kernel's topology
_NONE = "no NVIDIA driver is loaded"


def driver_version(facts: Facts) -> str | None:
    """ "580.159.04" of the loaded NVIDIA kernel module, or None."""
    said = (facts.read("/sys/module/nvidia/version") or "").strip()
    match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", said or facts.read("/proc/driver/nvidia/version") or "")
    return match[1] if match else None


def driver(facts: Facts) -> Check:
    name, tested = "gpu.driver", "the NVIDIA driver can checkpoint"
    version = driver_version(facts)
    if version is None:
        return Check(name, tested, "skip", _NONE)
    branch = int(version.split(".")[0])
    if branch < MINIMUM:
        why = (
            "only --toggle of single processes" if branch < 555 else "no NVML, no driver API: PyTorch fails"
        )
        return Check(name, tested, "fail", f"{version}: {why}", "install driver 580 or newer")
    if facts.machine == "aarch64" and branch < AARCH64:
        return Check(
            name, tested, "fail", f"{version} cannot checkpoint on aarch64", "install driver 595 or newer"
        )
    can = ", ".join(text for first, text in MATRIX if branch >= first)
    if branch < FIXED:
        return Check(
            name, tested, "warn", f"{version} can: {can}; it has restore bugs", "install 575.57.08 or newer"
        )
    return Check(name, tested, "ok", f"{version} can: {can}")


def libcuda(facts: Facts) -> Check:
    """A helper that finds no libcuda leaves GPU memory out without a word (nvsnap)."""
    name, tested = "gpu.libcuda", "libcuda.so.1 is there and of the loaded driver"
    version = driver_version(facts)
    if version is None:
        return Check(name, tested, "skip", _NONE)
    bases = ("/usr/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib")
    found = [f"{b}/{n}" for b in bases for n in facts.names(b) if re.match(r"libcuda\.so\.\d", n)]
    if not found:
        return Check(
            name,
            tested,
            "fail",
            "no libcuda.so.* in the library directories",
            "install the driver's libraries",
        )
    versions = {n.rpartition("libcuda.so.")[2] for n in found} - {"1"}
    if versions and version not in versions:
        fix = "reboot or reload the kernel modules: the driver was upgraded under them"
        return Check(
            name,
            tested,
            "fail",
            f"libraries are {', '.join(sorted(versions))}, the module is {version}",
            fix,
        )
    return Check(name, tested, "ok", found[0])


def custom_storage(facts: Facts) -> Check:
    """Whether a checkpoint could bypass host memory on this driver. Why cryoci does not: docs/gpu.md."""
    name, tested = (
        "gpu.custom-storage",
        "whether the driver lets its caller move GPU memory (custom storage, r615)",
    )
    version = driver_version(facts)
    if version is None:
        return Check(name, tested, "skip", _NONE)
    if facts.call("cuda-custom-storage") == 0:
        return Check(name, tested, "ok", "it does; cryoci goes through host memory all the same")
    if int(version.split(".")[0]) >= CUSTOM:
        why = f"{version} should, and the libcuda.so.1 found here does not"
        return Check(
            name, tested, "warn", why, "reinstall the driver's libraries: they are of another version"
        )
    return Check(name, tested, "ok", "it does not: GPU memory goes through host memory")


def devices(facts: Facts) -> Check:
    name, tested = "gpu.devices", "/dev/nvidiactl, /dev/nvidia-uvm and /dev/nvidia0 are there"
    if driver_version(facts) is None:
        return Check(name, tested, "skip", _NONE)
    missing = [n for n in ("/dev/nvidiactl", "/dev/nvidia-uvm") if not facts.exists(n)]
    if not any(re.fullmatch(r"nvidia\d+", n) for n in facts.names("/dev")):
        missing.append("/dev/nvidia0")
    if missing:
        driver_root = facts.exists("/run/nvidia/driver/dev/nvidiactl")
        fix = "nvidia-modprobe -c 0 -u" + (
            "; the GPU operator keeps them in /run/nvidia/driver/dev" if driver_root else ""
        )
        return Check(name, tested, "fail", f"missing: {', '.join(missing)}", fix)
    return Check(name, tested, "ok", "all there")


def _query(facts: Facts, field: str) -> list[str] | None:
    if driver_version(facts) is None:
        return None
    said = facts.run("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader")
    return (
        [line.strip() for line in said.text.splitlines() if line.strip()]
        if said and said.status == 0
        else None
    )


def mig(facts: Facts) -> Check:
    name, tested = "gpu.mig", "no GPU is in MIG mode"
    modes = _query(facts, "mig.mode.current")
    if modes is None:
        return Check(name, tested, "skip", "no NVIDIA driver, or no nvidia-smi")
    on = [str(i) for i, mode in enumerate(modes) if mode == "Enabled"]
    if on:
        fix = "nvidia-smi -i N -mig 0: the driver does not checkpoint MIG slices (NVIDIA/cuda-checkpoint#42)"
        return Check(name, tested, "fail", f"GPU {', '.join(on)} is in MIG mode", fix)
    return Check(name, tested, "ok", f"{len(modes)} GPUs, none in MIG mode")


def persistence(facts: Facts) -> Check:
    """Without it the driver unloads its state, and a restore needs a cuInit first (seconds on 8 GPUs)."""
    name, tested = "gpu.persistence", "persistence mode is on"
    modes = _query(facts, "persistence_mode")
    if modes is None:
        return Check(name, tested, "skip", "no NVIDIA driver, or no nvidia-smi")
    off = [str(i) for i, mode in enumerate(modes) if mode != "Enabled"]
    if off:
        fix = "systemctl enable --now nvidia-persistenced (or nvidia-smi -pm 1)"
        return Check(name, tested, "warn", f"off on GPU {', '.join(off)}", fix)
    return Check(name, tested, "ok", "on")


def mps(facts: Facts) -> Check:
    name, tested = "gpu.mps", "no MPS server runs"
    if driver_version(facts) is None:
        return Check(name, tested, "skip", _NONE)
    for pid in facts.names("/proc"):
        if pid.isdigit() and (facts.read(f"/proc/{pid}/comm") or "").startswith("nvidia-cuda-mps"):
            fix = "echo quit | nvidia-cuda-mps-control: the driver does not checkpoint clients of MPS"
            return Check(
                name,
                tested,
                "fail",
                f"process {pid} is {(facts.read(f'/proc/{pid}/comm') or '').strip()}",
                fix,
            )
    return Check(name, tested, "ok", "none")


def cdi(facts: Facts) -> Check:
    """Containers must get GPUs by CDI, so that every mount and device stands in their specification."""
    name, tested = "gpu.cdi", "there is a CDI specification of the NVIDIA GPUs, and what it names exists"
    if driver_version(facts) is None:
        return Check(name, tested, "skip", _NONE)
    specs = [f"{d}/{n}" for d in CDI for n in facts.names(d) if n.endswith((".yaml", ".yml", ".json"))]
    texts = {path: facts.read(path) or "" for path in specs}
    texts = {path: text for path, text in texts.items() if re.search(r"nvidia\.com/", text)}
    make = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    if not texts:
        return Check(name, tested, "fail", f"none in {', '.join(CDI)}", make)
    for path, text in texts.items():
        named = re.findall(r"[\"']?hostPath[\"']?:\s*[\"']?(/[^\"'\s,]+)", text)
        gone = [p for p in named if not facts.exists(p)]
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            why = f"{path} is stale: {gone[0]}{more} does not exist (another driver version)"
            return Check(name, tested, "fail", why, make)
    return Check(name, tested, "ok", ", ".join(texts))


def legacy_hook(facts: Facts) -> Check:
    """It mounts behind the runtime's back, and runs again on restore (cri-o#7632, runc#4522)."""
    name, tested = "gpu.legacy-hook", "the legacy NVIDIA hook is not in hooks.d"
    for directory in HOOKS:
        for entry in facts.names(directory):
            text = facts.read(f"{directory}/{entry}") or ""
            if entry.endswith(".json") and re.search(r"nvidia-container-(?:toolkit|runtime-hook)", text):
                fix = f"remove {directory}/{entry}, and give containers GPUs by CDI (--device nvidia.com/gpu=all)"
                return Check(name, tested, "fail", f"{directory}/{entry} calls it", fix)
    return Check(name, tested, "ok", "not there")


def amd(facts: Facts) -> Check:
    name, tested = "gpu.amd", "AMD GPUs have CRIU's amdgpu plugin"
    if not facts.exists("/dev/kfd"):
        return Check(name, tested, "skip", "no /dev/kfd")
    found = [d for d in LIBRARIES if facts.exists(f"{d}/amdgpu_plugin.so")]
    if not found:
        fix = "install CRIU's amdgpu plugin (Debian: criu is built without; build with libdrm) in /usr/lib/criu"
        return Check(name, tested, "fail", "/dev/kfd is there, amdgpu_plugin.so is not", fix)
    return Check(name, tested, "ok", f"{found[0]}/amdgpu_plugin.so")


def amd_known(facts: Facts) -> Check:
    """What people report of restores that end in success, so that no log tells of it."""
    name, tested = "gpu.amd-known", "no fault is known of restores on these AMD GPUs, by this plugin"
    if not facts.exists("/dev/kfd"):
        return Check(name, tested, "skip", "no /dev/kfd")
    for directory in LIBRARIES:
        if _PARALLEL in (facts.read(f"{directory}/amdgpu_plugin.so", 64 << 20) or ""):
            fix = "use the plugin of a release (CRIU 4.2 and 4.1 restore one buffer after the other)"
            why = f"{directory}/amdgpu_plugin.so restores in parallel: PyTorch ends after it (criu#2812)"
            return Check(name, tested, "warn", why, fix)
    try:
        gpus = kfd.capture(str(facts.at(kfd.SYSFS)))["gpus"]
    except NotFoundError:
        gpus = []
    hung = {_HUNG[n] for gpu in gpus if (n := gpu["properties"].get("device_id")) in _HUNG}
    if hung:
        fix = "try a restore of this very program before you rely on it, with the newest amdgpu driver"
        why = f"{', '.join(sorted(hung))}: restored programs have hung on it (criu#2663, #2716)"
        return Check(name, tested, "warn", why, fix)
    return Check(name, tested, "ok", f"none of {len(gpus)} GPUs")


CHECKS = (driver, libcuda, custom_storage, devices, mig, persistence, mps, cdi, legacy_hook, amd, amd_known)
