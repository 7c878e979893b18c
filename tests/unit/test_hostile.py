# SPDX-License-Identifier: Apache-2.0
"""The hostile corpus at the verbs it concerns: nothing escapes, nothing hangs, nothing breaks but with a message."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from cryoci.errors import CryociError, ImageError
from cryoci.ociimage import image
from cryoci.ociimage.reference import ArchiveRef, LayoutRef
from tests import hostile

TARS = {**hostile.ARCHIVES, **hostile.DOCUMENTS, **hostile.IMAGES}
HARMLESS = {  # what may be unpacked, as files of ours
    *("setuid", "no-mode", "folder-of-all-modes", "capabilities", "overlay-xattr", "acl", "contiguous"),
    *("behind-the-end", "gzip-bomb", "parent-without-target"),
}
SECONDS = 30  # for one verb; each takes a few milliseconds


@pytest.fixture(autouse=True)
def bounded(tmp_path: Path) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS * len(hostile.VERBS))
    with hostile.environment(tmp_path):
        yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    (tmp_path / "sandbox").mkdir()
    return tmp_path / "sandbox"


def test_the_corpus_is_large() -> None:
    assert len(TARS) + len(hostile.LAYOUTS) + len(hostile.PLACES) >= 150


@pytest.mark.parametrize("name", TARS)
def test_archives(name: str, sandbox: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = hostile.write(name, TARS[name](), tmp_path / "in")
    verbs = hostile.CRIU_VERBS
    if name not in hostile.IMAGES:
        verbs = hostile.TAR_VERBS if name in hostile.ARCHIVES else hostile.DOCUMENT_VERBS
    assert hostile.exercise(path, sandbox, (*verbs, *hostile.ARCHIVE_VERBS)) == []


@pytest.mark.parametrize("name", hostile.ARCHIVES)
def test_which_archives_are_refused(name: str, tmp_path: Path) -> None:
    path = hostile.write(name, hostile.ARCHIVES[name](), tmp_path)
    if name in HARMLESS:
        pulled = image.pull(ArchiveRef(Path(path)), tmp_path / "out")
        assert pulled.checkpoint.facts["container.name"] == "victim"
    else:
        with pytest.raises(ImageError):
            image.pull(ArchiveRef(Path(path)), tmp_path / "out")


@pytest.mark.parametrize("name", [*hostile.LAYOUTS, *hostile.PLACES])
def test_images(name: str, sandbox: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    if name in hostile.LAYOUTS:
        reference = hostile.layout_of(layout, hostile.LAYOUTS[name])
    else:
        reference = hostile.PLACES[name](layout)
    assert hostile.exercise(reference, sandbox, (*hostile.TAR_VERBS, *hostile.IMAGE_VERBS)) == []
    if name in hostile.LAYOUTS:
        (tmp_path / "in").mkdir()
        path = hostile.saved(layout, tmp_path / "in/saved.tar")
        assert hostile.exercise(path, sandbox, (*hostile.TAR_VERBS, *hostile.ARCHIVE_VERBS)) == []


def test_the_good_one_is_good(sandbox: Path, tmp_path: Path) -> None:
    """Else all of the above would pass for the wrong reason."""
    reference = hostile.layout_of(tmp_path / "layout", lambda d, b: None)
    pulled = image.pull(hostile_reference(reference), tmp_path / "out")
    assert pulled.checkpoint.facts["container.name"] == "victim"
    path = hostile.write("good", hostile.pack(hostile.members_of(hostile.whole())), tmp_path)
    for verb in hostile.VERBS:
        assert hostile.exercise(path, sandbox, (verb,)) == []
    with pytest.raises(CryociError):
        image.pull(ArchiveRef(tmp_path / "none.tar"), tmp_path / "none")


def hostile_reference(text: str) -> LayoutRef:
    from cryoci.ociimage import reference

    found = reference.parse(text)
    assert isinstance(found, reference.LayoutRef)
    return found
