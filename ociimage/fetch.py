# SPDX-License-Identifier: Apache-2.0
"""Bring a checkpoint to this node for a runtime that is about to restore it.

Whoever may write a pod's annotations must not read what others left on the node: for a pod only registries
count, and archives that kubelet made of containers in the pod's own namespace.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryoci.errors import RestoreError
from cryoci.ociimage import archive, reference, unpack
from cryoci.ociimage.seal import node
from cryoci.ociimage.transport import RegistryOptions
from cryoci.ociimage.trust.policy import Gate

KUBELET = Path("/var/lib/kubelet/checkpoints")


@dataclass(frozen=True)
class Fetched:
    """A checked checkpoint directory, the digest of its image ("" without one), its facts, the policy's warning."""

    directory: Path
    digest: str
    facts: Mapping[str, str]
    warning: str = ""


def fetch(
    text: str,
    directory: Path,
    *,
    pod_namespace: str | None = None,
    registry_options: RegistryOptions | None = None,
) -> Fetched:
    """Make `text` (a reference) a checked directory: `directory`, or its own where it is one already.

    What is encrypted is opened with this node's keys (seal/node.py). `pod_namespace` says that a pod of that
    Kubernetes namespace asks. Raises RestoreError for what a pod may not have, TrustError for what the node's policy
    refuses, and what `unpack.pull` and `archive.validate` raise.
    """
    source = reference.parse(text)
    if pod_namespace is not None:
        _check_pod(source, text)
    gate = Gate(source, registry_options)
    if isinstance(source, reference.DirectoryRef):
        gate(None, None)
        own = archive.validate(source.path.resolve())
        return Fetched(own.path, "", own.facts, _warning(gate))
    pulled = unpack.pull(
        source, directory, registry_options=gate.options, gate=gate, identities=node.identities()
    )
    facts = pulled.checkpoint.facts
    if isinstance(source, reference.ArchiveRef) and pod_namespace is not None:
        made_in = facts.get("pod.namespace", "")
        if made_in != pod_namespace:
            raise RestoreError(
                f"{text} is a checkpoint from namespace {made_in or 'none'}, and the pod is in {pod_namespace}",
                hint="a pod restores only checkpoints of its own namespace",
            )
    return Fetched(pulled.directory, pulled.digest, facts, _warning(gate))


def _warning(gate: Gate) -> str:
    return gate.verdict.warning if gate.verdict is not None else ""


def _check_pod(source: reference.Reference, text: str) -> None:
    if isinstance(source, reference.RegistryRef):
        return
    if isinstance(source, reference.ArchiveRef):
        path = os.fspath(source.path)
        if os.path.dirname(path) == os.fspath(KUBELET) and os.path.realpath(path) == path:
            return
    raise RestoreError(
        f"a pod may not restore {text}: it is a file of this node",
        hint=f"name an image in a registry, or an archive of kubelet's in {KUBELET}",
    )
