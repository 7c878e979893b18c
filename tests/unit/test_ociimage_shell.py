# SPDX-License-Identifier: Apache-2.0
"""The wrapper of `sh`, and what the buildah backend refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryoci.errors import NotFoundError, ToolError, UsageError
from cryoci.ociimage import buildah, image
from cryoci.ociimage.reference import LayoutRef, RegistryRef
from cryoci.ociimage.seal import age
from cryoci.ociimage.seal.keyring import Recipients
from cryoci.ociimage.shell import Program
from cryoci.ociimage.transport import RegistryOptions
from tests.unit.images import make_checkpoint


def test_output_without_a_terminal() -> None:
    shell = Program("sh")
    assert shell(["-c", "echo one; echo two >&2; test -t 1 || test -t 0 || echo none"]) == "one\nnone"
    assert shell(["-c", "cat"]) == ""


def test_errors_are_whole_and_can_be_pasted() -> None:
    with pytest.raises(ToolError) as caught:
        Program("sh")(["-c", "seq 1 2000 >&2; exit 3", "a b"])
    assert "status 3" in caught.value.message and "\n1\n" not in caught.value.message[:20]
    assert "1\n2\n" in caught.value.message and "\n2000\n" in caught.value.message
    assert caught.value.message.endswith("  command: sh -c 'seq 1 2000 >&2; exit 3' 'a b'")
    with pytest.raises(ToolError, match="signal 9"):
        Program("sh")(["-c", "kill -9 $$"])
    with pytest.raises(NotFoundError, match="not installed"):
        Program("no-such-program")


def test_names_in_containers_storage(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "ck")
    for name in ("", "-flag", "UPPER", "a b", "a" * 300):
        with pytest.raises(UsageError, match="bad image name"):
            buildah.build(directory, name)


def test_what_buildah_cannot_do(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "ck", 1 << 20)
    layout = LayoutRef(tmp_path / "layout", "c")
    recipients = Recipients.parse([age.generate(tmp_path / "id")])
    with pytest.raises(UsageError, match="does not encrypt"):
        image.push(directory, layout, backend="buildah", encrypt_to=recipients)
    with pytest.raises(UsageError, match="no compression zstd:-3"):
        image.push(directory, layout, backend="buildah", compression="zstd:-3")
    with pytest.raises(UsageError, match="--ca-file"):
        options = RegistryOptions(ca_file=Path("ca.pem"))
        image.push(directory, RegistryRef("h.io", "a/b"), backend="buildah", registry_options=options)
    assert not layout.path.exists()
