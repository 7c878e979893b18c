# SPDX-License-Identifier: Apache-2.0
"""cryoci-runtime over the real runc and crun, and real CRIU, in a node."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from cryoci.shim import argv as grammar
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode
from tests.nodes.node import NodeError

pytestmark = pytest.mark.node

RUNTIMES = ("runc", "crun")
CONFIG = "/etc/cryoci/config.toml"


@pytest.fixture(scope="module")
def node() -> Iterator[NamespaceNode]:
    """One node for all tests of this module; each test uses containers of its own."""
    with Cluster(tag="runtime") as cluster:
        yield cluster.start("a")


def listed_flags(node: NamespaceNode, kind: str, verb: str | None) -> dict[str, bool]:
    """Flags in the help of an installed runtime: spelling -> takes a value."""
    text = node.run([kind, *([verb] if verb else []), "--help"], check=False).stdout.decode()
    flags: dict[str, bool] = {}
    for line in text.splitlines():
        if not re.match(r"\s+-", line):
            continue
        spec = re.split(r"\s{2,}", line.strip())[0]
        if kind == "runc":
            for word in re.findall(r"--?([\w-]+)", spec):
                flags[word] = " value" in spec
        else:
            value = "=" in spec and "[=" not in spec
            for word in re.findall(r"(?<!\S)--?([\w?-]+)", spec):
                flags[word] = value
    return flags


@pytest.mark.parametrize("kind", RUNTIMES)
@pytest.mark.parametrize("verb", [None, *sorted(grammar.VERBS)])
def test_tables_know_every_flag_of_the_installed_runtime(
    node: NamespaceNode, kind: str, verb: str | None
) -> None:
    words, tables = grammar.RUNTIMES[kind]
    if verb is not None and verb not in tables:
        pytest.skip(f"{kind} has no {verb}")
    names, letters = grammar.flags(words if verb is None else tables[verb])
    seen = listed_flags(node, kind, verb)
    if verb is None or names:
        assert len(seen) >= 2, seen
    for flag, value in seen.items():
        if flag in ("help", "h", "?", "usage"):
            continue
        name = letters.get(flag, flag)
        assert name in names, f"{kind} {verb}: --{flag} is in its help and not in the table"
        if name == "network-lock":
            continue  # crun's help hides that it takes the next word (checkpoint.c)
        assert (names[name][1] == "=") == value, f"{kind} {verb} --{flag}: value {value}"


STYLES = [
    ["delete", "nope", "--force"],
    ["delete", "--force", "nope"],
    ["delete", "-f=true", "nope"],
    ["delete", "-ff", "nope"],
    ["create", "nope", "-b", "/nonexistent"],
    ["create", "-b/nonexistent", "nope"],
    ["create", "--bund", "/nonexistent", "nope"],
    ["create", "--", "nope", "-b", "/nonexistent"],
    ["restore", "--detach", "nope", "--bundle", "/nonexistent"],
    ["restore", "-db", "/nonexistent", "nope"],
]


@pytest.mark.parametrize("kind", RUNTIMES)
@pytest.mark.parametrize("words", STYLES, ids=" ".join)
def test_the_runtime_reads_lines_as_the_tables_do(node: NamespaceNode, kind: str, words: list[str]) -> None:
    line = grammar.parse([kind, *words], kind)
    result = node.run([kind, *words], check=False)
    said = (result.stdout + result.stderr).decode()
    if words[0] == "delete":
        assert (result.returncode == 0) == (
            line.doubt is None and line.has("force") and line.args == ["nope"]
        )
    else:
        used = "/nonexistent" in said and "chdir" in said
        assert used == (line.doubt is None and line.options.get("bundle") == "/nonexistent"), said


@pytest.mark.parametrize("kind", RUNTIMES)
@pytest.mark.parametrize(
    "words",
    [["--version"], ["features"], ["checkpoint", "--help"], ["restore", "--lsm-mount-context"], ["bogus"],
     ["state", "nope"], ["kill", "nope", "9"], ["list"], []],
    ids=" ".join,
)  # fmt: skip
def test_questions_are_answered_by_the_runtime(node: NamespaceNode, kind: str, words: list[str]) -> None:
    node.write(CONFIG, f'[runtime]\npath = "{kind}"\n')
    bare, ours = (node.run([program, *words], check=False) for program in (kind, "cryoci-runtime"))

    def plain(raw: bytes) -> bytes:
        return re.sub(rb'time="[^"]*"|/usr/s?bin/', b"", raw)

    assert (ours.returncode, plain(ours.stdout), plain(ours.stderr)) == (
        bare.returncode,
        plain(bare.stdout),
        plain(bare.stderr),
    )


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_container_goes_on_after_checkpoint_delete_and_restore(node: NamespaceNode, kind: str) -> None:
    node.write(CONFIG, f'[runtime]\npath = "{kind}"\n[criu]\nghost-limit = "3M"\n')
    name, base = f"life-{kind}", f"/srv/life-{kind}"
    record = f"/run/cryoci/containers/default/{name}"
    workload.bundle(node, base)
    workload.detach(
        node, ["cryoci-runtime", "run", "-d", "-b", base, "--pid-file", f"{base}/pid", name], "/srv/log"
    )
    before = workload.wait(node, 5)
    assert node.read(f"{record}/runtime").decode().strip().endswith(f"/{kind}")
    line = ["checkpoint", "--image-path", f"{base}/img", "--work-path", f"{base}/no/such/work", name]
    node.run(["cryoci-runtime", *line[:-1], "--leave-running", name])
    assert workload.wait(node, before["count"] + 3)["boot"] == before["boot"]
    node.sh(f"rm -r {base}/img")
    node.run(["cryoci-runtime", *line])
    facts = json.loads(node.read(f"{base}/img/cryoci-runtime.json"))
    assert facts["runtime"] == kind and facts["spec_digest"].startswith("sha256:")
    assert b"Parsing config file " + f"{record}/criu.conf".encode() in node.read(f"{record}/dump.log")
    assert b"ghost-limit 3145728" in node.read(f"{record}/criu.conf")
    node.run(["cryoci-runtime", "delete", "--force", name])
    assert node.run(["ls", f"{record}/runtime"], check=False).returncode != 0
    workload.detach(
        node,
        ["cryoci-runtime", "restore", "-d", "-no-subreaper", "--image-path", f"{base}/img", "--work-path",
         f"{base}/also/new", "-b", base, "--pid-file", f"{base}/pid", name],
        "/srv/log",
    )  # fmt: skip
    after = workload.wait(node, before["count"] + 3)
    assert after["boot"] == before["boot"] and after["memory_sha256"] == before["memory_sha256"]
    pid = int(node.read(f"{base}/pid"))
    assert node.sh(f"ps -o ppid= -p {pid}").strip() == "1"  # no process of ours stays in between
    node.run(["cryoci-runtime", "kill", name, "KILL"])
    node.run(["cryoci-runtime", "delete", "--force", name])
    assert node.sh("ps -eo args | grep -c '[l]auncher.py' || true").strip() == "0"


@pytest.mark.parametrize("kind", RUNTIMES)
def test_damaged_image_is_explained_and_undone(node: NamespaceNode, kind: str) -> None:
    node.write(CONFIG, f'[runtime]\npath = "{kind}"\n')
    name, base = f"bad-{kind}", f"/srv/bad-{kind}"
    workload.bundle(node, base)
    workload.detach(node, ["cryoci-runtime", "run", "-d", "-b", base, name], "/srv/log")
    workload.wait(node, 2)
    node.run(["cryoci-runtime", "checkpoint", "--image-path", f"{base}/img", name])
    node.run(["cryoci-runtime", "delete", "--force", name])
    workload.bundle(node, f"{base}-2")
    node.sh(f"for f in {base}/img/core-*.img; do truncate -s 60 $f; done")
    restore = [
        "restore",
        "-d",
        "--image-path",
        f"{base}/img",
        "--work-path",
        f"{base}/w",
        "-b",
        f"{base}-2",
        name,
    ]
    with pytest.raises(NodeError, match=f"restore of {name} failed"):
        node.run(["cryoci-runtime", "--log", "/srv/json", "--log-format", "json", *restore])
    last = json.loads(node.read("/srv/json").splitlines()[-1])
    assert last["level"] == "error" and f"restore of {name} failed" in last["msg"]
    assert node.sh(f"ls {base}-2").split() == ["config.json", "rootfs"]
    assert "org.criu.config" not in node.read(f"{base}-2/config.json").decode()
    assert node.sh(f"ls /run/cryoci/containers/default/{name}").split() == [
        "dump.log",
        "restore-attempt.log",
        "restore.log",
    ]
    assert node.run([kind, "state", name], check=False).returncode != 0


def test_criu_reads_the_file_that_we_render(node: NamespaceNode) -> None:
    # every option at once; CRIU must stop at the process that is not there, not at an option
    script = """
from cryoci.shim.criu.conf import render
from cryoci.shim.criu.options import CriuOptions
values = {"tcp-established": True, "tcp-close": False, "skip-in-flight": True, "file-locks": False,
  "ext-unix-sk": True, "shell-job": False, "link-remap": True, "ghost-limit": "2M", "timeout": 33,
  "network-lock": "skip", "manage-cgroups": "ignore", "external": ["mnt[/a]:a", "dev[8/0]:disk"],
  "libdir": "/usr/lib/criu", "log-level": 4}
print(render(CriuOptions.from_mapping(values), "dump"))
"""
    text = node.run(["/opt/cryoci/bin/python", "-c", script]).stdout
    node.write("/srv/criu.conf", text)
    node.sh("mkdir -p /srv/img")
    result = node.run(
        [
            "criu",
            "dump",
            "-t",
            "99999",
            "-D",
            "/srv/img",
            "--config",
            "/srv/criu.conf",
            "-o",
            "/srv/img/log",
        ],
        check=False,
    )
    log = node.read("/srv/img/log").decode()
    assert result.returncode != 0 and b"nvalid" not in result.stderr and b"nrecognized" not in result.stderr
    assert "/proc/99999" in log or "No process" in log or "Can't" in log, log
    node.write("/srv/criu.conf", text + b"no-such-option\n")
    result = node.run(
        ["criu", "dump", "-t", "99999", "-D", "/srv/img", "--config", "/srv/criu.conf"], check=False
    )
    assert b"no-such-option" in result.stderr
