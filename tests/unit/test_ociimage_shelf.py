# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Names, archives, retention, and the verbs that look into checkpoints."""

from __future__ import annotations

import importlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cryoci.errors import ConflictError, ImageError, IntegrityError, NotFoundError, UsageError
from cryoci.ociimage import catalog, contents, image, ociarchive, reference, report, shelf
from cryoci.ociimage.catalog import ImageSummary
from cryoci.ociimage.layout import Layout
from cryoci.ociimage.manifest import Descriptor
from cryoci.ociimage.reference import ArchiveRef, DirectoryRef, LayoutRef
from cryoci.ociimage.retention import Policy, judge
from tests.nodes.tree import REPO
from tests.unit import criu_images
from tests.unit.images import checkpoint, make_checkpoint, no_credentials, registry  # noqa: F401

jsonschema: Any = importlib.import_module("jsonschema")  # comes with oras, without types
pytestmark = pytest.mark.usefixtures("no_credentials")
NOW = datetime(2026, 11, 20, tzinfo=UTC)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))


def cryoci(verb: str, *words: str) -> str:
    command: click.Command = importlib.import_module(f"cryoci.cli.{verb}").command
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A directory whose images are readable, with a command line and environment in memory."""
    directory = make_checkpoint(tmp_path / "real", pages=1 << 20)
    for name in ("core-1.img", "pages-1.img", "inventory.img"):
        (directory / "checkpoint" / name).unlink()
    words = b"run\0--fast\0KEY=secret\0"
    criu_images.process(directory, memory={0x10000: words}, words=(0x10000, 0x1000B, 0x1000B, 0x10016))
    entry = criu_images.message(f1=1, f2=0, f3=1, f4=1, f5=[1])
    criu_images.write(
        directory,
        pstree=criu_images.image("pstree", entry),
        inventory=criu_images.image("inventory", criu_images.message(f1=2)),
    )
    return directory


def test_save_and_load(checkpoint: Path, registry: str, tmp_path: Path) -> None:
    pushed = image.push(checkpoint, reference.parse("counter:1"))  # type: ignore[arg-type]
    saved = json.loads(cryoci("save", "--json", "counter:1", str(tmp_path / "a.tar")))
    assert saved["digest"] == pushed.digest
    with pytest.raises(ConflictError):
        cryoci("save", "counter:1", str(tmp_path / "a.tar"))
    cryoci("save", "counter:1", str(tmp_path / "b.tar"))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    cryoci("rm", "counter:1")
    assert "loaded" in cryoci("load", str(tmp_path / "a.tar"))
    assert json.loads(cryoci("inspect", "--json", "counter:1"))["digest"] == pushed.digest
    place = f"{registry}/shelf/counter:1"
    (loaded,) = json.loads(cryoci("load", "--json", str(tmp_path / "a.tar"), place))
    assert loaded["digest"] == pushed.digest
    assert json.loads(cryoci("copy", "--json", place, "other:2"))["digest"] == pushed.digest
    cryoci("pull", str(tmp_path / "a.tar"), str(tmp_path / "out"))
    assert (tmp_path / "out/checkpoint/core-1.img").read_bytes() == (
        checkpoint / "checkpoint/core-1.img"
    ).read_bytes()
    cryoci("save", place, str(tmp_path / "c.tar"))
    assert ociarchive.looks_like(tmp_path / "c.tar")


def test_damaged_archives(checkpoint: Path, tmp_path: Path) -> None:
    image.push(checkpoint, reference.parse("counter:1"))  # type: ignore[arg-type]
    shelf.save(LayoutRef(reference.default_store(), "counter:1"), tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    flipped = bytearray(data)
    flipped[-5000] ^= 1
    for number, bad in enumerate((bytes(flipped), data[: len(data) // 2], data[:512])):
        (tmp_path / f"{number}.tar").write_bytes(bad)
        with pytest.raises((ImageError, IntegrityError)):
            shelf.load(tmp_path / f"{number}.tar", LayoutRef(tmp_path / "into", "x"))
    assert not (tmp_path / "into").exists() or Layout(tmp_path / "into").names() == []


def test_tags_and_pins(checkpoint: Path, registry: str) -> None:
    image.push(checkpoint, reference.parse("counter:1"))  # type: ignore[arg-type]
    cryoci("tag", "counter:1", "counter:stable", "other")
    store = Layout(reference.default_store())
    assert store.names() == ["counter:1", "counter:stable", "other:latest"]
    assert len({e.digest for e in store.entries()}) == 1
    cryoci("tag", "--pin", "counter:stable")
    assert store.pins() == ["counter:stable"]
    image.push(checkpoint, reference.parse("counter:stable"))  # type: ignore[arg-type]
    assert store.pins() == ["counter:stable"]  # pins belong to names
    cryoci("tag", "--unpin", "counter:stable")
    assert store.pins() == []
    cryoci("copy", "counter:1", f"{registry}/shelf/tags:1")
    cryoci("tag", f"{registry}/shelf/tags:1", "two", f"{registry}/shelf/tags:three")
    assert [e["name"] for e in json.loads(cryoci("list", "--json", f"{registry}/shelf/tags"))] == [
        "1",
        "three",
        "two",
    ]
    for words in (("counter:1",), ("counter:1", f"{registry}/x:1"), ("--pin", f"{registry}/shelf/tags:1")):
        with pytest.raises(UsageError):
            cryoci("tag", *words)
    with pytest.raises(NotFoundError):
        cryoci("tag", "none:1", "other:1")


def summary(
    name: str, days: float, *, container: str = "c", size: int = 10, digest: str = ""
) -> ImageSummary:
    when = (NOW - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ImageSummary(name, digest or f"sha256:{name}", when, size, None, "", container)


def gone(images: list[ImageSummary], policy: Policy, pinned: frozenset[str] = frozenset()) -> list[str]:
    return sorted(v.name for v in judge(images, policy, pinned=pinned, now=NOW) if v.goes)


def test_retention() -> None:
    many = [summary(f"n{d}", d) for d in range(5)]
    assert gone(many, Policy()) == []
    assert gone(many, Policy(last=2)) == ["n2", "n3", "n4"] and len(gone(many, Policy(last=0))) == 5
    assert gone(many, Policy(age=timedelta(days=2))) == ["n3", "n4"]
    assert (
        gone([summary("old", 99)], Policy(age=timedelta(days=2), size=1)) == []
    )  # the newest of its container
    assert gone(many, Policy(size=25)) == ["n2", "n3", "n4"]
    assert gone(many, Policy(last=2), frozenset({"n4"})) == ["n2", "n3"]
    assert gone(many, Policy(last=2, pins=("n[23]",))) == ["n4"]
    others = [*many, summary("x", 9, container="d")]
    assert gone(others, Policy(last=1)) == ["n1", "n2", "n3", "n4"]
    twins = [*many, summary("pinned", 3, digest="sha256:n3")]
    assert gone(twins, Policy(last=1, pins=("pinned",))) == ["n1", "n2", "n4"]  # n3 is the pinned image
    broken = [*many, ImageSummary("broken", "", problem="no")]
    assert "broken" not in gone(broken, Policy(last=0))


def test_retention_by_bytes() -> None:
    """Blobs that images share (incremental ones do) take their space once, and what stays anyway takes it first."""
    many = [summary(f"n{d}", d) for d in range(4)]
    parts = {f"sha256:n{d}": {"memory": 8, f"own{d}": 2} for d in range(4)}
    policy = Policy(size=14)

    def gone_of(policy: Policy) -> list[str]:
        judged = judge(many, policy, pinned=frozenset(), now=NOW, parts=parts)
        return sorted(verdict.name for verdict in judged if verdict.goes)

    assert gone(many, policy) == ["n1", "n2", "n3"] and gone_of(policy) == ["n3"]
    assert gone_of(Policy(size=14, pins=("n3",))) == ["n2"]
    assert gone_of(Policy(size=1, pins=("n3",))) == ["n1", "n2"]


def test_collection(checkpoint: Path, registry: str) -> None:
    for day in range(1, 5):
        when = datetime(2026, 11, day, tzinfo=UTC)
        image.push(checkpoint, reference.parse(f"c:{day}"), created=when)  # type: ignore[arg-type]
        image.push(checkpoint, reference.parse(f"{registry}/shelf/gc:{day}"), created=when)  # type: ignore[arg-type]
    size = json.loads(cryoci("list", "--json"))[0]["size"]
    assert "removed" not in cryoci("gc", "--max-size", str(size * 2))  # four names for the same layers
    cryoci("tag", "--pin", "c:1")
    assert "would remove c:2" in cryoci("gc", "--keep-last", "2", "--dry-run")
    done = json.loads(cryoci("gc", "--keep-last", "2", "--json"))
    assert [v["name"] for v in done["verdicts"] if v["removed"]] == ["c:2"]
    assert cryoci("list", "-q").split() == ["c:1", "c:3", "c:4"]
    cryoci("gc", f"{registry}/shelf/gc", "--keep-last", "1", "--keep", "2")
    assert cryoci("list", "-q", f"{registry}/shelf/gc").split() == ["2", "4"]
    for words in (("./x",), ("--max-age", "3"), ("--max-size", "x"), ("--keep-last", "-1")):
        with pytest.raises(UsageError):
            cryoci("gc", *words)


def test_inspect_fetches_no_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = image.push(checkpoint, reference.parse("counter:1"))  # type: ignore[arg-type]
    read: list[int] = []
    original = Layout.open_blob

    def counting(self: Layout, descriptor: Descriptor) -> Iterator[bytes]:
        read.append(descriptor.size)
        return original(self, descriptor)

    monkeypatch.setattr(Layout, "open_blob", counting)
    found = report.inspect(reference.parse("counter:1"))
    assert sum(read) < 100_000 < pushed.size and found.complete
    assert found.sizes.memory == (checkpoint / "checkpoint/pages-1.img").stat().st_size


def test_everywhere_the_same(real: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-C", str(real), "-cf", str(tmp_path / "a.tar"), "."], check=True)
    cryoci("push", str(real), "real:1")
    cryoci("save", "real:1", str(tmp_path / "saved.tar"))
    places = (str(real), str(tmp_path / "a.tar"), "real:1", str(tmp_path / "saved.tar"))
    schema = json.loads((REPO / "docs/schema/inspect.json").read_text())
    seen = []
    for place in places:
        found = json.loads(cryoci("inspect", "--json", "--cmd", place))
        jsonschema.validate(found, schema)
        seen.append(
            {
                key: found[key]
                for key in ("container", "processes", "words", "problems", "complete", "engine")
            }
        )
        assert found["sizes"]["memory"] == 4096
        assert cryoci("memory", place, "--pid", "1", "--search", "secret").startswith("00000001000f heap")
        assert "KEY=secret" in cryoci("memory", place, "--pid", "1", "--strings")
    assert all(one == seen[0] for one in seen)
    assert seen[0]["words"] == [{"pid": 1, "command": ["run", "--fast"], "environment": ["KEY=secret"]}]


def test_memory_verb(real: Path, tmp_path: Path) -> None:
    place = str(real)
    assert "app" in cryoci("memory", place)
    assert "000000010000-000000011000 rw-p" in cryoci("memory", place, "--pid", "1", "--maps")
    found = json.loads(cryoci("memory", place, "--pid", "1", "--search-regex", "K.Y", "-c", "4", "--json"))
    assert found["matches"] == [
        {
            "address": "0x1000b",
            "area": "heap",
            "text": "KEY",
            "before": b"ast\0".hex(),
            "after": b"=sec".hex(),
        }
    ]
    dump = cryoci("memory", place, "--pid", "1", "--range", "10000+32")
    assert dump.startswith("000000010000  72 75 6e 00 2d 2d") and "|run.--fast.KEY=s|" in dump
    whole = cryoci("memory", place, "--pid", "1")
    assert whole.count("\n") < 6 and "*" in whole
    cryoci("memory", place, "--pid", "1", "-o", str(tmp_path / "raw"))
    assert (tmp_path / "raw").read_bytes() == (real / "checkpoint/pages-1.img").read_bytes()
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as tar:
        tar.add(real, arcname=".")
    both = cryoci("memory", place, str(other))
    assert [both.count(text) for text in (f"{place}\n", f"\n{other}\n", "PROCESS", " app ")] == [1, 1, 2, 2]
    question = ("--pid", "1", "--search", "secret", "--json")
    one, two = json.loads(cryoci("memory", place, str(other), *question))
    assert (one["reference"], two["reference"]) == (place, str(other))
    assert one["matches"] == two["matches"] and len(one["matches"]) == 1
    bad: list[tuple[str, ...]] = [
        (str(other), "--pid", "1", "-o", str(tmp_path / "both")),
        ("--search", "x"),
        ("--pid", "1", "--search", "x", "--strings"),
        ("--pid", "1", "--search-regex", "("),
        ("--pid", "1", "--range", "x"),
        ("--pid", "1", "--search", ""),
    ]
    for words in bad:
        with pytest.raises(UsageError):
            cryoci("memory", place, *words)
    with pytest.raises(NotFoundError):
        cryoci("memory", place, "--pid", "7", "--strings")


def test_show_diff_and_ls(real: Path, tmp_path: Path) -> None:
    shelf_dir = tmp_path / "checkpoints"
    shelf_dir.mkdir()
    name = "checkpoint-web-0_default-app-2026-11-01T10:00:00Z.tar"
    subprocess.run(["tar", "-C", str(real), "-cf", str(shelf_dir / name), "."], check=True)
    (shelf_dir / "broken.tar").write_bytes(b"junk" * 200)
    listed = json.loads(cryoci("ls", "--json", str(shelf_dir)))
    assert listed[0]["problem"] and (listed[1]["pod"], listed[1]["namespace"]) == ("web-0", "default")
    assert listed[1]["container"] == "counter" and "web-0" in cryoci("ls", str(shelf_dir))
    assert "counter" in cryoci("show", str(real), str(shelf_dir / name))
    after = tmp_path / "after"
    subprocess.run(["cp", "-a", str(real), str(after)], check=True)
    criu_images.process(
        after,
        name="other",
        memory={0x10000: b"run\0--slow\0KEY=secret\0", 0x20000: b"z"},
        words=(0x10000, 0x1000B, 0x1000B, 0x10016),
    )
    found: Any = json.loads(cryoci("diff", "--json", "--cmd", str(real), str(after)))
    assert found["memory"] == 4096
    kinds = {(c["kind"], c["section"], c["subject"]) for c in found["changes"]}
    assert ("removed", "process", "1 app") in kinds and ("added", "process", "1 other") in kinds
    assert ("changed", "words", "1 command") in kinds
    assert "+ process 1 other" in cryoci("diff", str(real), str(after))
    assert json.loads(cryoci("diff", "--json", str(real), str(real)))["changes"] == []
    assert json.loads(cryoci("diff", "--json", "--show-unchanged", str(real), str(real)))["changes"]
    assert "nothing changed" in cryoci("diff", str(real), str(real))
    assert "process 1 added, 1 removed" in cryoci("diff", str(real), str(after))
    few = json.loads(cryoci("diff", "--json", "--only", "file", "--only", "memory", str(real), str(after)))
    assert set(few["counts"]) == {"file", "memory"} == {c["section"] for c in few["changes"]} | {"file"}
    assert few["same_container"]
    second = tmp_path / "more"
    second.mkdir()
    (second / name).write_bytes((shelf_dir / name).read_bytes())
    both = cryoci("ls", str(shelf_dir), str(second))
    assert f"{shelf_dir}/{name}" in both and f"{second}/{name}" in both


def test_addresses_and_other_containers(real: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["cp", "-a", str(real), str(other)], check=True)
    (other / "config.dump").write_text((real / "config.dump").read_text().replace("ab" * 32, "99" * 32))
    subnet = {"ipnet": "10.88.0.5/16", "gateway": "10.88.0.1"}
    status = {"podman": {"interfaces": {"eth0": {"subnets": [subnet], "mac_address": "aa:bb:cc:dd:ee:ff"}}}}
    (other / "network.status").write_text(json.dumps(status))
    assert "ADDRESS" not in cryoci("show", str(real))
    shown = cryoci("show", str(other))
    assert "ADDRESS" in shown and "10.88.0.5/16 aa:bb:cc:dd:ee:ff gateway 10.88.0.1" in shown
    assert "gateway 10.88.0.1" in cryoci("inspect", str(other))
    command: click.Command = importlib.import_module("cryoci.cli.diff").command
    said = CliRunner().invoke(command, [str(real), str(other)])
    assert (
        "of different containers: counter abab" in said.stderr
        and "+ container network podman" in said.stdout
    )


def test_what_checkpointctl_build_notes(real: Path, tmp_path: Path) -> None:
    """Its eight annotations (1.5, internal/oci_image_build.go), each with its value where the checkpoint has one."""
    spec = {"annotations": {"io.kubernetes.pod.name": "web-0", "io.kubernetes.pod.namespace": "default"}}
    spec["annotations"]["io.container.manager"] = "cri-o"
    (real / "spec.dump").write_text(json.dumps(spec))
    config = json.loads((real / "config.dump").read_text())
    (real / "config.dump").write_text(
        json.dumps({**config, "rootfsImage": "debian:trixie", "runtime": "runc"})
    )
    image.push(real, LayoutRef(tmp_path / "layout", "a"))
    found = image.inspect(LayoutRef(tmp_path / "layout", "a")).annotations
    noted = {
        k.removeprefix("org.criu.checkpoint."): v for k, v in found.items() if k.startswith("org.criu.")
    }
    assert (
        noted.items()
        >= {
            "engine.name": "cri-o",
            "container.name": "counter",
            "pod.name": "web-0",
            "pod.namespace": "default",
            "rootfsImageUserRequested": "debian:trixie",
            "rootfsImageName": "docker.io/library/debian:trixie",
            "rootfsImageID": "cd" * 32,
            "runtime.name": "runc",
        }.items()
    )


def test_damage_is_told_not_hidden(real: Path) -> None:
    (real / "checkpoint/core-1.img").write_bytes(b"junk")
    found = report.inspect(DirectoryRef(real))
    assert found.problems and not found.processes and found.container["name"] == "counter"
    with pytest.raises(ImageError):
        report.inspect(ArchiveRef(Path(__file__)))
    assert catalog.list_images(LayoutRef(reference.default_store())) == []


def test_gpus_are_shown(real: Path) -> None:
    """gpu.dump as shim/gpu/dump.py writes it; one that lies is a finding."""
    task = {"pid": 4711, "inner": 1, "vram": {"GPU-1": 4096, "GPU-2": 1}}
    dump = {"version": 1, "driver": "580.1", "gpus": [{"name": "H200", "uuid": "GPU-1"}], "tasks": [task]}
    (real / "checkpoint/gpu.dump").write_text(json.dumps(dump))
    found = json.loads(cryoci("inspect", "--json", str(real)))["gpu"]
    assert found == {"driver": "580.1", "0": "H200 GPU-1", "memory of 1": "4097"}
    assert "H200 GPU-1" in cryoci("inspect", str(real))
    for lie in ("[]", '{"gpus": 1, "tasks": [1, {"vram": {"a": "b"}}], "driver": []}'):
        (real / "checkpoint/gpu.dump").write_text(lie)
        cryoci("inspect", "--json", str(real))


def test_descriptions_are_bounded(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["tar", "-C", str(real), "-cf", str(tmp_path / "a.tar"), "."], check=True)
    monkeypatch.setattr(contents, "MAX_DESCRIBED", 500)
    with pytest.raises(ImageError, match="too large"), contents.opened(ArchiveRef(tmp_path / "a.tar")):
        pass
