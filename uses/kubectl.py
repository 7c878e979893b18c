# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes API by the user's own kubectl: its kubeconfig, its credentials, its proxies and plugins for both.

What the API server and the kubelet refuse comes back as a sentence about the cause, and what to do.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cryoci.command import run
from cryoci.errors import NotFoundError, PrivilegeError, ToolError, UnsupportedError

_SAID = 2000


@dataclass(frozen=True)
class Kubectl:
    """kubectl with `flags` (--context=..., --kubeconfig=...) and `namespace` (None: the context's)."""

    flags: tuple[str, ...] = ()
    namespace: str | None = None

    def get(self, *words: str) -> Any:
        """`kubectl get WORDS -o json`. Raises NotFoundError, PrivilegeError, ToolError."""
        return self._json(["get", *words, "--output=json", *self._where()])

    def get_raw(self, path: str) -> Any:
        """GET of an API path."""
        return self._json(["get", f"--raw={path}"])

    def post_raw(self, path: str, body: Any = None, *, timeout: float = 60) -> Any:
        """POST `body`, or nothing, to an API path; `timeout` in seconds.

        The server itself checks it: kubectl's own check would first fetch the server's whole OpenAPI.
        """
        # the body comes from a file or stdin, and there must be one; --request-timeout would replace ?timeout=
        # by its own "1m30s", which a kubelet answers with 404
        file = os.devnull if body is None else "-"
        return self._json(["create", f"--raw={path}", f"--filename={file}"], body, timeout + 30)

    def ask(self, *words: str) -> str:
        """What any other command prints, "" when it fails."""
        result = run(["kubectl", *self.flags, *words], check=False)
        return result.stdout.decode(errors="replace").strip() if result.returncode == 0 else ""

    def _where(self) -> list[str]:
        return [f"--namespace={self.namespace}"] if self.namespace else []

    def _json(self, words: Sequence[str], body: Any = None, timeout: float = 120) -> Any:
        argv = ["kubectl", *self.flags, *words]
        data = None if body is None else json.dumps(body).encode()
        result = run(argv, input=data, timeout=timeout, check=False)
        if result.returncode != 0:
            raise explain(argv, result)
        try:
            return json.loads(result.stdout)
        except ValueError as e:
            raise ToolError(f"kubectl answered no JSON: {result.stdout[:200]!r}") from e


def explain(argv: Sequence[str], result: subprocess.CompletedProcess[bytes]) -> Exception:
    """The cause of a kubectl that failed, as one of our errors."""
    said = result.stderr.decode(errors="replace").strip()[-_SAID:]
    low, checkpoint = said.lower(), "/proxy/checkpoint/" in " ".join(argv)
    short = said.removeprefix("Error from server ").strip()
    if checkpoint and (error := _kubelet(short, low)):
        return error
    if "(forbidden)" in low or "is forbidden" in low:
        return PrivilegeError(
            f"the API server forbids that: {short}",
            hint="give the user the role of crio-config/kubernetes/base/rbac.yaml: kubectl create clusterrolebinding "
            "checkpointers --clusterrole=cryoci-checkpointer --user=NAME",
        )
    if "(notfound)" in low or "not found" in low:
        return NotFoundError(
            f"the cluster has no such thing: {short}", hint="see its name and namespace (-n)"
        )
    if "unauthorized" in low or "must be logged in" in low:
        return PrivilegeError(
            f"the API server does not know you: {said}", hint="log in, or see `kubectl config view`"
        )
    return ToolError(
        f"kubectl failed: {said or f'status {result.returncode}'}", hint="see `kubectl cluster-info`"
    )


def _kubelet(short: str, low: str) -> Exception | None:
    """Why a kubelet, or the API server on the way to it, would not checkpoint."""
    if "nodes/checkpoint" in low or ("forbidden" in low and "subresource" in low and "checkpoint" in low):
        return PrivilegeError(
            f"the kubelet forbids it to the API server: {short}",
            hint="the API server's own kubelet client needs verb create on nodes/checkpoint: bind ClusterRole "
            "cryoci-kubelet-checkpoint of crio-config/kubernetes/base/rbac.yaml to the user that is named",
        )
    if "forbidden" in low:
        return None
    if "rpc error" in low or "checkpointing of" in low:
        if any(
            word in low for word in ("unimplemented", "not implemented", "unknown method", "unknown service")
        ):
            return UnsupportedError(
                f"the container runtime of that node cannot checkpoint: {short}",
                hint="it takes CRI-O 1.25 or containerd 2.0, or newer; see `kubectl cryoci doctor`",
            )
        if "support not available" in low or ("criu" in low and ("not found" in low or "disabled" in low)):
            return UnsupportedError(
                f"the container runtime of that node has checkpoints turned off, or lacks CRIU: {short}",
                hint="install criu there; CRI-O: enable_criu_support = true; containerd: enable_criu = true",
            )
        return ToolError(
            f"the node could not checkpoint the container: {short}",
            hint="CRIU's log is on that node; with cryoci-runtime below the engine: "
            "/run/cryoci/containers/*/ID/dump.log says why",
        )
    if (
        "not found" in low
        or "notfound" in low
        or "could not find the requested resource" in low
        or "404" in low
    ):
        return UnsupportedError(
            f"the kubelet has no checkpoint endpoint for that: {short}",
            hint="its feature gate ContainerCheckpoint is off (on by default since Kubernetes 1.30), or the pod has "
            "just gone; see `kubectl cryoci doctor`",
        )
    return None
