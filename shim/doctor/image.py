# SPDX-License-Identifier: Apache-2.0
"""An image against this node: whether it would restore here.

`facts` of an image are named as in docs/format.md; what an image does not say is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from cryoci.shim.criu.probe import CriuVersion
from cryoci.shim.doctor import gpus, tools
from cryoci.shim.doctor.check import Check, Facts
from cryoci.shim.runtime import numbers

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "ppc64le", "s390x": "s390x"}


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
    name, tested = "image.cpu", "this CPU has the features of the image's"
    wanted = set(image.get("cpu.flags", "").replace(",", " ").split())
    if not wanted:
        return Check(name, tested, "skip", "the image does not say")
    have: set[str] = set()
    for line in (node.read("/proc/cpuinfo") or "").splitlines():
        if line.startswith(("flags", "Features")):
            have = set(line.partition(":")[2].split())
            break
    missing = sorted(wanted - have)
    if missing:
        fix = "restore on a CPU of the same or a newer generation"
        return Check(name, tested, "fail", f"missing: {' '.join(missing[:8])}", fix)
    return Check(name, tested, "ok", f"all {len(wanted)}")


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
        return Check(name, tested, "skip", "the image holds no NVIDIA state, or does not say")
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
    """The driver restores on the same chip only, and a restore without room poisons the process."""
    name, tested = "image.gpu-chip", "GPUs of the same chip are here, with enough free memory in all"
    try:
        wanted = sorted(str(n) for n in json.loads(image.get("gpu.names") or "[]"))
    except (ValueError, TypeError):
        wanted = []
    if not wanted:
        return Check(name, tested, "skip", "the image holds no NVIDIA state, or does not say")
    said = node.run("nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits")
    if said is None or said.status != 0:
        return Check(
            name, tested, "fail", "nvidia-smi gives no answer here", "restore on a node with the GPU"
        )
    rows = [line.rsplit(",", 1) for line in said.text.splitlines() if "," in line]
    same = [int(free) << 20 for chip, free in rows if chip.strip() in wanted and free.strip().isdigit()]
    if len(same) < len(wanted) or not set(wanted) <= {chip.strip() for chip, _ in rows}:
        here = ", ".join(sorted({chip.strip() for chip, _ in rows})) or "none"
        return Check(
            name,
            tested,
            "fail",
            f"it needs {', '.join(wanted)}; here: {here}",
            "restore on the same kind of GPU",
        )
    need = image.get("gpu.memory", "")
    if need.isdigit() and sum(same) < int(need):
        why = f"{int(need) >> 20} MiB are needed, {sum(same) >> 20} MiB are free"
        return Check(
            name, tested, "fail", why, "free GPU memory first: a restore that runs out cannot be repeated"
        )
    return Check(name, tested, "ok", f"{len(same)} of {wanted[0]}")


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


CHECKS = (architecture, cpu, kernel, criu, runtime, driver, chip, base)


def examine(node: Facts, image: Mapping[str, str]) -> list[Check]:
    """Every check of an image against the node, in order."""
    return [check(node, image) for check in CHECKS]
