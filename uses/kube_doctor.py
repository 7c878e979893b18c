# SPDX-License-Identifier: Apache-2.0
"""`kubectl cryoci doctor`: what keeps a cluster from checkpointing and restoring pods."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryoci.errors import CryociError
from cryoci.uses import kube_fit, node_labels
from cryoci.uses.kubectl import Kubectl

# The first that answer CRI's CheckpointContainer; Kubernetes 1.30 turned the kubelet's gate on.
_RUNTIMES = {"containerd": (2, 0), "cri-o": (1, 25)}
_GATE_ON = (1, 30)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `hint` says what to do when it is not `ok`."""

    what: str
    ok: bool
    detail: str
    hint: str = ""


def examine(kubectl: Kubectl) -> list[Finding]:
    """All findings. Raises what kubectl raises when there is no cluster to be asked."""
    nodes = kubectl.get("nodes")["items"]
    allowed = _may_checkpoint(kubectl)
    found = [
        Finding(
            "permission: create nodes/proxy",
            allowed,
            "yes" if allowed else "no",
            ""
            if allowed
            else "bind ClusterRole cryoci-checkpointer of crio-config/kubernetes/base/rbac.yaml",
        )
    ]
    for node in nodes:
        name, info = node["metadata"]["name"], node["status"]["nodeInfo"]
        found += [
            _runtime(name, str(info["containerRuntimeVersion"])),
            _gate(kubectl, name, str(info["kubeletVersion"])),
        ]
        if {"nvidia.com/gpu", "amd.com/gpu"} & set(node["status"].get("capacity") or {}):
            found.append(_gpu(name, node["metadata"].get("labels") or {}))
    return [*found, _class(kubectl), _agents(kubectl)]


def version(text: str) -> tuple[int, int]:
    """Major and minor in a version as Kubernetes writes them; (0, 0) when there is none."""
    matched = re.search(r"(\d+)\.(\d+)", text)
    return (int(matched[1]), int(matched[2])) if matched else (0, 0)


def _may_checkpoint(kubectl: Kubectl) -> bool:
    attributes = {"verb": "create", "resource": "nodes", "subresource": "proxy", "version": "v1"}
    kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    answer = kubectl.post_raw(path, {**kind, "spec": {"resourceAttributes": attributes}})
    return bool(answer.get("status", {}).get("allowed"))


def _runtime(node: str, text: str) -> Finding:
    kind, _, number = text.partition("://")
    wanted = _RUNTIMES.get(kind)
    ok = wanted is not None and version(number) >= wanted
    needs = "CRI-O 1.25, or containerd 2.0, or newer"
    return Finding(
        f"node {node}: runtime", ok, text, "" if ok else f"it cannot checkpoint; it takes {needs}"
    )


def _gate(kubectl: Kubectl, node: str, kubelet: str) -> Finding:
    what = f"node {node}: gate ContainerCheckpoint"
    hint = "set featureGates: {ContainerCheckpoint: true} in the kubelet's configuration"
    by_default = version(kubelet) >= _GATE_ON
    try:
        answer: Any = kubectl.get_raw(f"/api/v1/nodes/{node}/proxy/configz")
        gates = answer["kubeletconfig"].get("featureGates") or {}
        on = bool(gates.get("ContainerCheckpoint", by_default))
    except (CryociError, KeyError, TypeError, AttributeError):
        state = f"{'on' if by_default else 'off'} by default; the configuration of kubelet {kubelet} cannot be read"
        return Finding(what, by_default, state, "" if by_default else hint)
    return Finding(what, on, f"{'on' if on else 'off'}, kubelet {kubelet}", "" if on else hint)


def _gpu(node: str, labels: Mapping[str, str]) -> Finding:
    chip, driver = kube_fit.told(labels)
    ok = bool(chip and (driver or chip.startswith(node_labels.AMD)))
    hint = (
        "restores are scheduled by them: component gpu of crio-config/kubernetes, gpu-feature-discovery, or AMD's "
        "node labeller"
    )
    said = " with driver ".join(filter(None, (chip, driver))) or "none"
    return Finding(f"node {node}: labels of its GPUs", ok, said, "" if ok else hint)


def _class(kubectl: Kubectl) -> Finding:
    handler = kubectl.ask("get", "runtimeclass", "cryoci", "--output=jsonpath={.handler}")
    hint = "restores need it: it leads to cryoci-runtime on each node (crio-config/kubernetes)"
    return Finding("RuntimeClass cryoci", bool(handler), handler or "none", "" if handler else hint)


def _agents(kubectl: Kubectl) -> Finding:
    path = "--output=jsonpath={.status.numberReady}/{.status.desiredNumberScheduled}"
    counts = kubectl.ask("get", "daemonset", "cryoci-agent", "--namespace=cryoci", path)
    ready, _, wanted = counts.partition("/")
    ok = bool(wanted) and ready == wanted and wanted != "0"
    hint = "push needs them: kubectl apply -k crio-config/kubernetes/overlays/cri-o (or containerd)"
    return Finding("agents", ok, f"{counts} ready" if counts else "none", "" if ok else hint)
