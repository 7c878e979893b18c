# SPDX-License-Identifier: Apache-2.0
"""What Kubernetes publishes about its objects, and what an object breaks of it.

The models and resources of package lightkube-models are made from the OpenAPI of a Kubernetes release. They are Python
source, which is read here and never imported: that would take a whole client. What OpenAPI tells in prose only
(formats of names and labels, values that a field may have) is below, for what cryoci sends.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = "lightkube-models"
_QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(m|u|n|[kMGTPE]i?|Ki|[eE][+-]?\d+)?")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
_NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_KEY = re.compile(rf"((?=.{{1,253}}/){_LABEL}(\.{_LABEL})*/)?{_NAME}")
_VALUE = re.compile(rf"({_NAME})?")
_SUBDOMAIN = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_DNS_LABEL = re.compile(rf"(?=.{{1,63}}\Z){_LABEL}")

# Each value stands in the description of its field: see test_kube_schema.py.
ONE_OF = {
    ("Container", "imagePullPolicy"): "Always Never IfNotPresent",
    ("PodSpec", "restartPolicy"): "Always OnFailure Never",
    ("PodStatus", "phase"): "Pending Running Succeeded Failed Unknown",
    ("NodeCondition", "status"): "True False Unknown",
    ("NodeSelectorRequirement", "operator"): "In NotIn Exists DoesNotExist Gt Lt",
    ("Toleration", "operator"): "Exists Equal",
    ("Toleration", "effect"): "NoSchedule PreferNoSchedule NoExecute",
    ("SeccompProfile", "type"): "Localhost RuntimeDefault Unconfined",
    ("DaemonSetUpdateStrategy", "type"): "RollingUpdate OnDelete",
    ("Status", "status"): "Success Failure",
}
# Attributes whose text has a format of its own: labels and selectors have keys and values, annotations keys.
_FORMATS = {
    ("ObjectMeta", "name"): _SUBDOMAIN,
    ("ObjectMeta", "namespace"): _DNS_LABEL,
    ("Container", "name"): _DNS_LABEL,
    ("Volume", "name"): _DNS_LABEL,
    ("NodeSelectorRequirement", "key"): _KEY,
}
_KEYS = {"labels", "annotations", "nodeSelector", "matchLabels"}
_VALUES = _KEYS - {"annotations"}
# A description of the kubelet's proxy is in OpenAPI by verb CONNECT alone, which the package leaves out.
_PROXY = {"nodes/proxy": ("Node", False, {"create", "delete", "get", "patch", "update"})}
_VERBS = {"post": "create", "put": "update"}


@dataclass(frozen=True)
class Attribute:
    """`type` as the package writes it, without Optional: str, List[Container], meta_v1.Time, dict..."""

    type: str
    required: bool


@dataclass(frozen=True)
class Model:
    """A definition of OpenAPI: `module` as core_v1; `sets` are the apiVersion and kind of a top-level object."""

    module: str
    name: str
    attributes: Mapping[str, Attribute]
    sets: Mapping[str, str]
    description: str


@dataclass(frozen=True)
class Resource:
    """What an API server serves at `plural` ("pods", or "pods/log"), with the verbs of RBAC."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool
    verbs: frozenset[str]


@dataclass
class _Module:
    models: dict[str, Model] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # Quantity = str


def _source(path: str) -> ast.Module:
    files = importlib.metadata.files(PACKAGE) or []
    found = [one for one in files if str(one) == f"lightkube/{path}.py"]
    if not found:
        raise LookupError(f"Kubernetes has no {path}")
    return ast.parse(Path(str(found[0].locate())).read_text())


@functools.cache
def _module(name: str) -> _Module:
    made = _Module()
    for node in _source(f"models/{name}").body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            made.aliases[node.targets[0].id] = ast.unparse(node.value)
        elif isinstance(node, ast.ClassDef):
            made.models[node.name] = _model(name, node)
    return made


def _model(module: str, node: ast.ClassDef) -> Model:
    attributes, sets = {}, {}
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            assert isinstance(one.annotation, ast.Constant)
            text = str(one.annotation.value)
            optional = text.startswith("Optional[")
            attributes[one.target.id] = Attribute(text[9:-1] if optional else text, not optional)
        elif isinstance(one, ast.FunctionDef) and one.name == "__post_init__":
            for line in one.body:
                if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Attribute):
                    sets[line.targets[0].attr] = str(ast.literal_eval(line.value))
    return Model(module, node.name, attributes, sets, ast.get_docstring(node) or "")


def model(api_version: str, kind: str) -> Model:
    """The model of a top-level object. Raises LookupError when Kubernetes has none of that name."""
    group, _, version = api_version.rpartition("/")
    names = [f"{group.partition('.')[0] or 'core'}_{version}", "meta_v1"]
    for module in names:
        try:
            found = _module(module).models.get(kind)
        except LookupError:
            continue
        if found is not None and found.sets.get("apiVersion", api_version) == api_version:
            return found
    raise LookupError(f"Kubernetes has no {kind} of {api_version}")


@functools.cache
def resources(group: str, version: str) -> tuple[Resource, ...]:
    """What the published API has in a group ("" for the core)."""
    found: dict[str, Resource] = {}
    if not group:
        found = {k: Resource("", "v1", kind, k, ns, frozenset(v)) for k, (kind, ns, v) in _PROXY.items()}
    file = group.removesuffix(".k8s.io").replace(".", "_") or "core"
    for node in _source(f"resources/{file}_{version}").body:
        if not isinstance(node, ast.ClassDef):
            continue
        call = next(one.value for one in node.body if isinstance(one, ast.Assign))
        assert isinstance(call, ast.Call)
        said = {one.arg: one.value for one in call.keywords}
        its_group, its_version, kind = (ast.literal_eval(one) for one in _arguments(said["resource"]))
        plural = ast.literal_eval(said["plural"])
        if "action" in said:
            plural += f"/{ast.literal_eval(said['action'])}"
        verbs = {_VERBS.get(verb, verb) for verb in ast.literal_eval(said["verbs"]) if "global" not in verb}
        namespaced = "Namespaced" in ast.unparse(node.bases[0])
        found[plural] = Resource(its_group, its_version, kind, plural, namespaced, frozenset(verbs))
    return tuple(found.values())


def _arguments(node: ast.expr) -> list[ast.expr]:
    assert isinstance(node, ast.Call)
    return node.args


def part(module: str, name: str) -> Model | None:
    """A model by its name in a module, such as PodSpec of core_v1."""
    return _module(module).models.get(name)


def problems(value: Any, *, partial: bool = False) -> list[str]:
    """What a server would refuse of a top-level object; with `partial`, of a patch, nothing is lacking."""
    try:
        found = model(str(value["apiVersion"]), str(value["kind"]))
    except (LookupError, TypeError) as e:
        return [f"no object of Kubernetes: {e}"]
    return list(_check(found, value, found.name, partial))


def problems_of(kind: str, value: Any, *, module: str = "core_v1", partial: bool = False) -> list[str]:
    """The same for a part of one, such as PodSpec."""
    return list(_check(_module(module).models[kind], value, kind, partial))


def _check(of: Model, value: Any, where: str, partial: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} is no object: {value!r:.80}"
        return
    for key, one in value.items():
        if key not in of.attributes:
            yield f"{where}.{key}: unknown field"
        elif key in of.sets and one != of.sets[key]:
            yield f"{where}.{key}: {one!r:.80} is not {of.sets[key]}"
        elif one is None:
            if not partial:
                yield f"{where}.{key} is null"
        else:
            yield from _check_type(of.module, of.attributes[key].type, one, f"{where}.{key}", partial)
            yield from _check_prose(of, key, one, f"{where}.{key}")
    if not partial:
        lacking = [key for key, one in of.attributes.items() if one.required and key not in value]
        yield from (f"{where}.{key}: required" for key in lacking)


_SIMPLE: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}


def _check_type(module: str, text: str, value: Any, where: str, partial: bool) -> Iterator[str]:
    if text.startswith("List["):
        if not isinstance(value, list):
            yield f"{where} is no list: {value!r:.80}"
            return
        for n, one in enumerate(value):
            yield from _check_type(module, text[5:-1], one, f"{where}[{n}]", False)
    elif text in _SIMPLE:
        if not isinstance(value, _SIMPLE[text]) or (isinstance(value, bool) and text != "bool"):
            yield f"{where} is no {text}: {value!r:.80}"
    elif text == "dict":
        strings = isinstance(value, dict) and all(
            isinstance(key, str) and (isinstance(one, str) or (partial and one is None))
            for key, one in value.items()
        )
        if not strings:
            yield f"{where} is no map of strings: {value!r:.80}"
    else:
        there, _, name = text.rpartition(".")
        there = there or module
        if name in _module(there).aliases:
            yield from _check_alias(name, value, where)
        else:
            yield from _check(_module(there).models[name], value, where, partial)


def _check_alias(name: str, value: Any, where: str) -> Iterator[str]:
    forms = {"Quantity": _QUANTITY, "Time": _TIME, "MicroTime": _TIME}
    if name in forms:
        ok = isinstance(value, str) and forms[name].fullmatch(value) is not None
    elif name == "IntOrString":
        ok = isinstance(value, int | str) and not isinstance(value, bool)
    else:
        ok = isinstance(value, dict)
    if not ok:
        yield f"{where} is no {name}: {value!r:.80}"


def _check_prose(of: Model, key: str, value: Any, where: str) -> Iterator[str]:
    """What is published in descriptions only."""
    if (of.name, key) in ONE_OF and value not in ONE_OF[of.name, key].split():
        yield f"{where}: {value!r:.80} is none of {ONE_OF[of.name, key]}"
    form = _FORMATS.get((of.name, key))
    if form is not None and not form.fullmatch(str(value)):
        yield f"{where}: {value!r:.80} is not a valid name"
    if key in _KEYS and isinstance(value, dict):
        yield from (f"{where}: {one!r} is no valid key" for one in value if not _KEY.fullmatch(str(one)))
    if key in _VALUES and isinstance(value, dict):
        bad = [one for one in value.values() if one is not None and not _VALUE.fullmatch(str(one))]
        yield from (f"{where}: {one!r} is no valid value" for one in bad)
    if key in ("limits", "requests", "capacity", "allocatable") and isinstance(value, dict):
        bad = [one for one in value.values() if not _QUANTITY.fullmatch(str(one))]
        yield from (f"{where}: {one!r} is no quantity" for one in bad)


def completed(api_version: str, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """An object with what is `given` and, for everything that is required besides, the least that is valid."""
    of = model(api_version, kind)
    return _complete(of, {"apiVersion": api_version, "kind": kind, **given})


def completed_part(module: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The same for what is no object of a server by itself, such as version.Info."""
    return _complete(_module(module).models[name], given)


def _complete(of: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(given)
    for key, attribute in of.attributes.items():
        if key in made or attribute.required:
            made[key] = _least(of, key, attribute.type, made.get(key))
    return made


def _least(of: Model, key: str, text: str, given: Any) -> Any:
    if text.startswith("List["):
        return [_least(of, key, text[5:-1], one) for one in given or []]
    there, _, name = text.rpartition(".")
    found = _module(there or of.module).models.get(name) if name[:1].isupper() else None
    if found is not None:
        return _complete(found, given or {})
    if given is not None:
        return given
    if (of.name, key) in ONE_OF:
        return ONE_OF[of.name, key].split()[0]
    return {"str": key.lower(), "int": 0, "bool": False, "float": 0, "dict": {}, "IntOrString": 0,
            "Quantity": "0", "Time": "2026-01-01T00:00:00Z"}[name]  # fmt: skip
