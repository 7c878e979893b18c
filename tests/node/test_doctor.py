# SPDX-License-Identifier: Apache-2.0
"""The doctor on a real node: well as it is, and with faults that are really made."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cryoci.shim.criu import cpuinfo
from tests.node.conftest import Site
from tests.node.subject import CONFIG, KINDS
from tests.node.subject import failing as refused
from tests.node.trouble import argv, running, unharmed, without_criu
from tests.nodes.namespace import NamespaceNode
from tests.unit.criu_images import message

pytestmark = pytest.mark.node


def doctor(node: NamespaceNode, *words: str) -> dict[str, dict[str, Any]]:
    """The checks by id; the exit status must agree with them."""
    result = node.run(["cryoci", "doctor", "--json", *words], check=False)
    report = json.loads(result.stdout)
    assert report["schema"] == "io.cryoci.doctor/1"
    assert result.returncode == (0 if report["ok"] else 1)
    return {check["id"]: check for check in report["checks"]}


@contextmanager
def without(node: NamespaceNode, *paths: str) -> Iterator[None]:
    for path in paths:
        node.run(["mv", path, path + ".away"])
    try:
        yield
    finally:
        for path in paths:
            node.run(["mv", path + ".away", path])


def failing(checks: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, check in checks.items() if check["verdict"] == "fail"]


def test_a_node_that_is_well(site: Site) -> None:
    checks = doctor(site.a)
    assert failing(checks) == [], checks
    for name in (
        "criu.version",
        "criu.check",
        "criu.network-lock",
        "runtime.runc",
        "runtime.cryoci",
        "kernel.kcmp",
    ):
        assert checks[name]["verdict"] == "ok", checks[name]
    said = site.a.run(["cryoci", "doctor", "--fix-hints"]).stdout.decode()
    assert "0 failures" in said and "fix: " in said  # crun 1.21 passes no configuration: a warning


def test_faults_of_a_node(site: Site) -> None:
    node = site.a
    with without(node, "/usr/sbin/iptables-restore", "/usr/lib/x86_64-linux-gnu/libcriu.so.2"):
        checks = doctor(node)
        assert failing(checks) == ["criu.network-lock", "runtime.crun"]
        assert "iptables-restore" in checks["criu.network-lock"]["found"]
        assert "apt-get install iptables" in checks["criu.network-lock"]["fix"]
    with without_criu(node, "#!/bin/sh\necho 'Version: 4.0'\ntest \"$1\" = --version\n"):
        checks = doctor(node)
        assert {"criu.version", "criu.check"} <= set(failing(checks))
    with without_criu(node):
        assert failing(doctor(node)) == ["criu.version"]
    with without(node, "/usr/local/bin/cryoci-runtime"):
        assert "runtime.cryoci" in failing(doctor(node))


def test_wrong_configuration(site: Site) -> None:
    node = site.a
    for path, text, name, verdict in (
        (CONFIG, "[criu]\ntimeot = 1\n", "cryoci.config", "fail"),
        ("/etc/criu/runc.conf", "tcp-established\n", "criu.conf", "ok"),
        ("/etc/crio/crio.conf", "[crio.runtime]\nenable_criu_support = false\n", "crio.checkpoint", "fail"),
        ("/etc/containers/containers.conf.d/99-x.conf",
         '[engine.runtimes]\ncryoci-runtime = ["/nowhere"]\n', "podman.runtime", "fail"),
        ("/usr/share/containers/oci/hooks.d/oci-nvidia.json",
         '{"hook": {"path": "/usr/bin/nvidia-container-toolkit"}}', "gpu.legacy-hook", "fail"),
    ):  # fmt: skip
        node.write(path, text)
        try:
            assert doctor(node)[name]["verdict"] == verdict, name
        finally:
            node.run(["rm", path])


def test_a_container(site: Site) -> None:
    with running(site, KINDS["podman+cryoci-runtime"]) as subject:
        checks = doctor(site.a, subject.name)
        assert failing(checks) == [], checks
        assert checks["container.memory"]["verdict"] == "ok"
        ghost = (
            "import os,time; f=open('/ghost','wb'); os.unlink('/ghost'); f.truncate(3000000); time.sleep(60)"
        )
        site.a.run(["podman", "exec", "--detach", subject.name, "python3", "-c", ghost])
        end = time.monotonic() + 20
        while not (found := failing(doctor(site.a, subject.name))) and time.monotonic() < end:
            time.sleep(0.2)
        assert "container.ghost-files" in found
    with running(site, KINDS["runc"]) as subject:
        assert failing(doctor(site.a, subject.name)) == []


def test_a_user_namespace_is_refused_before_anything_is_touched(site: Site) -> None:
    maps = ("--uidmap=0:100000:65536", "--gidmap=0:100000:65536")
    for name in ("podman+runc", "podman+crun", "podman+cryoci-runtime"):
        with running(site, KINDS[name], options=maps) as subject:
            assert failing(doctor(site.a, subject.name)) == ["container.user-namespace"]
            with unharmed(subject):
                assert "has a user namespace" in refused(site.a, argv(subject))


def test_an_image_and_a_log(site: Site) -> None:
    with running(site, KINDS["podman+cryoci-runtime"]) as subject:
        subject.checkpoint(f"{site.registry}/doctored:1", "--leave-running")
        checks = doctor(site.a, f"{site.registry}/doctored:1")
        assert failing(checks) == [] and checks["image.base"]["verdict"] == "ok", checks
        assert "CRIU agrees" in checks["image.cpu"]["found"]
        other = doctor(site.c, f"{site.registry}/doctored:1")
        assert other["image.base"]["verdict"] == "warn"
        record = f"/run/cryoci/containers/default/{subject.id}/dump.log"
        assert site.a.run(["cryoci", "explain", record], check=False).returncode == 0
        site.a.write(
            "/tmp/dump.log",
            "(00.1) Error (criu/file-lock.c:1): Some file locks are hold by dumping tasks!\n",
        )
        result = site.a.run(["cryoci", "doctor", "--json", "/tmp/dump.log"], check=False)
        assert result.returncode == 1
        assert json.loads(result.stdout)["cause"]["id"] == "file-locks"


_CPU = """
import json, sys
from cryoci.shim.doctor import image
from cryoci.shim.doctor.check import Facts
print(json.dumps(vars(image.cpu(Facts(), {"images": sys.argv[1]}))))
"""


def test_an_image_of_another_processor(site: Site) -> None:
    """CRIU's own verdict on its own image, in which bits are set that no processor has all of."""
    node, where = site.a, "/tmp/processor"
    node.sh(f"mkdir {where} && criu cpuinfo dump --images-dir {where}")
    path = node.path(f"{where}/{cpuinfo.NAME}")
    argv = ["/opt/cryoci/bin/python", "-c", _CPU, where]
    assert json.loads(node.run(argv).stdout)["verdict"] == "ok"
    image = path.read_bytes()
    fields = {f"f{number}": values for number, values in cpuinfo.x86(image)._fields.items()}
    fields["f6"] = [0xFFFFFFFF] * len(fields["f6"])
    entry = message(f1=message(**fields))  # type: ignore[arg-type]
    path.write_bytes(image[:8] + len(entry).to_bytes(4, "little") + entry)
    found = json.loads(node.run(argv).stdout)
    assert found["verdict"] == "fail" and "3dnow" in found["found"], found
