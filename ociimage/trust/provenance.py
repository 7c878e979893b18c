# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint comes from, as a SLSA provenance v1 predicate: node, engine, versions, base image.

Whoever signs it says that this node made or vouches for the image with these facts. The facts of the dump are those
of the image's annotations, so sign where the checkpoint was made. No environment, argument or path is in it.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cryoci import __version__
from cryoci.ociimage import annotations as families
from cryoci.ociimage.manifest import rfc3339

PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:cryoci:checkpoint:1"
# fact -> what it is called in the predicate's internal parameters
_VERSIONS = (
    "engine.name", "engine.version", "runtime.name", "runtime.version", "criu.version",
    "host.arch", "host.kernel", "cgroup.version",
)  # fmt: skip


def predicate(annotations: Mapping[str, str], digest: str, node: str | None = None) -> dict[str, Any]:
    """The provenance of the image `digest` with these annotations, as seen from this node, called `node`."""
    facts = families.read(annotations)
    base = facts.get("image.digest", "").removeprefix("sha256:")
    material = {"uri": facts.get("image.name", ""), **({"digest": {"sha256": base}} if base else {})}
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "container": {
                    name: facts[f"container.{name}"]
                    for name in ("name", "id")
                    if f"container.{name}" in facts
                },
                "pod": {
                    name: facts[f"pod.{name}"] for name in ("namespace", "name") if f"pod.{name}" in facts
                },
            },
            "internalParameters": {fact: facts[fact] for fact in _VERSIONS if fact in facts},
            "resolvedDependencies": [material] if material["uri"] or base else [],
        },
        "runDetails": {
            "builder": {
                "id": f"urn:cryoci:node:{node or socket.gethostname()}",
                "version": {"cryoci": __version__, "kernel": platform.release()},
            },
            "metadata": {
                "invocationId": digest,
                **({"startedOn": facts["checkpointed"]} if facts.get("checkpointed") else {}),
                "finishedOn": rfc3339(datetime.now(UTC)),
            },
        },
    }
