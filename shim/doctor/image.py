# SPDX-License-Identifier: Apache-2.0
"""An image against this node: whether it would restore here.

`facts` of an image are named as in docs/format.md; what an image does not say is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from cryoci.shim.criu import cpuinfo
from cryoci.shim.criu.probe import CriuVersion
from cryoci.shim.doctor import gpus, tools
from cryoci.shim.doctor.check import Check, Facts
from cryoci.shim.runtime import numbers

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "ppc64le", "s390x": "s390x"}
_HIDDEN = {"osxsave"}  # CRIU compares it, /proc/cpuinfo does not show it
_NO_GPU = "the image holds no NVIDIA state, or does not say"


def architecture(node: Facts, image: Mapping[str, str]) -> Check:
    name, tested = "image.architecture", "the image is of this architecture"
    wanted = image.get("host.arch") or ""
    wanted = _MACHINES.get(wanted, wanted)
    if not wanted:
        return Check(name, tested, "skip", "the image does not say")
    if wanted != node.machine:
        return Check(
            name, tested, "fail", f"it is {wanted}, this node {node.machine}", f"restore on a {wanted} node"
        )
    return Check(name, tested, "ok", wanted)


def cpu(node: Facts, image: Mapping[str, str]) -> Check:
    """CRIU's own comparison of the image's cpuinfo.img; it says that, not what, so the features are named here.

    Without CRIU, and for images that only list features, /proc/cpuinfo decides.
    """
    name, tested = "image.cpu", "this CPU has the features of the image's"
    data = cpuinfo.read(image["images"]) if image.get("images") else b""
    wanted = cpuinfo.flags(data) or set(image.get("cpu.flags", "").replace(",", " ").split())
    if not wanted:
        return Check(name, tested, "skip", f"the image does not say: it holds no {cpuinfo.NAME}")
    have: set[str] = set()
    for line in (node.read("/proc/cpuinfo") or "").splitlines():
        if line.startswith(("flags", "Features")):
            have = set(line.partition(":")[2].split())
            break
    missing = sorted(wanted - have - _HIDDEN)
    made = f", made on {cpuinfo.model(data)}" if cpuinfo.model(data) else ""
    said = node.run("criu", "cpuinfo", "check", "--images-dir", image["images"]) if data else None
    if said is not None and said.status == 0:
        return Check(name, tested, "ok", f"CRIU agrees{made}")
    fix = "restore on a CPU of the same or a newer generation"
    if missing:
        return Check(name, tested, "fail", f"missing: {' '.join(missing[:8])}{made}", fix)
    if said is not None:
        lines = [line for line in said.text.splitlines() if "Error" in line] or ["it gives no reason"]
        return Check(name, tested, "warn", f"CRIU: {lines[0].strip()[:200]}{made}", fix)
    return Check(name, tested, "ok", f"all {len(wanted)}{made}")


def criu(node: Facts, image: Mapping[str, str]) -> Check:
    name, tested = "image.criu", "this CRIU is not older than the image's"
    wanted, have = image.get("criu.version", ""), tools.criu_version(node)
    if have is None:
        return Check(name, tested, "fail", "there is no criu here", "apt-get install criu")
    if not wanted:
        return Check(name, tested, "skip", "the image does not say")
    here = str(CriuVersion("", have))
    if numbers(wanted) > numbers(here):
        return Check(
            name, tested, "warn", f"dumped by {wanted}, here is {here}", f"install criu {wanted} or newer"
        )
    return Check(name, tested, "ok", f"dumped by {wanted}, here is {here}")


def runtime(node: Facts, image: Mapping[str, str]) -> Check:
    """A checkpoint of runc is restored by runc, one of crun by crun."""
    name, tested = "image.runtime", "the image's runtime is here"
    wanted = image.get("runtime.name", "")
    if wanted not in ("runc", "crun"):
        return Check(name, tested, "skip", "the image does not say")
    if node.program(wanted) is None:
        return Check(
            name, tested, "fail", f"it was made by {wanted}, which is not here", f"apt-get install {wanted}"
        )
    return Check(name, tested, "ok", wanted)


def kernel(node: Facts, image: Mapping[str, str]) -> Check:
    name, tested = "image.kernel", "this kernel is not older than the image's"
    wanted = numbers(image.get("host.kernel", "").split("-")[0])[:2]
    if not wanted:
        return Check(name, tested, "skip", "the image does not say")
    text = f"dumped on Linux {'.'.join(map(str, wanted))}, here is {'.'.join(map(str, node.kernel))}"
    if tuple(wanted) > node.kernel:
        return Check(
            name,
            tested,
            "warn",
            text,
            "restore on that kernel or a newer one: what is new in it may be in use",
        )
    return Check(name, tested, "ok", text)


def driver(node: Facts, image: Mapping[str, str]) -> Check:
    name, tested = "image.gpu-driver", "this NVIDIA driver is not older than the image's"
    wanted = image.get("gpu.driver", "")
    if not wanted:
        return Check(name, tested, "skip", _NO_GPU)
    have = gpus.driver_version(node)
    if have is None:
        return Check(
            name, tested, "fail", "no NVIDIA driver is loaded here", "restore on a node with the GPU"
        )
    if numbers(have) < numbers(wanted):
        return Check(
            name,
            tested,
            "fail",
            f"dumped with {wanted}, here is {have}",
            f"install driver {wanted} or newer",
        )
    return Check(name, tested, "ok", f"dumped with {wanted}, here is {have}")


def chip(node: Facts, image: Mapping[str, str]) -> Check:
    """The driver restores on the same chip only."""
    name, tested = "image.gpu-chip", "GPUs of the same chip are here, as many as the image used"
    wanted = _chips(image)
    if not wanted:
        return Check(name, tested, "skip", _NO_GPU)
    here = _here(node)
    if here is None:
        fix = "restore on a node with the GPU"
        return Check(name, tested, "fail", "nvidia-smi gives no answer here", fix)
    names = [chip for chip, _ in here]
    if any(names.count(chip) < wanted.count(chip) for chip in wanted):
        why = f"it needs {', '.join(wanted)}; here: {', '.join(sorted(set(names))) or 'none'}"
        return Check(name, tested, "fail", why, "restore on the same kind of GPU")
    return Check(
        name, tested, "ok", f"{sum(chip in wanted for chip in names)} of {', '.join(sorted(set(wanted)))}"
    )


def vram(node: Facts, image: Mapping[str, str]) -> Check:
    """A restore that runs out of GPU memory cannot be repeated (NVIDIA/cuda-checkpoint#44)."""
    name, tested = "image.gpu-memory", "the GPUs have as much free memory as the image needs"
    need = image.get("gpu.memory", "")
    wanted = _chips(image)
    if not need.isdigit() or not wanted:
        return Check(name, tested, "skip", _NO_GPU)
    here = _here(node)
    if here is None:
        return Check(
            name, tested, "fail", "nvidia-smi gives no answer here", "restore on a node with the GPU"
        )
    fits = sorted((free for chip, free in here if chip in wanted), reverse=True)
    if not fits:
        return Check(name, tested, "skip", "no GPU of its kind is here")
    room = sum(fits[: len(wanted)])  # the emptiest ones: it goes on as many GPUs as it came from
    text = f"{int(need) >> 20} MiB are needed, {room >> 20} MiB are free on {len(wanted)} GPUs of its kind"
    if room < int(need):
        fix = "free GPU memory first: a restore that runs out cannot be repeated"
        return Check(name, tested, "fail", text, fix)
    return Check(name, tested, "ok", text)


def _chips(image: Mapping[str, str]) -> list[str]:
    """The names of the GPUs that the image used, one for each."""
    try:
        return sorted(str(n) for n in json.loads(image.get("gpu.names") or "[]"))
    except (ValueError, TypeError):
        return []


def _here(node: Facts) -> list[tuple[str, int]] | None:
    """Name and free bytes of this node's GPUs; None when nvidia-smi does not say."""
    said = node.run("nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits")
    if said is None or said.status != 0:
        return None
    rows = [line.rsplit(",", 1) for line in said.text.splitlines() if "," in line]
    return [(chip.strip(), int(free) << 20) for chip, free in rows if free.strip().isdigit()]


def base(node: Facts, image: Mapping[str, str]) -> Check:
    name, tested = "image.base", "the base image is here"
    engine, digest = image.get("engine.name", ""), image.get("image.digest", "")
    if engine != "podman" or not digest:
        return Check(
            name, tested, "skip", "the root file system travels in the image, or it is the engine's to know"
        )
    said = node.run("podman", "images", "--digests", "--no-trunc", "--format", "{{.Digest}}")
    if said is None:
        return Check(name, tested, "fail", "there is no podman here", "apt-get install podman")
    if digest not in said.text:
        where = f"{image.get('image.name', '').partition('@')[0]}@{digest}"
        return Check(name, tested, "warn", "not here: the restore pulls it", f"podman pull {where}")
    return Check(name, tested, "ok", digest)


CHECKS = (architecture, cpu, kernel, criu, runtime, driver, chip, vram, base)


def examine(node: Facts, image: Mapping[str, str], images: str = "") -> list[Check]:
    """Every check of an image against the node, in order; `images` is where its cpuinfo.img is, if it has one."""
    return [check(node, {**image, "images": images}) for check in CHECKS]
