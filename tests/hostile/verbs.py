# SPDX-License-Identifier: Apache-2.0
"""Every verb, given one hostile checkpoint, and what must not happen then."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from cryoci.errors import CryociError
from cryoci.ociimage import archive

BASE = ("--base-image", "localhost/base:1", "--base-id", "cd" * 32)
VERBS: tuple[tuple[str, ...], ...] = (
    ("pull", "REF", "OUT/pulled"),
    ("inspect", "--all", "--env", "--fetch", "REF"),
    ("inspect", "--json", "REF"),
    ("show", "REF"),
    ("diff", "REF", "REF"),
    ("memory", "REF"),
    ("memory", "REF", "--pid", "1", "--strings"),
    *(
        ("convert", "REF", "--to", to, *BASE, "-o", f"OUT/{to}.tar")
        for to in ("crio", "podman", "containerd", "ctr")
    ),
    ("push", "REF", "oci:OUT/layout:1"),
)
# what only the reader of a tar, of JSON, of CRIU's images sees needs no more verbs than these
TAR_VERBS = (VERBS[0], VERBS[1], VERBS[9], VERBS[-1])
DOCUMENT_VERBS = tuple(verb for verb in VERBS if verb[0] in ("inspect", "convert", "push"))
CRIU_VERBS = (*VERBS[:7], VERBS[9])
IMAGE_VERBS: tuple[tuple[str, ...], ...] = (
    ("copy", "REF", "oci:OUT/copy:1"),
    ("save", "REF", "OUT/saved.tar"),
)
ARCHIVE_VERBS: tuple[tuple[str, ...], ...] = (("load", "REF", "oci:OUT/load:1"), ("ls", "DIR"))


def exercise(
    reference: str,
    sandbox: Path,
    verbs: tuple[tuple[str, ...], ...] = VERBS,
    tally: Counter[str] | None = None,
) -> list[str]:
    """Give `reference` to each verb; everything may be written below `sandbox`/out only.

    Returns what went wrong: escapes, odd files, tracebacks, terminal escapes. The caller bounds the time.
    `tally` counts what was taken and what was refused.
    """
    wrong: list[str] = []
    for verb, *words in verbs:
        out = sandbox / "out"
        out.mkdir()
        before = _outside(sandbox)
        line = [
            w.replace("REF", reference).replace("OUT", str(out)).replace("DIR", str(Path(reference).parent))
            for w in words
        ]
        command: click.Command = importlib.import_module(f"cryoci.cli.{verb}").command
        result = CliRunner().invoke(command, line)
        error = result.exception
        if tally is not None:
            tally[f"{verb} {'refused' if error else 'taken'}"] += 1
        if error is not None and not isinstance(error, (CryociError, SystemExit)):
            wrong.append(f"{verb}: {type(error).__name__}: {error}")
        said = result.output + (str(error) if isinstance(error, CryociError) else "")
        if "\x1b" in said and "--json" not in words:
            wrong.append(f"{verb}: terminal escapes in its output")
        if _outside(sandbox) != before:
            wrong.append(f"{verb}: wrote outside: {sorted(_outside(sandbox) ^ before)[:5]}")
        wrong += [f"{verb}: {problem}" for problem in _odd(out)]
        if error is not None and verb in ("pull", "convert", "save") and any(out.iterdir()):
            wrong.append(f"{verb}: left {sorted(p.name for p in out.iterdir())} after its failure")
        shutil.rmtree(out)
    return wrong


def _outside(sandbox: Path) -> set[str]:
    found = set()
    for folder, names, files in os.walk(sandbox):
        if "out" in names and Path(folder) == sandbox:
            names.remove("out")
        found |= {os.path.join(folder, name) for name in [*names, *files]}
    return found


def _odd(out: Path) -> Iterator[str]:
    for folder, names, files in os.walk(out):
        for name in [*names, *files]:
            path = Path(folder, name)
            info = path.lstat()
            if stat.S_ISLNK(info.st_mode):
                if path.name != "parent" or os.readlink(path) != archive.PARENT_TARGET:
                    yield f"link {path}"
            elif not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
                yield f"special file {path}"
            elif info.st_mode & 0o7077 and path.name != "index.json":
                yield f"mode {info.st_mode:o} of {path}"
            if info.st_uid != os.getuid():
                yield f"owner of {path}"


def write(name: str, data: bytes, directory: Path) -> str:
    """An archive file of that content; returns its path."""
    suffix = (
        ".tar.gz" if data[:2] == b"\x1f\x8b" else ".tar.zst" if data[:1] in (b"\x28", b"\x50") else ".tar"
    )
    path = directory / f"{name}{suffix}"
    path.write_bytes(data)
    return str(path)


def digest(data: bytes) -> str:
    """For reports."""
    return hashlib.sha256(data).hexdigest()[:12]


@contextlib.contextmanager
def environment(directory: Path) -> Iterator[None]:
    """The store, the scratch place and the home of a run, all below `directory`."""
    places = {"CRYOCI_STORE": "store", "TMPDIR": "scratch", "HOME": "home"}
    before = {name: os.environ.get(name) for name in places}
    for name, folder in places.items():
        (directory / folder).mkdir(exist_ok=True)
        os.environ[name] = str(directory / folder)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
