# SPDX-License-Identifier: Apache-2.0
"""The YAML reader of CDI specifications, against PyYAML."""

from __future__ import annotations

from typing import Any

import pytest
import yaml as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from cryoci.shim.devices.yaml import YamlError, load, parse

# What nvidia-ctk 1.17 writes (sigs.k8s.io/yaml), shortened.
NVIDIA = """---
cdiVersion: 0.5.0
containerEdits:
  deviceNodes:
  - path: /dev/nvidiactl
  env:
  - NVIDIA_VISIBLE_DEVICES=void
  hooks:
  - args:
    - nvidia-cdi-hook
    - create-symlinks
    - --link
    - libcuda.so.1::/usr/lib/x86_64-linux-gnu/libcuda.so
    hookName: createContainer
    path: /usr/bin/nvidia-cdi-hook
  mounts:
  - containerPath: /usr/bin/nvidia-smi
    hostPath: /usr/bin/nvidia-smi
    options: [ro, nosuid, nodev, bind]
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
      fileMode: 0666   # octal
  name: "0"
- containerEdits: {deviceNodes: [{path: /dev/nvidia0}]}
  name: 'GPU-8d2f0e7c'
kind: nvidia.com/gpu
"""

words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co", "Zl", "Zp")), max_size=20
) | st.sampled_from(
    ["", "#", "a # b", "a: b", "- x", "yes", "0644", "0x1f", "1e3", "~", "null", "'", '"', "[", "{a}", "\t",
     "/dev/nvidia0", "nvidia.com/gpu", "&a", "*a", "!t", "|", ">", "%", "@", "`", "?", "-", "---", "...", ":", "x:",
     "1.5", "0.5.0", "1_000", "2001-01-01", "a,b", "\\", "\u00a0", " lead", "trail "]
)  # fmt: skip
scalars = words | st.integers(-(10**12), 10**12) | st.booleans() | st.none()
trees = st.recursive(
    scalars,
    lambda t: st.lists(t, max_size=4) | st.dictionaries(words.filter(bool), t, max_size=4),
    max_leaves=20,
)


def test_what_nvidia_ctk_writes() -> None:
    assert load(NVIDIA) == reference.safe_load(NVIDIA)
    assert load(NVIDIA)["devices"][0]["containerEdits"]["deviceNodes"][0]["fileMode"] == 0o666


@settings(max_examples=400, deadline=None)
@given(trees, st.sampled_from([None, True, False]), st.integers(2, 6))
def test_what_pyyaml_writes_is_read_alike(tree: Any, flow: bool | None, indent: int) -> None:
    text = reference.safe_dump(tree, default_flow_style=flow, indent=indent, width=10**9, allow_unicode=True)
    assert load(text) == tree


def lenient(text: str) -> Any:
    try:
        return reference.safe_load(text)
    except (reference.YAMLError, ValueError, RecursionError, OverflowError, TypeError):
        return YamlError


@settings(max_examples=600, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["a", "b", ": ", ":", "\n", "\n  ", "\n    ", "- ", "-", "[", "]", "{", "}", ",", " ", "#", " #", '"', "'",
             "x1", "true", "~", "---\n", "/x"]
        ),
        max_size=14,
    )
)  # fmt: skip
def test_what_is_read_at_all_is_read_as_pyyaml_reads_it(parts: list[str]) -> None:
    text = "".join(parts)
    try:
        mine = load(text)
    except YamlError:
        return  # refusing is always safe
    assert mine == lenient(text), text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: &x 1", 1), ("a: *x", 1), ("a: !!str 1", 1), ("a: |\n  text", 1), ("a: >\n  text", 1), ("a: 1\na: 2", 2),
        ("a:\n\t- 1", 2), ("%YAML 1.2\n---\na: 1", 1), ("a: 1\n---\nb: 2", 2), ("a: 'x", 1), ("a: [1", 1),
        ("a: b: c", 1), ("a: 1\n  b: 2", 2), ("- 1\n b: 2", 2), ('a: "\\q"', 1), ("a: {b: 1, b: 2}", 1), ("1: a", 1),
        ("a: x\n   y", 2), ("[" * 100, 1), ("- " * 100 + "x", 1),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(YamlError, match=f"^line {line}: "):
        load(text)


def test_json_is_taken_as_json() -> None:
    assert parse('\n {"a": [1, true, null]}') == {"a": [1, True, None]}
    with pytest.raises(ValueError, match="Expecting"):
        parse("{a: 1}")
