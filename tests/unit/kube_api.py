# SPDX-License-Identifier: Apache-2.0
"""A small Kubernetes API server for a real kubectl: TLS, a token, RBAC, discovery, pods, nodes and the node proxy.

Objects and errors have the shapes of Kubernetes' OpenAPI (io.k8s.api.core.v1.Pod and NodeList,
apimachinery.pkg.apis.meta.v1.APIResourceList and Status); the kubelet's answers are those of pkg/kubelet/server, and
what a request needs is told as by apiserver's RequestInfoFactory and its RBAC authorizer.
"""

from __future__ import annotations

import copy
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "secret-token"
_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


def resource(name: str, kind: str, namespaced: bool = True) -> dict[str, Any]:
    """An APIResource."""
    return {
        "name": name,
        "singularName": kind.lower(),
        "namespaced": namespaced,
        "kind": kind,
        "verbs": _VERBS,
    }


GROUPS = {
    "/api/v1": (
        "v1",
        [
            resource("pods", "Pod"),
            resource("nodes", "Node", False),
            resource("namespaces", "Namespace", False),
            resource("configmaps", "ConfigMap"),
            resource("serviceaccounts", "ServiceAccount"),
        ],
    ),
    "/apis/node.k8s.io/v1": ("node.k8s.io/v1", [resource("runtimeclasses", "RuntimeClass", False)]),
    "/apis/rbac.authorization.k8s.io/v1": (
        "rbac.authorization.k8s.io/v1",
        [
            resource("clusterroles", "ClusterRole", False),
            resource("clusterrolebindings", "ClusterRoleBinding", False),
        ],
    ),
    "/apis/apps/v1": ("apps/v1", [resource("daemonsets", "DaemonSet")]),
    "/apis/authorization.k8s.io/v1": (
        "authorization.k8s.io/v1",
        [resource("selfsubjectaccessreviews", "SelfSubjectAccessReview", False)],
    ),
}


def pod(name: str, *containers: str, node: str = "n1", phase: str = "Running") -> dict[str, Any]:
    """A Pod of namespace shop, as a controller has made it."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "shop",
            "uid": "6f2d",
            "resourceVersion": "77",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": name, "pod-template-hash": "abc"},
            "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": name, "uid": "1", "controller": True}
            ],
        },
        "spec": {
            "nodeName": node,
            "containers": [{"name": one, "image": "registry.example/app:1"} for one in containers],
        },
        "status": {"phase": phase},
    }


def node(name: str, **labels: str) -> dict[str, Any]:
    """A Node that is ready, with cryoci installed; `labels` are more of its labels."""
    usual = {"kubernetes.io/hostname": name, "kubernetes.io/arch": "amd64", "cryoci.io/runtime": "true"}
    return {
        "metadata": {"name": name, "labels": {**usual, **labels}},
        "spec": {},
        "status": {
            "nodeInfo": {"containerRuntimeVersion": "cri-o://1.33.1", "kubeletVersion": "v1.33.0"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


@dataclass(frozen=True)
class Asked:
    """What a request is, for RBAC: `resource` with its subresource, as in a role."""

    verb: str
    group: str
    resource: str

    @property
    def allowed_to_all(self) -> bool:
        """By system:discovery and system:basic-user."""
        return not self.resource or self.resource == "selfsubjectaccessreviews"


def asked(method: str, path: str) -> Asked:
    """Attributes of a request; of none that is no resource's."""
    group, words = "", path.strip("/").split("/")
    if words[:1] == ["apis"] and len(words) > 3:
        group, words = words[1], words[3:]
    elif words[:1] == ["api"] and len(words) > 2:
        words = words[2:]
    else:
        return Asked("get", "", "")
    if words[0] == "namespaces" and len(words) > 2:
        words = words[2:]
    named = len(words) > 1
    verbs = {"GET": "get" if named else "list", "POST": "create", "PATCH": "patch", "DELETE": "delete"}
    return Asked(verbs[method], group, "/".join([words[0], *words[2:3]]))


def failure(code: int, reason: str, message: str) -> tuple[int, Any]:
    """A meta.v1.Status."""
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return code, {**status, "message": message, "reason": reason, "code": code}


class Api:
    """What the server knows and what it was asked; `kubelet` is the answer to the next checkpoint."""

    def __init__(self) -> None:
        self.pods = {
            "web": pod("web", "app"),
            "two": pod("two", "app", "sidecar"),
            "done": pod("done", "app", phase="Succeeded"),
        }
        self.kubelet: tuple[int, Any] = (
            200,
            {"items": ["/var/lib/kubelet/checkpoints/checkpoint-web_shop-app-2026-01-02T03:04:05Z.tar"]},
        )
        self.gates: dict[str, bool] = {}
        self.nodes = {"n1": node("n1")}
        self.agents = False
        self.runtime_class: dict[str, Any] = {"handler": "cryoci"}
        self.rules: list[dict[str, Any]] | None = None
        self.used: set[Asked] = set()
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []

    def may(self, what: Asked) -> bool:
        """Whether the rules of the user's roles allow it; None stands for a cluster's admin."""
        return self.rules is None or any(
            what.verb in rule["verbs"]
            and what.group in rule["apiGroups"]
            and what.resource in rule["resources"]
            for rule in self.rules
        )

    def answer(self, method: str, path: str, query: str, body: Any) -> tuple[int, Any]:
        """The response to a request."""
        what = asked(method, path)
        if not what.allowed_to_all:
            self.used.add(what)
            if not self.may(what):
                said = f'cannot {what.verb} resource "{what.resource}" in API group "{what.group}"'
                name = what.resource.partition("/")[0]
                return failure(
                    403, "Forbidden", f'{name} is forbidden: User "eve" {said} at the cluster scope'
                )
        if path == "/version":
            return 200, {"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "linux/amd64"}
        if path == "/api":
            return 200, {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        if path == "/apis":
            names = [value[0] for key, value in GROUPS.items() if key != "/api/v1"]
            versions = [{"groupVersion": name, "version": "v1"} for name in names]
            groups = [
                {"name": v["groupVersion"].partition("/")[0], "versions": [v], "preferredVersion": v}
                for v in versions
            ]
            return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        if path in GROUPS:
            version, resources = GROUPS[path]
            return 200, {
                "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources,
            }  # fmt: skip
        if "/proxy/checkpoint/" in path:
            self.asked.append(f"{method} {path}?{query}")
            return self.kubelet
        if path.endswith("/proxy/configz"):
            return 200, {"kubeletconfig": {"kind": "KubeletConfiguration", "featureGates": self.gates}}
        if path.endswith("/selfsubjectaccessreviews"):
            wants = body["spec"]["resourceAttributes"]
            full = "/".join(filter(None, (wants["resource"], wants.get("subresource"))))
            allowed = self.may(Asked(wants["verb"], wants.get("group", ""), full))
            return 201, {**body, "status": {"allowed": allowed}}
        if path == "/api/v1/nodes":
            items = list(self.nodes.values())
            return 200, {"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": items}
        if method == "PATCH" and what.resource == "nodes" and path.rpartition("/")[2] in self.nodes:
            patched = self.nodes[path.rpartition("/")[2]]
            labels = {**patched["metadata"]["labels"], **body["metadata"]["labels"]}
            patched["metadata"]["labels"] = {
                key: value for key, value in labels.items() if value is not None
            }
            return 200, copy.deepcopy(patched)
        if path == "/apis/apps/v1/namespaces/cryoci/daemonsets/cryoci-agent" and self.agents:
            head = {"kind": "DaemonSet", "apiVersion": "apps/v1", "metadata": {"name": "cryoci-agent"}}
            return 200, {**head, "status": {"numberReady": 1, "desiredNumberScheduled": 1}}
        if path == "/apis/node.k8s.io/v1/runtimeclasses/cryoci" and self.runtime_class:
            head = {"kind": "RuntimeClass", "apiVersion": "node.k8s.io/v1"}
            return 200, {**head, "metadata": {"name": "cryoci"}, **self.runtime_class}
        if path == "/api/v1/namespaces/shop/pods" and method == "POST":
            self.created.append(body)
            return 201, {**body, "metadata": {**body["metadata"], "uid": "new", "namespace": "shop"}}
        name = path.rpartition("/")[2]
        if path.startswith("/api/v1/namespaces/shop/pods/") and name in self.pods:
            return 200, self.pods[name]
        return failure(404, "NotFound", f'{path.split("/")[-2]} "{name}" not found')


@contextmanager
def serving(directory: Path) -> Iterator[tuple[Api, Path]]:
    """An API server on loopback, and the kubeconfig that leads to it (namespace shop)."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", f"{directory}/key.pem", "-out", f"{directory}/ca.pem"),
        ],
        check=True,
        capture_output=True,
    )
    api = Api()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else head and body of an answer are 40 ms apart

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def _serve(self) -> None:
            path, _, query = self.path.partition("?")
            data = self._body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                code, answer = failure(401, "Unauthorized", "Unauthorized")
            else:
                code, answer = api.answer(self.command, path, query, json.loads(data) if data else None)
            kind = "text/plain" if isinstance(answer, str) else "application/json"
            body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_DELETE = _serve

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "ca.pem", directory / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = directory / "kubeconfig"
        cluster = {
            "server": f"https://127.0.0.1:{server.server_port}",
            "certificate-authority": f"{directory}/ca.pem",
        }
        config.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "clusters": [{"name": "test", "cluster": cluster}],
                    "users": [{"name": "me", "user": {"token": TOKEN}}],
                    "contexts": [
                        {"name": "test", "context": {"cluster": "test", "user": "me", "namespace": "shop"}}
                    ],
                }
            )
        )
        yield api, config
        server.shutdown()
