# SPDX-License-Identifier: Apache-2.0
"""A small Kubernetes API server for a real kubectl: TLS, a token, RBAC, discovery, pods, nodes and the node proxy.

What it serves is what Kubernetes publishes (kube_schema.py): discovery is made of the published resources, objects are
completed by the published models, and each object that comes or goes is checked against them. A client that sends a
field that Kubernetes does not know is refused, and `serving` fails in the end. The kubelet's answers, which no OpenAPI
describes, are those of pkg/kubelet/server; what a request needs is told as by apiserver's RequestInfoFactory and its
RBAC authorizer.
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

from tests.unit import kube_schema

TOKEN = "secret-token"
GROUPS = ("", "node.k8s.io", "rbac.authorization.k8s.io", "apps", "batch", "authorization.k8s.io")  # each v1
PATCHES = ("application/merge-patch+json", "application/strategic-merge-patch+json")


def discovery() -> dict[str, tuple[str, dict[str, Any]]]:
    """Answers by path, with the model of each."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    groups = []
    for group in GROUPS:
        version = f"{group}/v1" if group else "v1"
        listed = [
            {
                "name": one.plural,
                "singularName": "" if "/" in one.plural else one.kind.lower(),
                "namespaced": one.namespaced,
                "kind": one.kind,
                "verbs": sorted(one.verbs),
            }
            for one in kube_schema.resources(group, "v1")
        ]
        head = {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version}
        path = f"/apis/{version}" if group else "/api/v1"
        found[path] = "APIResourceList", {**head, "resources": listed}
        if group:
            its = {"groupVersion": version, "version": "v1"}
            groups.append({"name": group, "versions": [its], "preferredVersion": its})
    found["/apis"] = "APIGroupList", {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    found["/api"] = (
        "APIVersions",
        {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []},
    )
    return found


def pod(name: str, *containers: str, node: str = "n1", phase: str = "Running") -> dict[str, Any]:
    """A Pod of namespace shop, as a controller has made it."""
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": name, "uid": "1", "controller": True}
    given = {
        "metadata": {
            "name": name,
            "namespace": "shop",
            "uid": "6f2d",
            "resourceVersion": "77",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"app": name, "pod-template-hash": "abc"},
            "ownerReferences": [owner],
        },
        "spec": {
            "nodeName": node,
            "containers": [{"name": one, "image": "registry.example/app:1"} for one in containers],
        },
        "status": {"phase": phase},
    }
    return kube_schema.completed("v1", "Pod", given)


def controller(kind: str, name: str, selector: dict[str, Any]) -> dict[str, Any]:
    """A controller of pods in namespace shop that selects as `selector` says, in its own words."""
    version = {"ReplicationController": "v1", "Job": "batch/v1"}.get(kind, "apps/v1")
    template = {"metadata": {"labels": {"any": "label"}}, "spec": {"containers": [{"name": "app"}]}}
    spec: dict[str, Any] = {"selector": selector, "template": template}
    if kind == "StatefulSet":
        spec["serviceName"] = name
    return kube_schema.completed(version, kind, {"metadata": {"name": name}, "spec": spec})


def node(name: str, **labels: str) -> dict[str, Any]:
    """A Node that is ready, with cryoci installed; `labels` are more of its labels."""
    usual = {"kubernetes.io/hostname": name, "kubernetes.io/arch": "amd64", "cryoci.io/runtime": "true"}
    given = {
        "metadata": {"name": name, "labels": {**usual, **labels}},
        "spec": {},
        "status": {
            "nodeInfo": {"containerRuntimeVersion": "cri-o://1.33.1", "kubeletVersion": "v1.33.0"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
    return kube_schema.completed("v1", "Node", given)


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
        self.controllers: dict[tuple[str, str], dict[str, Any]] = {}  # by resource and name
        self.agents = False
        self.runtime_class: dict[str, Any] = {"handler": "cryoci"}
        self.rules: list[dict[str, Any]] | None = None
        self.used: set[Asked] = set()
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.broken: list[str] = []  # what was against the published models, by whom
        self._discovery = discovery()

    def may(self, what: Asked) -> bool:
        """Whether the rules of the user's roles allow it; None stands for a cluster's admin."""
        return self.rules is None or any(
            what.verb in rule["verbs"]
            and what.group in rule["apiGroups"]
            and what.resource in rule["resources"]
            for rule in self.rules
        )

    def respond(self, method: str, path: str, query: str, body: Any) -> tuple[int, Any]:
        """The response to a request; what is wrong in either is noted, and a request refused for it."""
        what = asked(method, path)
        if what.resource and "/proxy/" not in path and (wrong := self._wrong(what, body)):
            self.broken += [f"{method} {path}: {one}" for one in wrong]
            return failure(422, "Invalid", "; ".join(wrong))
        if path == "/version":
            info = {"major": "1", "minor": "33", "gitVersion": "v1.33.0", "platform": "linux/amd64"}
            return 200, kube_schema.completed_part("version", "Info", info)
        if path in self._discovery:
            kind, listed = self._discovery[path]
            self.broken += kube_schema.problems_of(kind, listed, module="meta_v1")
            return 200, listed
        code, answer = self.answer(method, path, query, body)
        if "/proxy/" not in path:
            self.broken += [f"answer to {method} {path}: {one}" for one in kube_schema.problems(answer)]
        return code, answer

    @staticmethod
    def _wrong(what: Asked, body: Any) -> list[str]:
        served = [
            one for one in kube_schema.resources(what.group, "v1") if one.plural == what.resource
        ] if what.group in GROUPS else []  # fmt: skip
        if not served or what.verb not in served[0].verbs:
            return [f"nobody serves {what.verb} of {what.resource}"]
        if what.verb == "create":
            return kube_schema.problems(body)
        if what.verb == "patch":
            (one,) = served
            head = {"apiVersion": f"{one.group}/v1" if one.group else "v1", "kind": one.kind}
            return kube_schema.problems({**head, **body}, partial=True)
        return []

    def answer(self, method: str, path: str, query: str, body: Any) -> tuple[int, Any]:
        """The response to a request for a resource."""
        what = asked(method, path)
        if not what.allowed_to_all:
            self.used.add(what)
            if not self.may(what):
                said = f'cannot {what.verb} resource "{what.resource}" in API group "{what.group}"'
                name = what.resource.partition("/")[0]
                return failure(
                    403, "Forbidden", f'{name} is forbidden: User "eve" {said} at the cluster scope'
                )
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
            return 200, kube_schema.completed("v1", "NodeList", {"items": list(self.nodes.values())})
        if method == "PATCH" and what.resource == "nodes" and path.rpartition("/")[2] in self.nodes:
            patched = self.nodes[path.rpartition("/")[2]]
            labels = {**patched["metadata"]["labels"], **body["metadata"]["labels"]}
            patched["metadata"]["labels"] = {
                key: value for key, value in labels.items() if value is not None
            }
            return 200, copy.deepcopy(patched)
        if path == "/apis/apps/v1/namespaces/cryoci/daemonsets/cryoci-agent" and self.agents:
            status = {"numberReady": 1, "desiredNumberScheduled": 1}
            given = {"metadata": {"name": "cryoci-agent"}, "status": status}
            return 200, kube_schema.completed("apps/v1", "DaemonSet", given)
        if path == "/apis/node.k8s.io/v1/runtimeclasses/cryoci" and self.runtime_class:
            given = {"metadata": {"name": "cryoci"}, **self.runtime_class}
            return 200, kube_schema.completed("node.k8s.io/v1", "RuntimeClass", given)
        if path == "/api/v1/namespaces/shop/pods" and method == "POST":
            self.created.append(body)
            return 201, {**body, "metadata": {**body["metadata"], "uid": "new", "namespace": "shop"}}
        name = path.rpartition("/")[2]
        if (what.resource, name) in self.controllers and "/namespaces/shop/" in path:
            return 200, self.controllers[what.resource, name]
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
            elif self.command == "PATCH" and self.headers.get("Content-Type") not in PATCHES:
                code, answer = failure(415, "UnsupportedMediaType", "no patch that this server knows")
            else:
                code, answer = api.respond(self.command, path, query, json.loads(data) if data else None)
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
        assert api.broken == []
