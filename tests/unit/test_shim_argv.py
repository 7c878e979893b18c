# SPDX-License-Identifier: Apache-2.0
"""Command lines of runc and crun, as engines write them and as they may be written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cryoci.shim import argv as a

# What engines send (sources: CRI-O internal/oci/runtime_oci.go, conmon src/runtime_args.c, podman
# libpod/oci_conmon_common.go, go-runc): line, verb, id, some values.
ENGINES: list[tuple[str, str, str, dict[str, str | None]]] = [
    (
        "r --root /run/crio checkpoint --file-locks --image-path /d/checkpoint --work-path /d"
        " --leave-running ab1",
        "checkpoint",
        "ab1",
        {"image-path": "/d/checkpoint", "leave-running": None, "file-locks": None},
    ),
    ("r --root /run/crio --systemd-cgroup pause ab1", "pause", "ab1", {}),
    (
        "r --systemd-cgroup --root=/run/crio restore --bundle /b --pid-file /b/pidfile --no-pivot"
        " --no-new-keyring --detach --image-path /d/checkpoint --work-path /b --lsm-profile=selinux:a:b:c"
        " --lsm-mount-context=a:b --console-socket /s create",
        "restore",
        "create",
        {"bundle": "/b", "no-new-keyring": None, "lsm-profile": "selinux:a:b:c"},
    ),
    (
        "r checkpoint --image-path /b/checkpoint --work-path /b --leave-running --tcp-established"
        " --file-locks --leave-running --pre-dump --parent-path ../pre-checkpoint ab1",
        "checkpoint",
        "ab1",
        {"pre-dump": None, "parent-path": "../pre-checkpoint"},
    ),
    (
        "r --log-format=json --log /o restore --bundle /b --pid-file /f --detach --image-path /b/checkpoint"
        " --work-path /b --tcp-established --tcp-close --file-locks ab1",
        "restore",
        "ab1",
        {"tcp-close": None, "bundle": "/b"},
    ),
    (
        "r --root /run/containerd/runc/k8s.io --log /b/log.json --log-format json --systemd-cgroup restore"
        " --image-path /i/checkpoint --work-path /w --detach --pid-file /b/init.pid --no-pivot -no-subreaper"
        " --bundle /b ab1",
        "restore",
        "ab1",
        {"no-subreaper": None, "bundle": "/b", "work-path": "/w"},
    ),
    (
        "r --root /r/moby --log /l --log-format json create --bundle /b --pid-file /b/init.pid"
        " --console-socket /s run",
        "create",
        "run",
        {"pid-file": "/b/init.pid", "console-socket": "/s"},
    ),
    ("r --root /r delete --force checkpoint", "delete", "checkpoint", {"force": None}),
    ("r --root /r update --resources=- ab1", "update", "ab1", {"resources": "-"}),
    ("r exec --process /p --console-socket /s --detach --pid-file /f ab1", "exec", "ab1", {"process": "/p"}),
    ("r --root /r ps --format json ab1", "ps", "ab1", {"format": "json"}),
    ("r kill --all ab1 9", "kill", "ab1", {"all": None}),
]


@pytest.mark.parametrize("kind", ["runc", "crun", None])
@pytest.mark.parametrize(("text", "verb", "container", "values"), ENGINES)
def test_engine_lines(
    text: str, verb: str, container: str, values: dict[str, str | None], kind: str | None
) -> None:
    line = a.parse(text.split(), kind)
    assert (line.doubt, line.verb, line.id) == (None, verb, container)
    for name, value in values.items():
        assert line.options[name] == value


@pytest.mark.parametrize(
    ("text", "verb"),
    [
        ("r --root create state x", "state"),
        ("r --log create --root=run features", "features"),
        ("r --criu checkpoint list", "list"),
        ("r -root restore kill x", "kill"),
        ("r --root --debug state x", "state"),
        ("r -- delete x", "delete"),
        ("r --version", None),
        ("r -v state x", "state"),
        ("r", None),
        ("r bogus create x", "bogus"),
        ("r - create x", "-"),
    ],
)
def test_the_verb_is_never_a_value(text: str, verb: str | None) -> None:
    line = a.parse(text.split())
    assert line.verb == verb


@pytest.mark.parametrize(
    "text",
    [
        "r --future x create y",
        "r create --bundle",
        "r restore --lsm-mount-context",
        "r create --new y",
        "r --root",
    ],
)
def test_doubt_is_left_to_the_runtime(text: str) -> None:
    assert a.parse(text.split()).doubt is not None


@pytest.mark.parametrize(
    "text", ["r --version", "r --help", "r checkpoint --help", "r -h", "r restore -h x", "r -?"]
)
def test_questions(text: str) -> None:
    assert a.parse(text.split()).asks_help


# Each row was tried on runc 1.1.15 and crun 1.21: the id found and the bundle used.
STYLES = [
    ("runc", "r create x -b /n", "x", "/n"),  # flags may follow the id
    ("runc", "r create x --bundle=/n --", "x", "/n"),
    ("runc", "r create -b=/n x", "x", "/n"),
    ("runc", "r create -bundle /n x", "x", "/n"),
    ("runc", "r restore -d=true -bundle=/n x", "x", "/n"),
    ("crun", "r create -b/n x", "x", "/n"),
    ("crun", "r restore -db /n x", "x", "/n"),
    ("crun", "r restore -db/n x", "x", "/n"),
    ("crun", "r create --bund /n x", "x", "/n"),
    ("crun", "r create --bundle=/n -- x", "x", "/n"),
]


@pytest.mark.parametrize(("kind", "text", "container", "bundle"), STYLES)
def test_styles(kind: str, text: str, container: str, bundle: str) -> None:
    line = a.parse(text.split(), kind)
    assert (line.doubt, line.id, line.options.get("bundle")) == (None, container, bundle)


def test_flags_after_the_id_are_words_to_crun_and_to_exec() -> None:
    assert a.parse("r delete x --force".split(), "crun").args == ["x", "--force"]
    assert a.parse("r delete x --force".split(), "runc").options == {"force": None}
    assert a.parse("r exec x sh -c ls".split(), "runc").args == ["x", "sh", "-c", "ls"]
    assert a.parse("r create -- x -b /n".split(), "runc").args == ["x", "-b", "/n"]


def test_a_word_behind_a_switch_ends_runc_flags() -> None:
    # `runc restore --detach x --bundle /n` is refused for three arguments
    assert a.parse("r restore --detach x --bundle /n".split(), "runc").args == ["x", "--bundle", "/n"]


def test_runc_knows_no_bundles() -> None:
    assert a.parse("r restore -db /n x".split(), "runc").doubt is not None


def test_go_switches_take_values() -> None:
    assert a.parse("r delete --force=true x".split(), "runc").has("force")
    assert not a.parse("r delete --force=false x".split(), "runc").has("force")


@pytest.mark.parametrize(
    ("kind", "text", "names", "expected"),
    [
        ("crun", "r restore -no-subreaper -d x", ["no-subreaper"], "r restore -d x"),
        ("runc", "r restore --no-subreaper -b /n x -no-subreaper", ["no-subreaper"], "r restore -b /n x"),
        ("crun", "r restore -db /n x", ["detach"], "r restore -b /n x"),
        ("crun", "r restore -db /n x", ["bundle"], "r restore -d x"),
        ("crun", "r restore -db /n x", ["bundle", "detach"], "r restore x"),
        ("crun", "r restore -db/n x", ["bundle"], "r restore -d x"),
        (
            "crun",
            "r --root bundle restore --bundle=/n --bundle /m bundle",
            ["bundle"],
            "r --root bundle restore bundle",
        ),
        ("runc", "r checkpoint --leave-running --leave-running x", ["leave-running"], "r checkpoint x"),
    ],
)
def test_without(kind: str, text: str, names: list[str], expected: str) -> None:
    assert a.without(a.parse(text.split(), kind), *names) == expected.split()


def test_with_flag_replaces() -> None:
    line = a.parse("r --root /r checkpoint --work-path=/a -work-path /b x".split(), "runc")
    assert a.with_flag(line, "work-path", "/c") == "r --root /r checkpoint --work-path /c x".split()
    assert a.with_flag(line, "shell-job")[3:5] == ["checkpoint", "--shell-job"]


def test_knows() -> None:
    assert a.knows("crun", (1, 23), "restore", "tcp-close")
    assert not a.knows("crun", (1, 21), "restore", "tcp-close")
    assert not a.knows("runc", (1, 3), "restore", "tcp-close")
    assert a.knows("runc", (1, 3, 0), "checkpoint", "link-remap")
    assert not a.knows("crun", (1, 29), "restore", "no-subreaper")
    assert not a.knows("runc", (1, 3), "checkpoint", "ghost-limit")


_VALUE = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=8)
_ID = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_+.-]{0,8}", fullmatch=True) | st.sampled_from(sorted(a.VERBS))


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, list[str], str, str, dict[str, str | None]]:
    """A valid command line of either runtime, in any of its spellings, and what it means."""
    kind = draw(st.sampled_from(["runc", "crun"]))
    global_words, tables = a.RUNTIMES[kind]
    verb = draw(st.sampled_from(sorted(tables)))
    argv = [draw(_VALUE)]
    argv += draw(_flags(kind, global_words, skip=("help", "version", "usage")))[0]
    if draw(st.booleans()):
        argv.append("--")
    words, values = draw(_flags(kind, tables[verb], skip=()))
    container = draw(_ID)
    return kind, [*argv, verb, *words, "--", container], verb, container, values


@st.composite
def _flags(
    draw: st.DrawFn, kind: str, words: str, skip: tuple[str, ...]
) -> tuple[list[str], dict[str, str | None]]:
    names, letters = a.flags(words)
    chosen = draw(st.lists(st.sampled_from(sorted(n for n in names if n not in skip) or [""]), max_size=5))
    argv: list[str] = []
    values: dict[str, str | None] = {}
    for name in filter(None, chosen):
        takes = names[name][1]
        short = [letter for letter, long in letters.items() if long == name]
        spellings = [f"--{name}"] + ([f"-{name}"] if kind == "runc" else []) + [f"-{s}" for s in short]
        word = draw(st.sampled_from(spellings))
        if takes != "=":
            argv.append(word)
            values[name] = None
            continue
        value = draw(_VALUE)
        # GNU writes an attached value of a short flag without "=", Go with it
        if draw(st.booleans()) and (kind == "runc" or word.startswith("--")):
            argv.append(f"{word}={value}")
        else:
            argv += [word, value]
        values[name] = value
    return argv, values


@given(lines())
def test_any_valid_line_parses_back(case: tuple[str, list[str], str, str, dict[str, str | None]]) -> None:
    kind, words, verb, container, values = case
    line = a.parse(words, kind)
    assert line.doubt is None
    assert (line.verb, line.id, line.options) == (verb, container, values)
    unknown = a.parse(words)
    assert (unknown.verb, unknown.id) == (verb, container)
    assert a.parse(a.without(line, *values), kind).options == {}


@given(
    st.lists(
        st.text(max_size=6) | st.sampled_from(["--root", "create", "--", "-b", "--bundle", "-db"]),
        max_size=8,
    )
)
def test_parse_never_raises(words: list[str]) -> None:
    for kind in ("runc", "crun", None):
        line = a.parse(words, kind)
        a.without(line, "bundle", "detach")
