# SPDX-License-Identifier: Apache-2.0
"""What an archive's configuration may ask of this node."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryoci.errors import ImageError, RestoreError
from cryoci.shim import untrusted

NAMESPACES = [{"type": t} for t in ("pid", "network", "ipc", "uts", "mount")]
PLAIN: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "process": {"args": ["sh"], "cwd": "/"},
    "root": {"path": "rootfs"},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
    ],
    "linux": {"namespaces": NAMESPACES, "resources": {"memory": {"limit": 1 << 30}}},
}
CONFIG: dict[str, Any] = {"id": "ab" * 32, "name": "web", "spec": PLAIN, "rootfsImageID": "cd" * 32}


def spec(**changes: Any) -> dict[str, Any]:
    made = copy.deepcopy(PLAIN)
    for key, value in changes.items():
        made["linux" if key == "linux" else key] = {**made["linux"], **value} if key == "linux" else value
    return made


def mount(**fields: Any) -> dict[str, Any]:
    return {"destination": "/data", "type": "bind", "source": "/etc", **fields}


def test_a_plain_spec_stays_and_the_original_is_untouched() -> None:
    given_spec = spec()
    clean = untrusted.spec(given_spec)
    assert clean == {**PLAIN, "annotations": {}}
    clean["process"]["args"].append("x")
    assert given_spec == PLAIN


def test_what_is_not_the_containers_is_dropped() -> None:
    asked = spec(
        hooks={"prestart": [{"path": "/bin/evil"}]},
        vm={},
        windows={},
        annotations={
            "io.container.manager": "libpod",
            "org.criu.config": "/etc/evil",
            "run.oci.hooks.stdout": "/etc/passwd",
            "org.opencontainers.image.stopSignal": 9,
        },
        linux={"intelRdt": {"closID": "x"}, "mountLabel": "x"},
    )
    clean = untrusted.spec(asked)
    assert not {"hooks", "vm", "windows"} & clean.keys()
    assert clean["annotations"] == {"io.container.manager": "libpod"}
    assert clean["linux"].keys() == {"namespaces", "resources", "mountLabel"}


@pytest.mark.parametrize(
    ("asked", "kind", "detail"),
    [
        (spec(mounts=[mount()]), "mounts", "/etc on /data"),
        (spec(mounts=[mount(type="none", options=["bind"])]), "mounts", "/etc on /data"),
        (spec(mounts=[mount(type="tmpfs", options=["rbind"])]), "mounts", "/etc on /data"),
        (spec(mounts=[mount(type="tmpfs", options=[" bind"])]), "mounts", "/etc on /data"),
        (spec(mounts=[mount(type="ext4", source="/dev/sda1")]), "mounts", "/dev/sda1 on /data"),
        (spec(mounts=[mount(type="overlay")]), "mounts", "/etc on /data"),
        (spec(mounts=[{"destination": "/data", "source": "/etc"}]), "mounts", "/etc on /data"),
        (spec(linux={"devices": [{"path": "/dev/sda", "type": "b"}]}), "devices", "/dev/sda"),
        (spec(linux={"devices": "all"}), "devices", "?"),
        (spec(linux={"namespaces": NAMESPACES[1:]}), "host-namespaces", "pid"),
        (
            spec(linux={"namespaces": []}),
            "host-namespaces",
            "pid, network, ipc, uts, mount",
        ),
    ],
)
def test_refused_unless_allowed(asked: dict[str, Any], kind: str, detail: str) -> None:
    with pytest.raises(RestoreError) as caught:
        untrusted.spec(asked)
    assert f"{kind}: {detail}" in caught.value.message
    assert caught.value.hint == f"if you trust where it comes from, add: --allow {kind}"
    clean = untrusted.spec(asked, allow=[kind])
    assert clean["mounts"] == asked["mounts"]


def test_all_that_is_refused_is_said_at_once() -> None:
    asked = spec(mounts=[mount()], linux={"devices": [{"path": "/dev/x"}], "namespaces": NAMESPACES[1:]})
    with pytest.raises(RestoreError) as caught:
        untrusted.spec(asked)
    assert str(caught.value.hint).endswith("--allow devices --allow host-namespaces --allow mounts")
    with pytest.raises(RestoreError) as caught:
        untrusted.spec(asked, allow=["devices", "mounts"])
    assert str(caught.value.hint).endswith("add: --allow host-namespaces")


def test_a_namespace_is_the_containers_own() -> None:
    joined = [{"type": "network", "path": "/proc/1/ns/net"}, *NAMESPACES[:1], *NAMESPACES[2:]]
    clean = untrusted.spec(spec(linux={"namespaces": joined}))
    assert all(namespace.keys() == {"type"} for namespace in clean["linux"]["namespaces"])


def test_permissions_for_devices_are_taken_away() -> None:
    rules = {"devices": [{"allow": True, "access": "rwm"}], "pids": {"limit": 9}}
    deny = [{"allow": False, "access": "rwm"}]
    assert untrusted.spec(spec(linux={"resources": rules}))["linux"]["resources"] == {
        "devices": deny,
        "pids": {"limit": 9},
    }
    allowed = untrusted.spec(spec(linux={"resources": rules}), allow=["devices"])
    assert allowed["linux"]["resources"] == rules


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"process": []},
        spec(mounts={"a": 1}),
        spec(mounts=["x"]),
        spec(mounts=[{"type": "proc"}]),
        spec(mounts=[{"destination": ["/x"], "type": "proc"}]),
        spec(mounts=[{"destination": "/x", "type": ["proc"]}]),
        spec(mounts=[{"destination": "/x", "type": "proc", "options": 5}]),
        spec(mounts=[{"destination": "/x", "type": "proc", "options": [5]}]),
        spec(root="rootfs"),
        spec(annotations=["x"]),
        {**PLAIN, "linux": "x"},
        spec(linux={"namespaces": {"pid": 1}}),
        spec(linux={"namespaces": ["pid"]}),
        spec(linux={"resources": ["x"]}),
    ],
    ids=range(17),
)
def test_no_spec(value: Any) -> None:
    with pytest.raises(ImageError):
        untrusted.spec(value)


def test_nested_too_deeply() -> None:
    deep: Any = []
    for _ in range(20000):
        deep = [deep]
    with pytest.raises(ImageError, match="nested too deeply"):
        untrusted.spec(spec(process={"args": deep}))


# -- podman


def config(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONFIG), **changes}


def test_a_plain_config_stays() -> None:
    assert untrusted.podman_config(CONFIG) == {**CONFIG, "spec": {**PLAIN, "annotations": {}}}


@pytest.mark.parametrize(
    "key",
    "exitCommand conmonPidFile pid_file logPath secretsPath overlayVolumes imageVolumes secrets ctrNetNS "
    "healthLogDestination baseHostsFile chroot_directories netNsCtrPath preCheckpoint".split(),
)
def test_what_names_the_host_is_dropped(key: str) -> None:
    assert key not in untrusted.podman_config(config(**{key: ["/etc/evil"]}))


def test_privileged() -> None:
    with pytest.raises(RestoreError, match="privileged"):
        untrusted.podman_config(config(privileged=True))
    assert untrusted.podman_config(config(privileged=True), allow=["privileged"])["privileged"] is True


def test_a_root_directory_of_the_host_is_never_allowed() -> None:
    with pytest.raises(RestoreError) as caught:
        untrusted.podman_config(config(rootfs="/"), allow=untrusted.ALLOWABLE)
    assert caught.value.hint == "it cannot be restored by cryoci"


@pytest.mark.parametrize("destination", sorted(untrusted.PODMAN_MADE))
def test_podman_makes_these_itself(destination: str) -> None:
    made = untrusted.podman_config(config(spec=spec(mounts=[mount(destination=destination)])))
    assert made["spec"]["mounts"][0]["destination"] == destination
    with pytest.raises(RestoreError):
        untrusted.podman_config(config(spec=spec(mounts=[mount(destination=destination + "/../..")])))


def test_a_volume_cannot_smuggle_a_host_directory_in() -> None:
    """podman keeps the mount of a named volume as it stands in the spec, whatever its source is."""
    asked = config(
        spec=spec(mounts=[mount(destination="/data", source="/etc")]),
        namedVolumes=[{"volumeName": "data", "dest": "/data"}],
    )
    made = untrusted.podman_config(asked, volumes="/var/vol")
    assert made["spec"]["mounts"][0]["source"] == "/var/vol/data/_data"


@pytest.mark.parametrize(
    "volume",
    [
        {},
        {"volumeName": "data"},
        {"volumeName": "../../etc", "dest": "/data"},
        {"volumeName": "", "dest": "/data"},
        {"volumeName": "-x", "dest": "/data"},
        {"volumeName": "a/b", "dest": "/data"},
        {"volumeName": "a\n", "dest": "/data"},
        {"volumeName": 5, "dest": "/data"},
        {"volumeName": "data", "dest": 5},
        "data",
    ],
    ids=range(10),
)
def test_no_volume(volume: Any) -> None:
    with pytest.raises(ImageError):
        untrusted.podman_config(config(namedVolumes=[volume]))


def test_part_of_a_volume() -> None:
    with pytest.raises(RestoreError, match="directory inside"):
        untrusted.podman_config(
            config(namedVolumes=[{"volumeName": "v", "dest": "/d", "subPath": "../../../etc"}])
        )


@pytest.mark.parametrize("value", [None, [], {}, {"spec": None}, {"spec": {}}, config(namedVolumes="x")])
def test_no_config(value: Any) -> None:
    with pytest.raises(ImageError):
        untrusted.podman_config(value)


# -- anything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
WORD = st.sampled_from(
    ["proc", "tmpfs", "bind", "rbind", "overlay", "none", "cgroup", "/data", "/dev/shm", ""]
)
MOUNT = st.fixed_dictionaries(
    {},
    optional={
        "destination": WORD | JSON,
        "type": WORD | JSON,
        "source": WORD | JSON,
        "options": st.lists(WORD | JSON, max_size=3) | JSON,
    },
)
NAMESPACE = st.sampled_from([*NAMESPACES, {"type": "user"}, {"type": "network", "path": "/x"}]) | JSON
SPEC = st.fixed_dictionaries(
    {"process": st.just({}) | JSON},
    optional={
        "mounts": st.lists(MOUNT | JSON, max_size=3) | JSON,
        "hooks": JSON,
        "root": JSON,
        "annotations": st.dictionaries(
            st.sampled_from(["io.container.manager", "org.criu.config"]), st.text(max_size=3) | JSON
        )
        | JSON,
        "linux": st.fixed_dictionaries(
            {},
            optional={
                "namespaces": st.just(NAMESPACES) | st.lists(NAMESPACE, max_size=6) | JSON,
                "devices": JSON,
                "resources": st.fixed_dictionaries({}, optional={"devices": JSON}) | JSON,
            },
        )
        | JSON,
    },
)
ALLOW = st.sets(st.sampled_from(untrusted.ALLOWABLE))


def obeys(clean: dict[str, Any], made_here: set[str], allow: set[str]) -> None:
    assert not clean.keys() & {"hooks", "vm", "windows", "solaris"}
    for one in clean["mounts"]:
        host = one.get("type") not in ("proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2")
        host = host or bool({"bind", "rbind"} & set(one.get("options") or []))
        assert "mounts" in allow or one["destination"] in made_here or not host
    linux = clean["linux"]
    assert "devices" in allow or "devices" not in linux
    assert "devices" in allow or not any(rule["allow"] for rule in linux["resources"].get("devices", []))
    assert all(namespace.keys() == {"type"} for namespace in linux["namespaces"])
    types = {namespace["type"] for namespace in linux["namespaces"]}
    assert "host-namespaces" in allow or types >= {"pid", "network", "ipc", "uts", "mount"}
    assert set(clean["annotations"]) <= {
        "io.container.manager",
        "org.opencontainers.image.stopSignal",
        "org.systemd.property.KillSignal",
        "org.systemd.property.TimeoutStopUSec",
    }
    assert all(isinstance(text, str) for text in clean["annotations"].values())


@settings(max_examples=300, deadline=None)
@given(SPEC | JSON, ALLOW)
def test_any_spec(value: Any, allow: set[str]) -> None:
    try:
        clean = untrusted.spec(value, allow=allow)
    except (ImageError, RestoreError):
        return
    obeys(clean, set(), allow)


@settings(max_examples=200, deadline=None)
@given(
    SPEC | JSON,
    st.dictionaries(st.sampled_from(["namedVolumes", "rootfs", "privileged", "exitCommand", "id"]), JSON)
    | st.fixed_dictionaries(
        {"namedVolumes": st.lists(st.fixed_dictionaries({"volumeName": WORD | JSON, "dest": WORD | JSON}))}
    ),
    ALLOW,
)
def test_any_config(inner: Any, more: dict[str, Any], allow: set[str]) -> None:
    try:
        clean = untrusted.podman_config({**more, "spec": inner}, volumes="/V", allow=allow)
    except (ImageError, RestoreError):
        return
    named = {volume["dest"] for volume in clean.get("namedVolumes") or []}
    obeys(clean["spec"], {*untrusted.PODMAN_MADE, *named}, allow)
    assert "exitCommand" not in clean and "rootfs" not in clean
    for one in clean["spec"]["mounts"]:
        if one["destination"] in named:
            assert one["source"].startswith("/V/") and ".." not in one["source"]
