# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811  (fixtures are imported and then named as arguments)
"""The image verbs: cryoci push, pull, list, inspect, rm."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cryoci.cli import output
from cryoci.errors import NotFoundError, UsageError
from tests.unit.images import checkpoint, make_checkpoint, no_credentials, registry, tree_of  # noqa: F401

pytestmark = pytest.mark.usefixtures("no_credentials")
VERBS = (
    "push",
    "pull",
    "list",
    "inspect",
    "rm",
    "show",
    "diff",
    "memory",
    "copy",
    "tag",
    "save",
    "load",
    "gc",
    "convert",
)


def cryoci(verb: str, *words: str) -> str:
    command: click.Command = importlib.import_module(f"cryoci.cli.{verb}").command
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_life(registry: str, checkpoint: Path, tmp_path: Path) -> None:
    place = f"{registry}/cli/counter"
    assert "pushed counter:1".replace("counter:1", f"oci:{tmp_path}/store:counter:1") in cryoci(
        "push", str(checkpoint), "counter:1", "-a", "com.example.ticket=42"
    )
    pushed = json.loads(cryoci("push", "--json", "counter:1", f"{place}:1"))
    assert pushed["reference"] == f"{place}:1" and pushed["digest"].startswith("sha256:")
    listed = json.loads(cryoci("list", "--json", place))
    assert [(e["name"], e["container_name"]) for e in listed] == [("1", "counter")]
    assert cryoci("rm", "counter:1").startswith("removed oci:")
    assert cryoci("list", "-q") == ""
    assert cryoci("pull", "-q", f"{place}:1").strip().endswith("store:cli/counter:1")
    shown = cryoci("inspect", "cli/counter:1", "--annotations")
    assert "container:" in shown and "4.1.1" in shown and "com.example.ticket:" in shown
    assert pushed["digest"] in shown
    assert json.loads(cryoci("inspect", "--json", f"{place}:1"))["digest"] == pushed["digest"]
    assert "counter" in cryoci("list")
    cryoci("pull", f"{place}:1", str(tmp_path / "out"))
    assert tree_of(tmp_path / "out") == tree_of(checkpoint)
    assert cryoci("rm", "-i", "none:1") == ""
    with pytest.raises(NotFoundError):
        cryoci("rm", "none:1")


def test_push_of_an_engines_archive(checkpoint: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-C", str(checkpoint), "-czf", str(tmp_path / "export.tar.gz"), "."], check=True)
    digest = cryoci("push", "-q", str(tmp_path / "export.tar.gz"), f"oci:{tmp_path}/a:1")
    assert digest == cryoci("push", "-q", str(checkpoint), f"oci:{tmp_path}/b:1")


@pytest.mark.parametrize(
    "words",
    [
        ("push", "./a", "./b"),
        ("push", "./a", "b:1", "-a", "x"),
        ("push", "a:1", "b:1", "-a", "x=y"),
        ("push", "./a", "b:1", "--compression", "lz4"),
        ("push", "a:1", "b:1", "--compression", "zstd:3"),  # it would be copied as it is, in silence
        ("push", "a:1", "b:1", "--backend", "buildah"),
        ("push", "./a", "containers-storage:b", "--compression", "zstd:3"),
        ("pull", "./a", "./b"),
        ("pull", "a:1"),
        ("pull", "a.tar", "b:1"),
        ("list", "a.tar"),
        ("rm", "./a"),
    ],
)
def test_wrong_words(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        cryoci(*words)
    assert caught.value.hint


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb: str) -> None:
    assert f"  cryoci {verb}" in cryoci(verb, "--help")


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy(verb: str) -> None:
    code = f"import sys, cryoci.cli.{verb}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"requests", "oras", "rich", "backports.zstd", "jsonschema", "tarfile"} & set(loaded)


def test_a_restore_out_of_a_store_loads_no_http_client() -> None:
    """Nor others that only some restores need: each costs tens of milliseconds, and a warm start is about them."""
    code = (
        "import sys, cryoci.cli.restore\n"
        "from cryoci.ociimage import archive, image, reference\n"
        "from cryoci.ociimage.trust.policy import Gate\n"
        "from cryoci.shim.engines.restore import restore\n"
        "from cryoci.uses import incremental, reporting\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"requests", "http.client", "ssl", "oras", "rich", "cryptography"} & set(done.stdout.split())


def test_a_push_loads_no_shell(tmp_path: Path) -> None:
    """That of the buildah backend imports asyncio, which takes as long as all else that a small push does."""
    source = make_checkpoint(tmp_path / "ck")
    code = (
        "import sys\nfrom cryoci.cli.push import command\n"
        "command(sys.argv[1:], standalone_mode=False)\nprint(*sys.modules)"
    )
    words = ["-q", str(source), f"oci:{tmp_path}/layout:1"]
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    assert (tmp_path / "layout/index.json").exists() and "cryoci.ociimage.pack" in done.stdout
    assert not {"sh", "asyncio", "cryoci.ociimage.buildah"} & set(done.stdout.split())


def test_units() -> None:
    assert [output.size(n) for n in (None, 0, 999, 1500, 123456789)] == [
        "?",
        "0 B",
        "999 B",
        "1.5 kB",
        "123 MB",
    ]
    assert output.printable("a\x1b[0m\n") == "a\ufffd[0m\ufffd"
