# SPDX-License-Identifier: Apache-2.0
"""Labels of a restored pod: by them a controller takes a pod without an owner for its own, and then has one too many.

A ReplicaSet of a Deployment and a Job select by a hash or an id, which no other pod needs. Every other controller
selects by the labels by which Services find the pod, so one of these has to go: a Service is told of it later, a pod
that its controller has deleted is gone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cryoci.errors import NotFoundError
from cryoci.uses.kubectl import Kubectl

# Put there by a controller, for itself; no Service selects by one.
HASHES = (
    "pod-template-hash",
    "rollouts-pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "batch.kubernetes.io/controller-uid",
    "controller-uid",
)
_CONTROLLERS = {
    ("", "ReplicationController"): "replicationcontrollers",
    ("apps", "ReplicaSet"): "replicasets.apps",
    ("apps", "DaemonSet"): "daemonsets.apps",
    ("apps", "StatefulSet"): "statefulsets.apps",
    ("batch", "Job"): "jobs.batch",
}
_NAMES = ("app", "k8s-app", "app.kubernetes.io/name")  # most Services select by these


def settle(kubectl: Kubectl, old: Mapping[str, Any], fresh: dict[str, Any], namespace: str) -> list[str]:
    """Take labels from `fresh`, a pod like `old` for `namespace`, until the controller of `old` would not adopt it.

    Returns what is to be said about it. Raises PrivilegeError, ToolError.
    """
    owners = [one for one in old["metadata"].get("ownerReferences") or () if one.get("controller")]
    if not owners or owners[0].get("kind") == "Node":  # a static pod's
        return []
    group, kind, name = str(owners[0].get("apiVersion", "")), str(owners[0]["kind"]), str(owners[0]["name"])
    resource = _CONTROLLERS.get((group.rpartition("/")[0], kind))
    if resource is None:
        return [
            f"{kind} {name} may take the new pod for its own: cryoci does not know by which labels it selects"
        ]
    if kind == "StatefulSet" and not re.fullmatch(rf"{re.escape(name)}-\d+", fresh["metadata"]["name"]):
        return []  # it adopts none whose name is not NAME-NUMBER
    try:
        found = replace(kubectl, namespace=namespace).get(resource, name)
    except NotFoundError:
        return []
    selector, labels = _selector(found["spec"].get("selector") or {}), fresh["metadata"]["labels"]
    if not _matches(selector, labels):
        return []
    key = _spare(selector, labels)
    if key is None:
        return [f"{kind} {name} takes the new pod for its own, by the labels that it does not have"]
    value = labels.pop(key)
    return [
        f"label {key}={value} is left out, by which {kind} {name} would take the new pod for its own, and may delete "
        "it; a Service that selects by it does not find the pod (--keep-labels keeps all)"
    ]


def _selector(given: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Key, operator and values of each requirement; a ReplicationController's are a plain map."""
    if not given.keys() & {"matchLabels", "matchExpressions"}:
        given = {"matchLabels": given}
    return [
        *((key, "In", [value]) for key, value in (given.get("matchLabels") or {}).items()),
        *(
            (one["key"], one["operator"], list(one.get("values") or ()))
            for one in given.get("matchExpressions") or ()
        ),
    ]


def _matches(selector: list[tuple[str, str, list[str]]], labels: Mapping[str, str]) -> bool:
    held = {
        "In": lambda key, values: labels.get(key) in values,
        "NotIn": lambda key, values: labels.get(key) not in values,
        "Exists": lambda key, values: key in labels,
        "DoesNotExist": lambda key, values: key not in labels,
    }
    return bool(selector) and all(held[how](key, values) for key, how, values in selector)


def _spare(selector: list[tuple[str, str, list[str]]], labels: Mapping[str, str]) -> str | None:
    """The label without which the selector does not match; rather one by which no Service selects."""
    keys = sorted({key for key, how, _ in selector if how in ("In", "Exists") and key in labels})
    return min(keys, key=lambda key: key in _NAMES, default=None)
