# SPDX-License-Identifier: Apache-2.0
"""Manifests, indexes, configs and their JSON: strict on the way in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.errors import ImageError
from cryoci.ociimage import strictjson
from cryoci.ociimage.manifest import (
    CONFIG,
    INDEX,
    LAYER_ZSTD,
    MANIFEST,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
)

D = "sha256:" + "0a" * 32
IMAGE: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": MANIFEST,
    "config": {"mediaType": CONFIG, "digest": D, "size": 2},
    "layers": [{"mediaType": LAYER_ZSTD, "digest": D, "size": 3}],
}


def test_round_trip() -> None:
    made = Manifest(Descriptor(CONFIG, D, 1), [Descriptor(LAYER_ZSTD, D, 2, {"a": "b"})], {"x": "y"})
    assert Manifest.parse(made.to_bytes()) == made
    index = Index([Descriptor(MANIFEST, D, 2, {}, {"os": "linux", "architecture": "amd64"})], {"x": "ü"})
    assert Index.parse(index.to_bytes()) == index
    config = ImageConfig("amd64", "2026-01-01T00:00:00Z", [D])
    assert ImageConfig.parse(config.to_bytes()) == config


def test_bytes_are_those_of_go() -> None:
    entry = Descriptor(MANIFEST, D, 2, {"b": "1", "a": "2"}, {"os": "linux", "architecture": "amd64"})
    index = Index([entry], {"z": "<&>", "y": "\u2028ü"}).to_bytes().decode()
    assert index == (
        f'{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{MANIFEST}","digest":"{D}",'
        '"size":2,"annotations":{"a":"2","b":"1"},"platform":{"architecture":"amd64","os":"linux"}}],'
        '"annotations":{"y":"\\u2028ü","z":"\\u003c\\u0026\\u003e"}}'
    )


@pytest.mark.parametrize(
    "change",
    [
        {"schemaVersion": 1},
        {"schemaVersion": "2"},
        {"mediaType": INDEX},
        {"manifests": []},
        {"layers": []},
        {"layers": None},
        {"layers": IMAGE["layers"] * 513},
        {"layers": [{"mediaType": LAYER_ZSTD, "digest": "sha256:../../etc/passwd", "size": 3}]},
        {"layers": [{"mediaType": LAYER_ZSTD, "digest": "sha512:" + "0" * 128, "size": 3}]},
        {"layers": [{"mediaType": LAYER_ZSTD, "digest": D, "size": -1}]},
        {"layers": [{"mediaType": LAYER_ZSTD, "digest": D, "size": True}]},
        {"layers": [{"mediaType": LAYER_ZSTD, "digest": D, "size": 1e3}]},
        {"layers": [{"mediaType": LAYER_ZSTD, "digest": D, "size": 1 << 60}]},
        {"layers": [{"digest": D, "size": 1}]},
        {"config": None},
        {"config": {"mediaType": CONFIG, "digest": D, "size": 1 << 30}},
        {"annotations": {"a": 1}},
        {"annotations": []},
    ],
)
def test_refused_manifests(change: dict[str, Any]) -> None:
    Manifest.parse(json.dumps(IMAGE).encode())
    with pytest.raises(ImageError):
        Manifest.parse(json.dumps({**IMAGE, **change}).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b"[]",
        b"null",
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b"\xff\xfe",
        b"{" * 100,
        b'{"a":' * 70 + b"1",
        b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}",
        b'{"a":"' + b"x" * 3000 + b'"}',
    ],
)
def test_refused_json(data: bytes) -> None:
    with pytest.raises(ImageError):
        strictjson.load_object(data, "it", limit=2000 if b"xxx" in data else 1 << 20)


def test_brackets_in_strings_are_not_depth() -> None:
    text = json.dumps({"a": '[{"' * 1000}).encode()
    assert strictjson.load_object(text, "it", limit=1 << 20) == {"a": '[{"' * 1000}


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_an_image_error(data: bytes) -> None:
    for parse in (Manifest.parse, Index.parse, ImageConfig.parse):
        with pytest.raises(ImageError):
            parse(data)


def test_index_selects_the_platform() -> None:
    arm = Descriptor(MANIFEST, D, 2, {}, {"architecture": "arm64"})
    amd = Descriptor(MANIFEST, D, 3, {}, {"architecture": "amd64"})
    assert Index([arm, amd]).select("amd64") == amd
    assert Index([arm]).select("amd64") == arm
    with pytest.raises(ImageError, match="no image for s390x"):
        Index([arm, amd]).select("s390x")


def test_config_of_another_system() -> None:
    value = {"architecture": "amd64", "os": "windows", "rootfs": {"type": "layers", "diff_ids": [D]}}
    with pytest.raises(ImageError, match="windows"):
        ImageConfig.parse(json.dumps(value).encode())
