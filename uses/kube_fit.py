# SPDX-License-Identifier: Apache-2.0
"""On which nodes of a cluster a checkpoint image can be restored: node affinity from the image's annotations.

CUDA goes on only on the same chip and, as the driver's libraries are mapped by exact version, with the same driver
(docs/devices.md); an AMD GPU only on one of the same device id. Nodes say which they have by the labels of cryoci's
agent, of NVIDIA's gpu-feature-discovery or of AMD's node labeller: any of these ways will do, so each is a term of its
own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryoci.errors import ImageError, UnsupportedError
from cryoci.ociimage import annotations as families
from cryoci.uses import node_labels

ARCH = "kubernetes.io/arch"
_GOARCH = {"x86_64": "amd64", "aarch64": "arm64"}
_PRODUCT = "nvidia.com/gpu.product"
_FULL = "nvidia.com/cuda.driver-version.full"  # gpu-feature-discovery 0.15 and newer
_PARTS = tuple(f"nvidia.com/cuda.driver-version.{part}" for part in ("major", "minor", "revision"))
_OLD_PARTS = tuple(f"nvidia.com/cuda.driver.{part}" for part in ("major", "minor", "rev"))
_DEVICE = "amd.com/gpu.device-id"  # AMD's node labeller
_MOST = 64  # of an image's chips that are looked at


@dataclass(frozen=True)
class Needs:
    """What a node must have: `arch` as Kubernetes names it, `chip` and `driver` of its GPUs; "" for whatever.

    An AMD chip is amd-ID, by the hexadecimal device id, and of any driver.
    """

    arch: str = ""
    chip: str = ""
    driver: str = ""

    def __str__(self) -> str:
        gpu = f"{self.chip} with driver {self.driver}" if self.driver else self.chip
        return (
            " and ".join(filter(None, (gpu, self.arch and f"architecture {self.arch}"))) or "nothing special"
        )


def needs(annotations: Mapping[str, str]) -> Needs:
    """What an image with these annotations needs. Raises ImageError, UnsupportedError."""
    arch = families.read(annotations).get("host.arch", "")
    chips, amd = (_listed(annotations, key) for key in ("gpu.names", "gpu.amd"))
    driver = annotations.get(f"{families.CRYOCI}gpu.driver", "")
    found = [*chips, *(f"{node_labels.AMD}{one}" for one in amd)]
    if len(found) > 1:
        raise UnsupportedError(
            f"the checkpoint is of a node with several kinds of GPU: {', '.join(found)}",
            hint="labels of nodes tell one: choose the node yourself, with --any-node --node NAME",
        )
    if chips and not driver:
        raise ImageError(
            "the image names its GPU and no driver, without which no node can be chosen",
            hint="choose one yourself, with --any-node --node NAME",
        )
    return Needs(_GOARCH.get(arch, arch), found[0] if found else "", driver if chips else "")


def _listed(annotations: Mapping[str, str], key: str) -> list[str]:
    """The different entries of a JSON list among the image's annotations."""
    text = annotations.get(f"{families.CRYOCI}{key}") or "[]"
    try:
        return sorted({str(name) for name in json.loads(text)[:_MOST]})
    except (ValueError, TypeError, RecursionError) as e:
        raise ImageError(f"the image's annotation {families.CRYOCI}{key} is no list: {text[:100]!r}") from e


def terms(wanted: Needs) -> list[dict[str, Any]]:
    """nodeSelectorTerms, one of which a node must match; [] when every node will do."""
    always = [_is(ARCH, wanted.arch)] if wanted.arch else []
    if not wanted.chip:
        return [{"matchExpressions": always}] if always else []
    chip, driver = node_labels.value(wanted.chip), node_labels.value(wanted.driver)
    ways = [[_is(node_labels.CHIP, chip)], [_is(_DEVICE, chip.removeprefix(node_labels.AMD))]]
    if driver:
        ways = _nvidia(chip, driver)
    return [{"matchExpressions": [*always, *way]} for way in ways]


def _nvidia(chip: str, driver: str) -> list[list[dict[str, Any]]]:
    parts = driver.split(".")
    return [
        [_is(node_labels.CHIP, chip), _is(node_labels.DRIVER, driver)],
        [_is(_PRODUCT, chip), _is(_FULL, driver)],
        *(
            [_is(_PRODUCT, chip), *(_is(key, part) for key, part in zip(keys, parts, strict=False))]
            for keys in (_PARTS, _OLD_PARTS)
        ),
    ]


def require(spec: dict[str, Any], wanted: Needs) -> None:
    """Have a pod's `spec` scheduled only where `wanted` is: each of its own terms and each of ours, together."""
    ours = terms(wanted)
    if not ours:
        return
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    theirs = required.get("nodeSelectorTerms") or [{}]
    required["nodeSelectorTerms"] = [
        {**one, "matchExpressions": [*(one.get("matchExpressions") or ()), *term["matchExpressions"]]}
        for one in theirs
        for term in ours
    ]


def check(nodes: Sequence[Mapping[str, Any]], selector: Mapping[str, str], wanted: Needs) -> list[str]:
    """Names of the nodes that fit: ready, with the labels of `selector` and what `wanted` says.

    Raises UnsupportedError, with what each node lacks, when there is none.
    """
    lacking = {str(node["metadata"]["name"]): _lacks(node, selector, wanted) for node in nodes}
    fitting = [name for name, lacks in lacking.items() if not lacks]
    if not fitting:
        said = "; ".join(f"{name} {lacks}" for name, lacks in sorted(lacking.items())[:20])
        more = f"; and {len(lacking) - 20} more" if len(lacking) > 20 else ""
        raise UnsupportedError(
            f"no node can restore it: it takes {wanted}. {said or 'The cluster has no nodes'}{more}",
            hint="label nodes (the agent of component gpu does, or gpu-feature-discovery), or let the scheduler "
            "try any with --any-node",
        )
    return fitting


def _lacks(node: Mapping[str, Any], selector: Mapping[str, str], wanted: Needs) -> str:
    """Why a node will not do; "" when it will."""
    labels: Mapping[str, str] = node["metadata"].get("labels") or {}
    ready = [
        c.get("status") for c in node.get("status", {}).get("conditions") or () if c.get("type") == "Ready"
    ]
    if ready and ready != ["True"]:
        return "is not ready"
    if node.get("spec", {}).get("unschedulable"):
        return "is cordoned"
    for key, text in selector.items():
        if labels.get(key) != text:
            return f"has no label {key}={text}"
    if wanted.arch and labels.get(ARCH) not in (None, wanted.arch):
        return f"is {labels[ARCH]}"
    ways = terms(wanted)
    if not wanted.chip or any(all(_holds(one, labels) for one in way["matchExpressions"]) for way in ways):
        return ""
    chip, driver = told(labels)
    if not chip:
        return "has no label that says which GPU it has"
    if chip.startswith(node_labels.AMD):
        return f"has {chip}"
    return f"has {chip} with {f'driver {driver}' if driver else 'a driver that no label names'}"


def told(labels: Mapping[str, str]) -> tuple[str, str]:
    """Chip and driver of a node with these labels; "" for what none says."""
    driver = labels.get(node_labels.DRIVER) or labels.get(_FULL) or ""
    for keys in (_PARTS, _OLD_PARTS):
        driver = driver or ".".join(labels[key] for key in keys if key in labels)
    amd = f"{node_labels.AMD}{labels[_DEVICE]}" if _DEVICE in labels else ""
    return labels.get(node_labels.CHIP) or labels.get(_PRODUCT) or amd, driver


def _is(key: str, text: str) -> dict[str, Any]:
    return {"key": key, "operator": "In", "values": [text]}


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return labels.get(expression["key"]) in expression["values"]
