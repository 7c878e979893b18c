# SPDX-License-Identifier: Apache-2.0
"""References: what parses to what, and that nothing parses to something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.errors import UsageError
from cryoci.ociimage.reference import ArchiveRef, DirectoryRef, LayoutRef, RegistryRef, parse

D = "sha256:" + "0a" * 32
STORE = Path("/var/lib/cryoci/images")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/var/ck", DirectoryRef(Path("/var/ck"))),
        ("./ck", DirectoryRef(Path("ck"))),
        ("..", DirectoryRef(Path(".."))),
        ("/x/a.tar", ArchiveRef(Path("/x/a.tar"))),
        ("a.tar.zst", ArchiveRef(Path("a.tar.zst"))),
        ("oci:/l", LayoutRef(Path("/l"))),
        ("oci:/l:a/b:1", LayoutRef(Path("/l"), "a/b:1")),
        (f"oci:l:x@{D}", LayoutRef(Path("l"), "x", D)),
        (f"oci:l@{D}", LayoutRef(Path("l"), None, D)),
        ("h.io/a/b:t", RegistryRef("h.io", "a/b", "t")),
        ("localhost/a", RegistryRef("localhost", "a")),
        ("localhost:5000/a", RegistryRef("localhost:5000", "a")),
        ("[::1]:5000/a:t", RegistryRef("[::1]:5000", "a", "t")),
        (f"h:1/a:t@{D}", RegistryRef("h:1", "a", "t", D)),
        ("docker://h.io/a", RegistryRef("h.io", "a")),
        ("counter", LayoutRef(STORE, "counter:latest")),
        ("team/counter:1", LayoutRef(STORE, "team/counter:1")),
    ],
)
def test_parse(text: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRYOCI_STORE", raising=False)
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        "https://h.io/a",
        "oci:",
        "oci::x",
        "oci:/l:",
        "oci:/l:-",
        "h.io/",
        "h.io/A",
        "h.io/a:",
        "h.io/a:-t",
        f"h.io/a@{D[:-1]}",
        "h.io/a@md5:00",
        f"h.io/a@{D}0",
        "h:0/a",
        "h:99999/a",
        "h.io/a//b",
        "h.io/a/../b",
        "h.io/" + "a" * 300,
        "-",
        "a@b",
        "\n",
        "a\x00b",
        "oci:/l:x@sha256:" + "A" * 64,
        "[::1/a",
    ],
)
def test_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


def test_store_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYOCI_STORE", "/srv/images")
    assert parse("a:1") == LayoutRef(Path("/srv/images"), "a:1")


def test_a_file_is_an_archive(tmp_path: Path) -> None:
    (tmp_path / "export").touch()
    assert parse(str(tmp_path / "export")) == ArchiveRef(tmp_path / "export")


@given(st.text(max_size=80))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    try:
        found = parse(text)
    except UsageError:
        return
    if not (isinstance(found, LayoutRef) and not text.startswith("oci:")):
        assert parse(str(found)) == found


_part = st.from_regex(r"[a-z0-9]{1,5}(-[a-z0-9]{1,3})?", fullmatch=True)


@given(
    st.sampled_from(["h.io", "localhost", "h:5000", "[::1]:1", "a-b.example:65535"]),
    st.lists(_part, min_size=1, max_size=4),
    st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
    st.none() | st.just(D),
)
def test_registry_references_round_trip(
    host: str, parts: list[str], tag: str | None, digest: str | None
) -> None:
    ref = RegistryRef(host, "/".join(parts), tag, digest)
    assert parse(str(ref)) == ref


@given(st.from_regex(r"/[a-z/.@-]{0,20}", fullmatch=True), st.none() | _part)
def test_layout_references_round_trip(path: str, name: str | None) -> None:
    if "@" in path:
        with pytest.raises(UsageError):
            parse(f"oci:{path}")
        return
    assert parse(str(LayoutRef(Path(path), name))) == LayoutRef(Path(path), name)
