# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""Every kind of fault at every request of a restore from a registry, and of a pull that takes a killed one up.

The rule: the engine is given the right bytes, once, or nothing and one typed error; and nothing is left on the disk.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cryoci.cli import main, output
from cryoci.errors import CryociError
from cryoci.ociimage import extract, image, incoming, layers, parallel
from cryoci.ociimage import registry as registry_module
from cryoci.ociimage.reference import RegistryRef
from cryoci.ociimage.transport import RegistryOptions
from cryoci.shim.engines import restore as engine
from cryoci.shim.engines.options import Restored
from cryoci.uses import incremental
from tests.unit import faults
from tests.unit.images import (  # noqa: F401
    Proxy,
    make_checkpoint,
    no_credentials,
    no_sleep,
    proxy,
    ref,
    registry,
    tree_of,
)

pytestmark = pytest.mark.usefixtures("no_credentials", "no_sleep")
OPTIONS = RegistryOptions(read_timeout=0.4)


class Engine:
    """Takes what it is to restore, and looks at it as CRIU would: all of it, now."""

    def __init__(self) -> None:
        self.given: list[dict[str, bytes]] = []

    def __call__(self, directory: Path, options: Any) -> Restored:
        self.given.append(tree_of(directory))
        return Restored("podman", "ab" * 32, "counter")


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    """In the place of the engines; and timeouts that these tests can wait for."""
    made = Engine()
    monkeypatch.setattr(engine, "restore", made)
    monkeypatch.setattr(engine, "need_root", lambda: None)
    monkeypatch.setattr(incremental, "restored", lambda *words: None)
    monkeypatch.setattr(output, "options", lambda **where: OPTIONS)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    return made


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of 700 kB that travels as a large one does, in many frames."""
    monkeypatch.setattr(layers, "BULK_SIZE", 256 << 10)
    monkeypatch.setattr(layers, "FRAME", 64 << 10)
    monkeypatch.setattr(parallel, "FRAMES", 3)  # of a layer so small, more would be all of it
    monkeypatch.setattr(incoming, "STEP", 64 << 10)
    monkeypatch.setattr(registry_module, "SMALL", 64 << 10)
    return make_checkpoint(tmp_path / "small", pages=700_000)


@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_fault_at_every_request_of_a_restore(
    proxy: Proxy, small: Path, tmp_path: Path, sink: Engine, kind: str
) -> None:
    name = f"{proxy.host}/restore/{kind}:1"
    image.push(small, ref(name))
    expected = tree_of(small)
    proxy.log.clear()
    assert CliRunner().invoke(main.cli, ["restore", name, "-d"]).exit_code == 0
    count = len(proxy.log)
    assert count >= 8 and sink.given == [expected]
    refused = 0
    for number in range(1, count + 1):
        sink.given.clear()
        faults.install(proxy, kind, number)
        done = CliRunner().invoke(main.cli, ["restore", name, "-d"])
        faults.remove(proxy)
        if done.exit_code == 0:
            assert sink.given == [expected], number
        else:
            assert isinstance(done.exception, CryociError), (number, done.exception)
            assert sink.given == [] and kind == "flip", (number, done.exception)
            refused += 1
        assert os.listdir(tmp_path / "scratch") == [], number
    assert (refused >= count // 2) == (kind == "flip")


@pytest.fixture
def begun(
    proxy: Proxy, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RegistryRef, Path]:
    """An image, and what a pull that was killed in its middle has left of it."""
    name = ref(f"{proxy.host}/taken-up/a:1")
    image.push(small, name)
    place = tmp_path / ".begun.partial"
    largest = max(image.inspect(name).layers, key=lambda layer: layer.size)
    proxy.body = lambda request, data: data[: len(data) * 2 // 3] if largest.digest in request.path else data
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *words, **more: None)
        patch.setattr(
            extract, "SMALL", -1
        )  # small tars are else looked at as a whole before any of it is written
        with pytest.raises(CryociError):
            image.pull(name, tmp_path / "begun", registry_options=RegistryOptions(attempts=1))
    faults.remove(proxy)
    assert (place / "journal").exists()
    return name, place


@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_fault_at_every_request_of_a_pull_that_is_taken_up(
    proxy: Proxy, small: Path, begun: tuple[RegistryRef, Path], tmp_path: Path, kind: str
) -> None:
    name, place = begun
    expected = tree_of(small)
    for number in range(1, 50):
        out = tmp_path / f"out{number}"
        shutil.copytree(place, tmp_path / f".out{number}.partial")
        proxy.log.clear()
        faults.install(proxy, kind, number)
        try:
            pulled = image.pull(name, out, registry_options=OPTIONS)
        except CryociError:
            assert kind == "flip" and not out.exists()
        else:
            assert tree_of(out) == expected
            assert pulled.skipped > 0 or kind == "flip"
        faults.remove(proxy)
        for left in tmp_path.glob(".out*"):  # it did not come to that
            assert kind == "flip" and tree_of(left) == tree_of(place)
        if len(proxy.log) < number:
            break
    assert 4 < number < 50


def test_whatever_a_killed_pull_has_left(
    small: Path, begun: tuple[RegistryRef, Path], tmp_path: Path
) -> None:
    """Bytes changed, cut off or doubled anywhere, in journal and files: the result is right all the same."""
    name, place = begun
    expected = tree_of(small)
    chance = random.Random(7)
    skipped = 0
    for number in range(60):
        left = tmp_path / ".out.partial"
        shutil.copytree(place, left)
        files = sorted(path for path in left.rglob("*") if path.is_file())
        for path in chance.sample([left / "journal", *files], chance.randint(1, 2)):
            data = bytearray(path.read_bytes())
            at = chance.randrange(len(data)) if data else 0
            how = chance.randrange(4)
            if how == 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            elif how == 1:
                del data[at:]
            elif how == 2:
                data[at:at] = data[at : at + chance.randint(1, 2000)]
            else:
                data[at : at + 20] = chance.randbytes(20)
            path.write_bytes(data)
        skipped += image.pull(name, tmp_path / "out").skipped > 0
        assert tree_of(tmp_path / "out") == expected, number
        assert not list(tmp_path.glob(".out*"))
        shutil.rmtree(tmp_path / "out")
    assert skipped
