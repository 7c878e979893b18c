# SPDX-License-Identifier: Apache-2.0
"""A restore that fails says why and what to do, and leaves nothing on the node."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

from cryoci.errors import CryociError
from cryoci.ociimage import image
from cryoci.ociimage.reference import ArchiveRef
from tests.node.conftest import Site
from tests.node.subject import KINDS, UNUSED, Subject, failing, runs_on
from tests.node.trouble import OLD, SHIM, cable_out, nothing_left, running, small_disk, without_criu
from tests.nodes import workload

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def saved(site: Site) -> dict[str, str]:
    """References of a podman and a bare checkpoint in the registry; the containers are gone."""
    references = {}
    for name, kind in (("podman", SHIM), ("bare", KINDS["runc"])):
        with running(site, kind) as subject:
            subject.inside("rm", UNUSED)
            references[name] = f"{site.registry}/saved/{name}:1"
            subject.checkpoint(references[name])
    return references


both = pytest.mark.parametrize("name", ["podman", "bare"])


def digest(site: Site, reference: str) -> str:
    said = site.b.run(["cryoci", "inspect", "--json", reference]).stdout
    found: str = json.loads(said)["digest"]
    return found


@both
def test_restore_with_the_registry_away(site: Site, saved: dict[str, str], name: str) -> None:
    with nothing_left(site.b):
        with cable_out(site.b):
            said = failing(site.b, ["cryoci", "restore", saved[name], "--detach"])
        assert site.registry in said


@both
def test_restore_of_a_pin_that_differs(site: Site, saved: dict[str, str], name: str) -> None:
    with nothing_left(site.b):
        repository = saved[name].rpartition(":")[0]
        said = failing(site.b, ["cryoci", "restore", f"{repository}@sha256:{'0' * 64}", "--detach"])
        assert "0" * 12 in said


def container_name(site: Site, reference: str) -> str:
    described = json.loads(site.b.run(["cryoci", "inspect", "--json", reference]).stdout)
    return str(described["container"]["name"])


BLOBS = "/srv/registry/docker/registry/v2/blobs/sha256"


def layers(site: Site, reference: str) -> list[dict[str, Any]]:
    said = site.b.run(["cryoci", "inspect", "--json", reference]).stdout
    found: list[dict[str, Any]] = json.loads(said)["layers"]
    return found


@pytest.mark.parametrize("change", ["flip", "cut", "swap"])
def test_restore_of_an_altered_blob(site: Site, saved: dict[str, str], change: str) -> None:
    """Every blob in turn (config, layers, manifest): what the registry serves is not what was promised."""
    reference = saved["podman"]
    digests = [layer["digest"].partition(":")[2] for layer in layers(site, reference)]
    pinned = digest(site, reference).partition(":")[2]
    with nothing_left(site.b):
        for one in [*digests, pinned]:
            data = site.c.path(f"{BLOBS}/{one[:2]}/{one}/data")
            right = data.read_bytes()
            half = len(right) // 2
            wrong = {
                "flip": right[:half] + bytes([right[half] ^ 1]) + right[half + 1 :],
                "cut": right[:half],
                "swap": right[::-1],
            }[change]
            data.write_bytes(wrong)
            try:
                said = failing(site.b, ["cryoci", "restore", reference, "--detach"])
            finally:
                data.write_bytes(right)
            assert re.search(r"digest|bytes|JSON|not a|manifest|answered 500", said), said
    there = Subject(site.b, SHIM, "after-all", restored=True)
    there.restore(reference, "--name", there.name)  # put right again, it restores
    there.wait(1)
    there.remove()


@both
def test_restore_without_a_criu(site: Site, saved: dict[str, str], name: str) -> None:
    with nothing_left(site.b):
        with without_criu(site.b):
            assert "criu is not installed" in failing(site.b, ["cryoci", "restore", saved[name], "--detach"])
        with without_criu(site.b, OLD):
            assert "too old" in failing(site.b, ["cryoci", "restore", saved[name], "--detach"])


@both
@pytest.mark.parametrize("kib", [1 << 10, 12 << 10], ids=["1M", "12M"])
def test_restore_on_a_full_scratch(site: Site, saved: dict[str, str], name: str, kib: int) -> None:
    with nothing_left(site.b), small_disk(site.b, kib) as disk:
        said = failing(site.b, ["cryoci", "restore", saved[name], "--detach"], env={"TMPDIR": disk})
        assert re.search(r"[Nn]o space|MiB free|is full", said), said
        assert site.b.sh(f"ls -A {disk}") == ""


@both
def test_restore_on_a_full_disk(site: Site, saved: dict[str, str], name: str) -> None:
    """Scratch is elsewhere: podman's storage, or the bundle's file system, is what is full."""
    node = site.cluster.start(f"full-{name}", scratch_mib=24)
    with nothing_left(node):
        said = failing(node, ["cryoci", "restore", saved[name], "--detach"], env={"TMPDIR": "/tmp"})
        assert re.search(r"[Nn]o space|is full", said), said
    node.kill()


@both
def test_restore_where_the_container_is(site: Site, saved: dict[str, str], name: str) -> None:
    kind = SHIM if name == "podman" else KINDS["runc"]
    there = Subject(site.b, kind, container_name(site, saved[name]))
    there.restore(saved[name])
    before = there.wait(1)
    with nothing_left(site.b):
        said = failing(site.b, ["cryoci", "restore", saved[name], "--detach"])
        assert f"{there.name} exists on this node" in said and "--name" in said
        if kind.podman:  # the name is free again, the id is not
            site.b.run(["podman", "rename", there.name, "other"])
            said = failing(site.b, ["cryoci", "restore", saved[name], "--detach"])
            assert "still exists on this node" in said and "--name" in said
            site.b.run(["podman", "rename", "other", there.name])
    runs_on(before, there.wait(before["count"] + 3))
    there.remove()


def test_restore_without_its_base_image(site: Site) -> None:
    """An image that no registry has: the error names it. One that is gone from its registry: likewise."""
    old, new = site.cluster.start("old"), site.cluster.start("new")
    gone, checkpoints = f"{site.registry}/gone:1", f"{site.registry}/checkpoints/base"
    workload.load(old)
    local = Subject(old, SHIM, "local", workload.IMAGE)
    local.start()
    local.checkpoint(f"{checkpoints}:local")
    local.remove()
    old.run(["podman", "rmi", workload.IMAGE])
    workload.push(old, gone)
    fetched = Subject(old, SHIM, "fetched", gone)
    fetched.start()
    fetched.checkpoint(f"{checkpoints}:gone")
    site.c.run(["rm", "-rf", "/srv/registry/docker/registry/v2/repositories/gone"])
    with nothing_left(new):
        said = failing(new, ["cryoci", "restore", f"{checkpoints}:local", "--detach"])
        assert workload.IMAGE in said and "sha256:" in said and "podman save" in said
        said = failing(new, ["cryoci", "restore", f"{checkpoints}:gone", "--detach"])
        assert gone.rpartition(":")[0] in said and "podman pull" in said
    old.kill()
    new.kill()


# -- archives and hostile checkpoints


def unpacked(site: Site, reference: str, where: str) -> str:
    site.b.run(["rm", "-rf", where])
    site.b.run(["cryoci", "pull", reference, where])
    return where


def edit(site: Site, path: str, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(site.b.read(path))
    change(value)
    site.b.write(path, json.dumps(value))


def _mount(spec: dict[str, Any]) -> None:
    spec["mounts"].append(
        {"destination": "/host", "type": "bind", "source": "/etc", "options": ["rbind", "rw"]}
    )


def _device(spec: dict[str, Any]) -> None:
    spec["linux"]["devices"] = [{"path": "/dev/mem", "type": "c", "major": 1, "minor": 1}]


def _namespace(spec: dict[str, Any]) -> None:
    spec["linux"]["namespaces"] = [n for n in spec["linux"]["namespaces"] if n["type"] != "pid"]


@both
@pytest.mark.parametrize(
    ("change", "flag"),
    [(_mount, "mounts"), (_device, "devices"), (_namespace, "host-namespaces")],
    ids=["mount", "device", "namespace"],
)
def test_a_checkpoint_that_asks_for_the_host(
    site: Site, saved: dict[str, str], name: str, change: Callable[[dict[str, Any]], None], flag: str
) -> None:
    where = unpacked(site, saved[name], "/srv/hostile")
    if name == "podman":
        edit(site, f"{where}/config.dump", lambda config: change(config["spec"]))
    edit(site, f"{where}/spec.dump", change)
    with nothing_left(site.b):
        said = failing(site.b, ["cryoci", "restore", where, "--detach"])
        assert "may not take" in said and f"--allow {flag}" in said


def test_a_privileged_container(site: Site, saved: dict[str, str]) -> None:
    where = unpacked(site, saved["podman"], "/srv/hostile")
    edit(site, f"{where}/config.dump", lambda config: config.update(privileged=True))
    with nothing_left(site.b):
        said = failing(site.b, ["cryoci", "restore", where, "--detach"])
        assert "--allow privileged" in said


@both
def test_restore_by_nobody(site: Site, saved: dict[str, str], name: str) -> None:
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with nothing_left(site.b):
        argv = [*nobody, "cryoci", "restore", saved[name], "--detach"]
        said = failing(site.b, argv, env={"HOME": "/tmp"})
        assert "needs root" in said and "sudo" in said


@both
def test_a_restore_that_is_told_to_end(site: Site, saved: dict[str, str], name: str) -> None:
    """At any moment: what was made so far goes."""
    with nothing_left(site.b):
        for moment in (0.2, 0.5, 0.8, 1.1, 1.4):
            words = ["cryoci", "restore", saved[name], "--detach"]
            process = site.b.popen(words)
            time.sleep(moment)
            for pid in site.b.run(["pgrep", "-o", "-f", "cryoci restore"], check=False).stdout.split():
                site.b.run(["kill", "-TERM", pid.decode()], check=False)
            if process.wait(timeout=60) == 0:  # it was faster
                kind = SHIM if name == "podman" else KINDS["runc"]
                Subject(site.b, kind, container_name(site, saved[name]), restored=True).remove()
            else:
                said = process.stderr.read().decode() if process.stderr else ""
                assert process.returncode in (143, -15), said  # the latter before it had begun


@both
def test_hooks_of_a_checkpoint_do_not_run(site: Site, saved: dict[str, str], name: str) -> None:
    where = unpacked(site, saved[name], "/srv/hostile")
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "touch /srv/hooked"]}
    kinds = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")

    def change(spec: dict[str, Any]) -> None:
        spec["hooks"] = {kind: [hook] for kind in kinds}

    if name == "podman":
        edit(site, f"{where}/config.dump", lambda config: change(config["spec"]))
    edit(site, f"{where}/spec.dump", change)
    there = Subject(site.b, SHIM if name == "podman" else KINDS["runc"], "hooked")
    there.restore(where, "--name", there.name)
    there.wait(1)
    there.remove()
    assert not site.b.path("/srv/hooked").exists()


@both
def test_damaged_criu_images(site: Site, saved: dict[str, str], name: str) -> None:
    """A directory has no digests: CRIU itself finds the damage, and its reason is told."""
    where = unpacked(site, saved[name], "/srv/hostile")
    for pattern, size in (("core-*.img", 60), ("pages-*.img", 4096), ("inventory.img", 0)):
        copy = "/srv/damaged"
        site.b.sh(f"rm -rf {copy}; cp -a {where} {copy}; truncate -s {size} {copy}/checkpoint/{pattern}")
        with nothing_left(site.b):
            said = failing(site.b, ["cryoci", "restore", copy, "--detach"])
            assert re.search(r"truncated|damaged|missing|cut off|CRIU", said), said


def test_archives_cut_short(site: Site, saved: dict[str, str], tmp_path: Any) -> None:
    """At the border of every file and in the middle of each: never taken for whole, nothing written."""
    archive = "/srv/cut/whole.tar"
    site.b.run(["mkdir", "-p", "/srv/cut"])
    site.b.run(["cryoci", "pull", saved["podman"], archive])
    whole = tmp_path / "whole.tar"
    shutil.copyfile(site.b.path(archive), whole)
    data = whole.read_bytes()
    image.pull(ArchiveRef(whole), tmp_path / "whole")
    points = sorted(borders(data))
    assert len(points) > 60
    short = tmp_path / "short.tar"
    for point in points:
        short.write_bytes(data[:point])
        with pytest.raises(CryociError) as caught:
            image.pull(ArchiveRef(short), tmp_path / "out")
        assert caught.value.message, point
        assert sorted(p.name for p in tmp_path.iterdir()) == ["short.tar", "whole", "whole.tar"], point
    with nothing_left(site.b):
        for point in (points[len(points) // 2], points[-1]):
            site.b.path("/srv/cut/short.tar").write_bytes(data[:point])
            said = failing(site.b, ["cryoci", "restore", "/srv/cut/short.tar", "--detach"])
            assert re.search(r"ends|truncated|short", said), said
    site.b.run(["rm", "-r", "/srv/cut"])


def borders(data: bytes) -> set[int]:
    """Offsets before and behind each member's header, in the middle of its data and at its end."""
    import io
    import tarfile

    points = {0, 1, 511}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            end = member.offset_data + (member.size + 511) // 512 * 512
            points |= {member.offset, member.offset_data, member.offset_data + member.size // 2, end}
    points.discard(max(points))  # there, only the zero blocks at the end are missing
    return points
