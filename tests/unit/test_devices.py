# SPDX-License-Identifier: Apache-2.0
"""CDI specifications: checked, found, asked for, applied; and re-resolved for another node."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConfigError, CryociError, NotFoundError, UnsupportedError, UsageError
from cryoci.shim import bundle
from cryoci.shim.devices import cdi, drop, edits, inject, request
from cryoci.shim.devices.options import DeviceOptions
from tests.unit.fake_runtime import FakeNode
from tests.unit.test_launcher_imports import added

KIND = "nvidia.com/gpu"
LIB = "/usr/lib/x86_64-linux-gnu"


def node(path: str, minor: int, **more: Any) -> dict[str, Any]:
    return {"path": path, "type": "c", "major": 195, "minor": minor, "fileMode": 0o666, **more}


def specification(
    *gpus: int, version: str = "580.1", kind: str = KIND, source: str = "/dev/null"
) -> dict[str, Any]:
    """What a node with /dev/nvidiaN for `gpus` and a driver of `version` says, `all` included."""
    devices = [
        {"name": str(n), "containerEdits": {"deviceNodes": [node(f"/dev/nvidia{n}", n)]}} for n in gpus
    ]
    devices += [
        {"name": f"GPU-{n}", "containerEdits": {"deviceNodes": [node(f"/dev/nvidia{n}", n)]}} for n in gpus
    ]
    every = {"deviceNodes": [node(f"/dev/nvidia{n}", n) for n in gpus]}
    devices.append({"name": "all", "containerEdits": every})
    return {
        "cdiVersion": "0.6.0",
        "kind": kind,
        "devices": devices,
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [node("/dev/nvidiactl", 255)],
            "mounts": [
                {"hostPath": source, "containerPath": f"{LIB}/libcuda.so.{version}", "options": ["ro"]},
                {"hostPath": source, "containerPath": f"/lib/firmware/nvidia/{version}/gsp_ga10x.bin"},
            ],
            "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": ["x"]}],
        },
    }


def here(tmp_path: Path, *specs: dict[str, Any]) -> DeviceOptions:
    for number, spec in enumerate(specs):
        (tmp_path / f"{number}.json").write_text(json.dumps(spec))
    return DeviceOptions(cdi_directories=(str(tmp_path),))


def container(**annotations: str) -> dict[str, Any]:
    return {
        "process": {"env": ["PATH=/bin", "A=1"], "user": {"uid": 0, "gid": 0}},
        "annotations": annotations,
        "mounts": [{"destination": "/proc", "type": "proc"}, {"destination": "/dev", "type": "tmpfs"}],
        "linux": {"resources": {"devices": [{"allow": False, "access": "rwm"}]}},
    }


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cdiVersion": "9.0.0"}, "cdiVersion"), ({"cdiVersion": None}, "cdiVersion"), ({"kind": "gpu"}, "kind"),
        ({"kind": "a/b/c"}, "kind"), ({"devices": []}, "no devices"), ({"extra": 1}, "extra"),
        ({"devices": [{"name": "a b", "containerEdits": {"env": ["A=1"]}}]}, "a b"),
        ({"devices": [{"name": "a", "containerEdits": {}}]}, "no containerEdits"),
        ({"devices": [{"name": "a", "containerEdits": {"env": ["A"]}}]}, "NAME=VALUE"),
        ({"devices": [{"name": "a", "containerEdits": {"env": ["A=1"]}}] * 2}, "twice"),
        ({"devices": [{"name": "a", "containerEdits": {"deviceNodes": [{"path": "dev"}]}}]}, "absolute"),
        ({"devices": [{"name": "a", "containerEdits": {"deviceNodes": [{"path": "/dev/../x"}]}}]}, "absolute"),
        ({"devices": [{"name": "a", "containerEdits": {"deviceNodes": [{"path": "/d", "type": "x"}]}}]}, "type"),
        ({"devices": [{"name": "a", "containerEdits": {"deviceNodes": [{"path": "/d", "permissions": "z"}]}}]}, "rwm"),
        ({"devices": [{"name": "a", "containerEdits": {"deviceNodes": [{"path": "/d", "minor": -1}]}}]}, "minor"),
        ({"devices": [{"name": "a", "containerEdits": {"mounts": [{"containerPath": "/x"}]}}]}, "hostPath"),
        ({"devices": [{"name": "a", "containerEdits": {"hooks": [{"hookName": "no", "path": "/x"}]}}]}, "hookName"),
        ({"devices": [{"name": "a", "containerEdits": {"additionalGids": ["x"]}}]}, "additionalGids"),
        ({"containerEdits": {"what": []}}, "what"), ({"containerEdits": []}, "object"),
    ],
)  # fmt: skip
def test_a_wrong_specification_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    value = {**specification(0), **change}
    if change.get("containerEdits") == []:
        value["containerEdits"] = [1]
    with pytest.raises(ConfigError, match=field):
        cdi.check(value, "/etc/cdi/x.json")


def test_later_directories_count_and_conflicts_are_named(tmp_path: Path) -> None:
    etc, run = tmp_path / "etc", tmp_path / "run"
    etc.mkdir()
    run.mkdir()
    (etc / "a.json").write_text(json.dumps(specification(0)))
    (etc / "b.yaml").write_text(
        "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: 0\n  containerEdits: {env: [A=b]}\n"
    )
    (etc / "broken.json").write_text("{")
    (etc / "ignored.txt").write_text("{")
    registry = cdi.Registry((str(etc), str(run)))
    with pytest.raises(ConfigError, match=r"both .*/a\.json and .*/b\.yaml"):
        registry.resolve([f"{KIND}=0"])
    assert [d.name for d in registry.resolve([f"{KIND}=all", f"{KIND}=all"])] == ["all"]
    with pytest.raises(NotFoundError, match=r"no CDI device nvidia.com/gpu=7 .*broken\.json"):
        registry.resolve([f"{KIND}=7"])
    (run / "c.json").write_text(json.dumps(specification(0)))
    registry = cdi.Registry((str(etc), str(run)))
    assert registry.resolve([f"{KIND}=0"])[0].source == f"{run}/c.json"


ENV = "NVIDIA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("annotations", "env", "environment", "names"),
    [
        ({}, [], True, []),
        ({"io.cryoci.gpus": "1"}, [], False, ["1"]),
        ({"io.cryoci.gpus": "0, 1"}, [], False, ["0", "1"]),
        ({"io.cryoci.gpus": "all"}, [], False, ["all"]),
        ({"io.cryoci.gpus": "none"}, [f"{ENV}=all"], True, []),
        ({"io.cryoci.gpus": "GPU-1"}, [], False, ["GPU-1"]),
        ({"io.cryoci.gpus": f"{KIND}=0"}, [], False, ["0"]),
        ({"cdi.k8s.io/x": f"{KIND}=0,{KIND}=1"}, [f"{ENV}=all"], True, ["0", "1"]),
        ({}, [f"{ENV}=all"], False, []),
        ({}, [f"{ENV}=all"], True, ["all"]),
        ({}, [f"{ENV}=all", f"{ENV}=1"], True, ["1"]),
        ({}, [f"{ENV}=void"], True, []),
        ({}, [f"{ENV}=none"], True, []),
        ({}, [f"{ENV}="], True, []),
        ({"io.cryoci.gpus": "MIG-5"}, [], False, UnsupportedError),
        ({"io.cryoci.gpus": "0:1"}, [], False, UnsupportedError),
        ({"cdi.k8s.io/x": "gpu0"}, [], False, UsageError),
        ({"io.cryoci.gpus": "9"}, [], False, NotFoundError),
    ],
)  # fmt: skip
def test_what_a_container_asks_for(
    tmp_path: Path, annotations: dict[str, str], env: list[str], environment: bool, names: Any
) -> None:
    options = here(tmp_path, specification(0, 1))
    options = DeviceOptions(environment=environment, cdi_directories=options.cdi_directories)
    spec = container(**annotations)
    spec["process"]["env"] += env
    if isinstance(names, list):
        done = inject.on_create(spec, options)
        assert (done["names"] if done else []) == [f"{KIND}={n}" for n in names]
    else:
        with pytest.raises(names):
            inject.on_create(spec, options)


def test_edits_are_those_of_the_specification(tmp_path: Path) -> None:
    options = here(tmp_path, specification(0, 1))
    spec = container(**{"io.cryoci.gpus": "0,1"})
    spec["process"]["user"] = {"uid": 7, "gid": 8}
    spec["process"]["env"].append(f"{ENV}=0,1")
    spec["linux"]["devices"] = [node("/dev/nvidia0", 99)]
    done = inject.on_create(spec, options)
    assert done
    assert [d["path"] for d in spec["linux"]["devices"]] == [
        "/dev/nvidiactl",
        "/dev/nvidia0",
        "/dev/nvidia1",
    ]
    assert spec["linux"]["devices"][1] == node("/dev/nvidia0", 0, uid=7, gid=8)
    assert spec["linux"]["resources"]["devices"][1:] == [
        {"allow": True, "type": "c", "major": 195, "minor": n, "access": "rwm"} for n in (255, 0, 1)
    ]
    assert spec["process"]["env"] == ["PATH=/bin", "A=1", f"{ENV}=void"]
    assert spec["hooks"] == {"createContainer": [{"path": "/usr/bin/nvidia-cdi-hook", "args": ["x"]}]}
    depth = [m["destination"].count("/") for m in spec["mounts"]]
    assert depth == sorted(depth) and len(depth) == 4
    assert done["mounts"][0] == {"destination": f"{LIB}/libcuda.so.580.1", "source": "/dev/null"}
    again = copy.deepcopy(spec)
    assert inject.on_create(spec, options)
    assert spec == again  # the engine, or an earlier call, has put all of it in


def test_missing_numbers_come_from_the_host_and_refusals_say_why(tmp_path: Path) -> None:
    def apply(**own: Any) -> dict[str, Any]:
        value = {**specification(0), "containerEdits": {}, "devices": [{"name": "x", "containerEdits": own}]}
        spec = container()
        edits.apply(spec, cdi.check(value, "/etc/cdi/x.json"))
        return spec

    made = apply(deviceNodes=[{"path": "/dev/mine", "hostPath": "/dev/zero", "permissions": "r"}])["linux"]
    mode = os.stat("/dev/zero").st_mode & 0o7777
    assert made["devices"] == [{"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": mode}]
    assert made["resources"]["devices"][-1]["access"] == "r"
    assert apply(additionalGids=[0, 44, 44])["process"]["user"]["additionalGids"] == [44]
    for own, kind, what in (
        ({"deviceNodes": [{"path": "/dev/none"}]}, NotFoundError, "/dev/none"),
        ({"deviceNodes": [{"path": "/etc/passwd"}]}, NotFoundError, "not a device"),
        ({"mounts": [{"hostPath": "/no/such", "containerPath": "/x"}]}, NotFoundError, "/no/such"),
        ({"intelRdt": {"closID": "a"}}, UnsupportedError, "intelRdt"),
        ({"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}, UnsupportedError, "netDevices"),
    ):
        with pytest.raises(kind, match=what):
            apply(**own)


def on_node(tmp_path: Path, gpus: tuple[int, ...], version: str) -> DeviceOptions:
    place = tmp_path / version
    place.mkdir()
    return here(place, specification(*gpus, version=version))


def images(tmp_path: Path, **files: Any) -> str:
    top = tmp_path / "cp" / "checkpoint"
    top.mkdir(parents=True)
    for name, value in files.items():
        where = {
            "facts": top / inject.FACTS,
            "dump": top / inject.GPU_DUMP,
            "spec": top.parent / "spec.dump",
        }[name]
        where.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(top)


@pytest.mark.parametrize("source", ["facts", "dump", "spec", "bundle"])
def test_a_restore_gets_this_nodes_gpu_in_the_places_of_the_old(tmp_path: Path, source: str) -> None:
    old = container(**{"io.cryoci.gpus": "1"})
    done = inject.on_create(old, on_node(tmp_path, (0, 1), "580.1"))
    facts = {"devices": done}
    spec = old if source == "bundle" else container()  # CRI-O drops them, podman keeps the old ones
    path = {
        "facts": lambda: images(tmp_path, facts=facts),
        "dump": lambda: images(
            tmp_path, facts=facts, dump={"devices": [f"{KIND}=1"], "gpus": [{"uuid": "u"}]}
        ),
        "spec": lambda: images(tmp_path, spec=old),
        "bundle": lambda: images(tmp_path),
    }[source]()
    spec = copy.deepcopy(spec)
    after = inject.on_restore(spec, path, on_node(tmp_path, (3, 4), "580.2.7"))
    assert after and after["names"] == [f"{KIND}=3"]
    assert [d["path"] for d in spec["linux"]["devices"]] == ["/dev/nvidiactl", "/dev/nvidia3"]
    assert after["stale"] == ["/dev/nvidia1"]
    rules = spec["linux"]["resources"]["devices"]
    assert [(r["major"], r["minor"]) for r in rules[1:]] == [(195, 255), (195, 3)]
    assert {m["destination"] for m in spec["mounts"]} == {
        "/proc", "/dev", f"{LIB}/libcuda.so.580.1", "/lib/firmware/nvidia/580.1/gsp_ga10x.bin",
    }  # fmt: skip
    assert "hooks" not in spec


@pytest.mark.parametrize(
    ("asked", "names", "count", "result"),
    [
        ([], (f"{KIND}=1",), 1, ["1"]),  # the same name is here
        ([], (f"{KIND}=7",), 1, ["0"]),
        ([], ("nvidia.com/gpu=GPU-77", f"{KIND}=GPU-78"), 2, ["0", "1"]),
        ([], (f"{KIND}=all",), 2, ["0", "1"]),
        ([], (f"{KIND}=all",), 3, ["all"]),
        ([], (), 2, ["0", "1"]),
        (["2"], (f"{KIND}=0",), 1, ["2"]),
        (["0", "1"], (f"{KIND}=2",), 1, ["2"]),  # the bundle asks for another number than was checkpointed
        ([], (f"{KIND}=all",), 4, NotFoundError),
        ([], ("evil.com/disk=0",), 0, NotFoundError),  # kinds that a checkpoint may not ask for
    ],
)  # fmt: skip
def test_which_gpus_a_restore_gets(
    tmp_path: Path, asked: list[str], names: tuple[str, ...], count: int, result: Any
) -> None:
    evil = {**specification(0, kind="evil.com/disk"), "containerEdits": {}}
    options = here(tmp_path, specification(0, 1, 2), evil)
    registry = inject.registry(options)
    if isinstance(result, list):
        assert [d.name for d in inject.choose(registry, asked, names, count, options.kinds)] == result
    else:
        with pytest.raises(result):
            inject.choose(registry, asked, names, count, options.kinds)


@pytest.mark.parametrize(
    ("paths", "count", "names"),
    [({"/dev/nvidia2", "/dev/nvidiactl"}, 1, ["2"]), ({"/dev/nvidia1", "/dev/nvidia2"}, 2, ["1", "2"]),
     ({"/dev/nvidia2"}, 2, ["0", "1"]), ({"/dev/nvidia9"}, 1, ["0"])],
)  # fmt: skip
def test_the_share_that_an_engine_has_given_counts(
    tmp_path: Path, paths: set[str], count: int, names: list[str]
) -> None:
    """containerd puts the new pod's devices into the bundle before it restores."""
    options = here(tmp_path, specification(0, 1, 2))
    registry = inject.registry(options)
    found = inject.choose(registry, [], (f"{KIND}=all",), count, options.kinds, frozenset(paths))
    assert [d.name for d in found] == names


@pytest.mark.parametrize(
    ("text", "name"),
    [("auto", "0"), ("", "0"), ("GPU-9=GPU-2", "GPU-2"), ("0=1", "0"), ("GPU-9=GPU-7", "0")],
)
def test_the_operators_map_names_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str
) -> None:
    options = here(tmp_path, specification(0, 1, 2))
    path = images(tmp_path, dump={"devices": [f"{KIND}=0"], "gpus": [{"uuid": "GPU-9"}]})
    for spec in (container(**{"io.cryoci.device-map": text}), container()):
        done = inject.on_restore(spec, path, options)
        assert done and done["names"] == [f"{KIND}={name}"]
        monkeypatch.setenv("CRYOCI_DEVICE_MAP", text)


def test_places_that_this_node_has_nothing_for_are_named() -> None:
    made = [{"destination": f"{LIB}/libcuda.so.580.2"}, {"destination": f"{LIB}/libnvidia-ml.so.1"}]
    got = inject.relocate(made, [f"{LIB}/libcuda.so.570.9.1", f"{LIB}/libnvidia-ml.so.1"])
    assert [m["destination"] for m in got] == [f"{LIB}/libcuda.so.570.9.1", f"{LIB}/libnvidia-ml.so.1"]
    with pytest.raises(UnsupportedError, match=r"libnvoptix\.so\.570"):
        inject.relocate(made, [f"{LIB}/libnvoptix.so.570.9"])


HOSTILE = [
    "", "{", "[]", "3", '"x"', "null", "[" * 100_000, '{"devices": 3, "gpus": 3}', '{"devices": {"nodes": 3}}',
    '{"devices": {"nodes": [3, {"path": 3}], "mounts": [{"destination": ["x"]}], "names": [3, "x"]}}',
    '{"devices": [3, "../../x", "a/b=c d"]}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_metadata_asks_for_nothing(tmp_path: Path, text: str) -> None:
    path = images(tmp_path, facts=text, dump=text, spec=text)
    spec = container()
    before = copy.deepcopy(spec)
    assert inject.on_restore(spec, path, on_node(tmp_path, (0,), "580.1")) is None
    assert spec == before


def test_metadata_cannot_take_the_kernels_mounts_away(tmp_path: Path) -> None:
    injected = {"mounts": [{"destination": d} for d in ("/proc", "/dev", "/sys", "/data")]}
    spec = container()
    spec["mounts"].append({"destination": "/data", "type": "bind", "source": "/srv"})
    drop.strip(spec, injected)
    assert [m["destination"] for m in spec["mounts"]] == ["/proc", "/dev"]


@pytest.mark.parametrize(
    ("path", "gone"),
    [
        ("/dev/nvidia0", True), ("/dev/nvidia-uvm", True), ("/dev/nvidia-caps/nvidia-cap1", True), ("/dev/kfd", True),
        ("/dev/dri/renderD128", True), ("/dev/fuse", False), ("/dev/nvidiax", False), ("/dev/dri/../sda", False),
    ],
)  # fmt: skip
def test_devices_known_by_name(path: str, gone: bool) -> None:
    spec = {"linux": {"devices": [node(path, 1)]}}
    assert bool(drop.strip(spec)["nodes"]) is gone


@pytest.mark.parametrize(
    ("path", "gone"),
    [
        (f"{LIB}/libcuda.so.580.1", True), ("/usr/lib64/libnvidia-ml.so.1", True), ("/usr/bin/nvidia-smi", True),
        ("/usr/lib64/libEGL_nvidia.so.560.35.03", True), ("/lib/firmware/nvidia/580.1/gsp_tu10x.bin", True),
        ("/run/nvidia-persistenced/socket", True), ("/proc/driver/nvidia/gpus/0000:00:04.0", True),
        ("/etc/passwd", False), ("/data/nvidia", False), ("/usr/lib64/libcurl.so.4", False),
    ],
)  # fmt: skip
def test_mounts_known_by_name(path: str, gone: bool) -> None:
    spec = {"mounts": [{"destination": path, "type": "bind", "source": "/x"}]}
    assert bool(drop.strip(spec)["mounts"]) is gone


def test_hooks_of_gpu_tools_go_and_others_stay() -> None:
    other = {"path": "/usr/bin/oci-umount"}
    spec = {
        "hooks": {
            "prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook"}, other],
            "createContainer": [{"path": "/usr/bin/nvidia-ctk"}, {"path": "/usr/bin/nvidia-cdi-hook"}],
        }
    }
    assert len(drop.hooks(spec)) == 3
    assert spec == {"hooks": {"prestart": [other]}}


def test_the_modifier_through_create(fake: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "cdi").mkdir()
    options = here(tmp_path / "cdi", specification(0))
    fake.add("runc")
    fake.config.write_text(f'[devices]\ncdi-directories = ["{options.cdi_directories[0]}"]\n')
    directory = fake.bundle(spec=container(**{"io.cryoci.gpus": "0"}))
    fake.call("create", "-b", str(directory), "c1")
    facts = json.loads((fake.record("c1") / "record.json").read_text())
    assert facts["devices"]["names"] == [f"{KIND}=0"]
    assert "/dev/nvidia0" in (directory / "config.json").read_text()
    directory = fake.bundle(spec=container(**{"io.cryoci.gpus": "5"}))
    before = (directory / "config.json").read_bytes()
    result = fake.call("create", "-b", str(directory), "c2")
    assert result.returncode == 1 and b"no CDI device nvidia.com/gpu=5" in result.stderr
    assert (directory / "config.json").read_bytes() == before
    assert not fake.record("c2").exists()


def test_a_container_without_a_wish_imports_nothing_of_this(fake: FakeNode) -> None:
    path = fake.bin / "runc"
    path.write_text("#!/bin/true\n")
    path.chmod(0o755)
    spec = {"annotations": {"a": "b"}, "process": {"env": ["A=1"]}}
    names = added(fake, "create", "--bundle", str(fake.bundle(spec=spec)), "c1")
    assert "cryoci.shim.bundle" in names and not [n for n in names if "devices" in n]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"environment": "yes"}, "environment"), ({"cdi-directories": []}, "cdi-directories"),
        ({"cdi-directories": ["etc/cdi"]}, "etc/cdi"), ({"kinds": "nvidia.com/gpu"}, "kinds"), ({"kind": []}, "kind"),
    ],
)  # fmt: skip
def test_wrong_options(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(CryociError, match=problem):
        DeviceOptions.from_mapping(values)


def test_context_has_no_devices_by_default() -> None:
    assert request.words({"annotations": [], "process": None}, DeviceOptions(environment=True)) == []
    spec: dict[str, Any] = {"annotations": {}, "process": {"env": [3, "NVIDIA_VISIBLE_DEVICE=1"]}}
    assert bundle._asks_devices(spec) is False
