# SPDX-License-Identifier: Apache-2.0
"""What `kubectl cryoci` does: checkpoint containers of pods by their kubelets, and make pods that restore them.

checkpoint  API server -> node proxy -> kubelet -> CRI -> /var/lib/kubelet/checkpoints/checkpoint-POD_NS-C-TIME.tar
push        the same, then the agent of that node (uses/agent.py) makes HOST/REPO:TAG of the archive
restore     a pod like the old one, with annotation io.cryoci.restore.CONTAINER, the RuntimeClass of cryoci, and
            affinity to the nodes that have what the image needs (uses/kube_fit.py)
"""

from __future__ import annotations

import copy
import time
import urllib.parse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from cryoci.amounts import seconds
from cryoci.errors import ConflictError, NotFoundError, ToolError, UsageError
from cryoci.ociimage import image, reference, referrers, stores
from cryoci.ociimage.progress import PERIOD
from cryoci.ociimage.transport import RegistryOptions
from cryoci.periodic import every
from cryoci.shim.annotated import request
from cryoci.uses import kube_fit, kube_labels, kubelet_archive
from cryoci.uses.kubectl import Kubectl

RESTORE = request.PLAIN
_LONGEST = 63  # of the name of an annotation
_POLL = 1.0  # seconds
# What a new pod has of the old one's metadata.
_METADATA = ("name", "namespace", "labels", "annotations")


@dataclass(frozen=True)
class NodeCheckpoint:
    """An archive that a kubelet has written: `path` on `node`; `tag` is what its agent will call the image."""

    namespace: str
    pod: str
    container: str
    node: str
    path: str
    tag: str


def _told(what: str, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Say a line now and then while the with block waits for `what`."""
    began = time.monotonic()
    return every(PERIOD, lambda: say(f"{what}, after {seconds(time.monotonic() - began)}"), "cryoci-told")


def checkpoint(
    kubectl: Kubectl,
    pod: str,
    container: str | None,
    timeout: float,
    say: Callable[[str], None] = lambda line: None,
) -> NodeCheckpoint:
    """Checkpoint one container of a running pod, which runs on; `timeout` in seconds. `say` hears of a long wait.

    Raises NotFoundError, ConflictError, PrivilegeError, UnsupportedError, ToolError.
    """
    found = kubectl.get("pod", pod)
    namespace, node = found["metadata"]["namespace"], found["spec"].get("nodeName")
    phase = found.get("status", {}).get("phase", "unknown")
    if not node or phase != "Running":
        raise ConflictError(
            f"pod {namespace}/{pod} is {phase}", hint="only a running pod can be checkpointed"
        )
    name = choose(found, container)
    words = [urllib.parse.quote(word, safe="") for word in (node, namespace, pod, name)]
    path = "/api/v1/nodes/{}/proxy/checkpoint/{}/{}/{}".format(*words)
    with _told(f"node {node} is checkpointing {namespace}/{pod} container {name}", say):
        answer = kubectl.post_raw(f"{path}?timeout={int(timeout)}", timeout=timeout)
    items = answer.get("items") if isinstance(answer, dict) else None
    if not isinstance(items, list) or not items or not isinstance(items[0], str):
        raise ToolError(f"the kubelet of {node} answered without an archive: {str(answer)[:200]}")
    return NodeCheckpoint(namespace, pod, name, node, items[0], kubelet_archive.tag(items[0]))


def choose(pod: dict[str, Any], container: str | None) -> str:
    """The container that is meant. Raises UsageError, NotFoundError naming those that there are."""
    names = [
        one["name"]
        for kind in ("containers", "initContainers", "ephemeralContainers")
        for one in pod["spec"].get(kind) or ()
    ]
    if container is None:
        regular = [one["name"] for one in pod["spec"]["containers"]]
        if len(regular) == 1:
            return str(regular[0])
        raise UsageError(
            f"pod {pod['metadata']['name']} has {len(regular)} containers",
            hint=f"choose one: -c {'|'.join(regular)}",
        )
    if container not in names:
        raise NotFoundError(
            f"pod {pod['metadata']['name']} has no container {container}", hint=f"it has {', '.join(names)}"
        )
    return container


def await_image(
    made: NodeCheckpoint,
    repository: str,
    timeout: float,
    options: RegistryOptions | None,
    *,
    signed: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[str, str]:
    """Wait until the agent has pushed it, and signed it with `signed`; returns reference and digest.

    `say` hears of a long wait. Raises ConflictError after `timeout` s.
    """
    ref = reference.parse(f"{repository}:{made.tag}")
    if not isinstance(ref, reference.RegistryRef):
        raise UsageError(f"{repository} is no repository", hint="write HOST/REPO, as the agent's --to")
    store = stores.open_store(ref, options)
    deadline, missing = time.monotonic() + timeout, "pushed"
    with _told(f"waiting for the agent of node {made.node} to push {ref}", say):
        while True:
            try:
                digest = stores.resolve(store, made.tag).top.digest
                missing = "signed"
                if signed:
                    store.get_manifest(referrers.tag(digest, ".sig"))
                return str(ref), digest
            except NotFoundError:
                if time.monotonic() > deadline:
                    raise ConflictError(
                        f"no agent has {missing} {made.path} of node {made.node} to {repository} within {timeout:g} s",
                        hint="does it run there, with that --to (and --sign-key)? kubectl -n cryoci logs "
                        "daemonset/cryoci-agent",
                    ) from None
            time.sleep(_POLL)


def images(
    repository: str,
    pod: str | None,
    options: RegistryOptions | None,
    *,
    namespace: str | None = None,
    container: str | None = None,
) -> list[image.ImageSummary]:
    """The images that agents have pushed to a repository, of such pods and containers (None: of all)."""
    ref = reference.parse(repository)
    if not isinstance(ref, reference.RegistryRef):
        raise UsageError(f"{repository} is no repository of a registry", hint="write HOST/REPO")
    found = image.list_images(ref, registry_options=options)
    if pod is namespace is container is None:
        return found
    return [one for one in found if kubelet_archive.is_of(one.name, pod, namespace, container)]


def look(image_reference: str, options: RegistryOptions | None) -> tuple[str, kube_fit.Needs]:
    """The image's reference with its digest, and what it needs of a node.

    Raises UsageError, NotFoundError, ImageError, UnsupportedError, RegistryError.
    """
    ref = _remote(image_reference)
    found = image.inspect(ref, registry_options=options)
    return str(replace(ref, digest=found.digest)), kube_fit.needs(found.annotations)


def place(kubectl: Kubectl, pod: dict[str, Any], wanted: kube_fit.Needs) -> list[str]:
    """Names of the nodes on which `pod`, as `restoring` made it, can be scheduled and restored.

    Raises NotFoundError without the RuntimeClass, UnsupportedError when no node fits, and what kubectl raises.
    """
    name = pod["spec"]["runtimeClassName"]
    try:
        found = kubectl.get("runtimeclass", name)
    except NotFoundError as e:
        raise NotFoundError(
            f"the cluster has no RuntimeClass {name}, which leads to cryoci-runtime",
            hint="kubectl apply -k crio-config/kubernetes/overlays/cri-o (or containerd)",
        ) from e
    scheduling = found.get("scheduling") or {}
    selector = {**(scheduling.get("nodeSelector") or {}), **(pod["spec"].get("nodeSelector") or {})}
    return kube_fit.check(kubectl.get("nodes")["items"], selector, wanted)


def _remote(text: str) -> reference.RegistryRef:
    ref = reference.parse(text)
    if not isinstance(ref, reference.RegistryRef):
        raise UsageError(f"{text} is on no registry", hint="every node must reach it: HOST/REPO:TAG")
    return ref


def create(kubectl: Kubectl, pod: dict[str, Any]) -> dict[str, Any]:
    """Create a pod; returns it as the server has it. Raises what the server refuses."""
    namespace = pod["metadata"]["namespace"] = namespace_of(kubectl, pod)
    where = urllib.parse.quote(namespace, safe="")
    made = kubectl.post_raw(f"/api/v1/namespaces/{where}/pods?fieldValidation=Strict", pod)
    if not isinstance(made, dict) or "metadata" not in made:
        raise ToolError(f"the API server answered without a pod: {str(made)[:200]}")
    return made


def namespace_of(kubectl: Kubectl, pod: dict[str, Any]) -> str:
    """Where `create` creates it."""
    return kubectl.namespace or pod["metadata"].get("namespace") or "default"


def restoring(
    pod: dict[str, Any],
    container: str | None,
    image_reference: str,
    *,
    name: str | None,
    node: str | None,
    runtime_class: str,
    wanted: kube_fit.Needs = kube_fit.Needs(),  # noqa: B008  (it is immutable)
    keep_labels: bool = False,
) -> dict[str, Any]:
    """The manifest of a pod like `pod` whose container comes out of a checkpoint image, on a node as `wanted`.

    Labels that controllers put there for themselves stay behind, but with `keep_labels`; of the others see
    kube_labels. Raises UsageError, NotFoundError.
    """
    _remote(image_reference)
    chosen = choose(pod, container)
    old = pod["metadata"]
    fresh: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {key: copy.deepcopy(old[key]) for key in _METADATA if old.get(key)},
        "spec": copy.deepcopy(pod["spec"]),
    }
    meta, spec = fresh["metadata"], fresh["spec"]
    meta["name"] = name or f"{old['name'][:54].rstrip('-.')}-restored"
    dropped = () if keep_labels else kube_labels.HASHES
    meta["labels"] = {key: text for key, text in (meta.get("labels") or {}).items() if key not in dropped}
    # of a pod that was restored itself, whose other containers start anew now
    asking = (f"{RESTORE}.", request.PATH)
    kept = {
        key: text
        for key, text in (meta.get("annotations") or {}).items()
        if key != RESTORE and not key.startswith(asking)
    }
    meta["annotations"] = {**kept, _annotation(spec, chosen): image_reference}
    for key in ("nodeName", "ephemeralContainers"):
        spec.pop(key, None)
    spec["runtimeClassName"] = runtime_class
    if node:
        spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), "kubernetes.io/hostname": node}
    kube_fit.require(spec, wanted)
    return fresh


def _annotation(spec: dict[str, Any], container: str) -> str:
    """The annotation that has `container` restored. Raises UsageError when none can name it."""
    key = f"{RESTORE}.{container}"
    if len(key) <= _LONGEST:
        return key
    if len(spec["containers"]) + len(spec.get("initContainers") or ()) == 1:
        return RESTORE
    room = _LONGEST - len(RESTORE) - 1
    raise UsageError(
        f"annotation {RESTORE}.NAME has room for {room} characters, and the container's name is longer: {container}",
        hint="restore it without the pod's other containers: take them out of what `kubectl get pod -o json` says, "
        "and give that as --manifest",
    )
