# SPDX-License-Identifier: Apache-2.0
"""Install into the configurations of real engine versions and layouts, and undo it to the byte."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cryoci.errors import ConfigError, ConflictError, NotFoundError
from cryoci.shim.doctor import engines as checks
from cryoci.shim.doctor.check import Facts
from cryoci.shim.setup import engines, plan, read
from cryoci.shim.setup.store import Store
from tests.unit.doctor_node import Given, build

LAYOUTS = Path(__file__).parents[1] / "fixtures" / "engines"
PARSERS = {
    # each shows the file that was written, as the real ones show what they parsed
    "crio": 'case "$1" in --version) echo crio version 1.34.0;; '
    'config) /bin/cat "$ROOT/etc/crio/crio.conf.d/"*;; esac',
    "containerd": 'case "$1" in --version) echo "containerd containerd.io 1.7.24 abc";; '
    '*) /usr/bin/find "$ROOT/etc/containerd" -name "*.toml" -exec /bin/cat {} +;; esac',
    "podman": 'case "$1" in --version) echo "podman version 5.4.2";; *) echo /usr/local/bin/cryoci-runtime;; esac',
}
HANDLERS = {
    "crio": checks.crio_handler,
    "containerd": checks.containerd_handler,
    "podman": checks.podman_runtime,
}
# layout -> engine in ENGINES, the file that changes, whether it is a new one
WHERE: dict[str, tuple[str, str, bool]] = {
    "crio-1.28-obs": ("crio", "/etc/crio/crio.conf.d/99-cryoci.conf", True),
    "crio-1.30-pkgs": ("crio", "/etc/crio/crio.conf.d/99-cryoci.conf", True),
    "crio-1.31-openshift": ("crio", "/etc/crio/crio.conf.d/99-cryoci.conf", True),
    "crio-1.34-pkgs": ("crio", "/etc/crio/crio.conf.d/99-cryoci.conf", True),
    "containerd-1.7-default": ("containerd", "/etc/containerd/config.toml", False),
    "containerd-1.7-debian": ("containerd", "/etc/containerd/config.toml", False),
    "containerd-1.7-kubeadm": ("containerd", "/etc/containerd/config.toml", False),
    "containerd-1.7-imports": ("containerd", "/etc/containerd/conf.d/10-nvidia.toml", False),
    "containerd-2.0-v3": ("containerd", "/etc/containerd/config.toml", False),
    "containerd-2.2-conf.d": ("containerd", "/etc/containerd/conf.d/99-cryoci.toml", True),
    "k3s-containerd-v2": ("containerd", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml.tmpl", True),
    "k3s-containerd-v3": (
        "containerd",
        "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.tmpl",
        True,
    ),
    "rke2-containerd-v2": (
        "containerd",
        "/var/lib/rancher/rke2/agent/etc/containerd/config.toml.tmpl",
        False,
    ),
    "podman-4.9-ubuntu": ("podman", "/etc/containers/containers.conf.d/99-cryoci.conf", True),
    "podman-5.4-debian": ("podman", "/etc/containers/containers.conf.d/99-cryoci.conf", True),
    "podman-5.4-rhel": ("podman", "/etc/containers/containers.conf.d/99-cryoci.conf", True),
}


def node(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch, *programs: str) -> Facts:
    facts = build(
        tmp_path, Given(programs={"cryoci-runtime": "", "runc": "", **{p: PARSERS[p] for p in programs}})
    )
    shutil.copytree(LAYOUTS / layout, facts.root)
    (facts.root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("ROOT", str(facts.root))
    runtime = Path(facts.program("cryoci-runtime") or "")
    facts.at(str(runtime)).parent.mkdir(parents=True)
    facts.at(str(runtime)).touch()  # what a configuration names exists below the root
    return facts


def tree(facts: Facts) -> dict[str, tuple[int, str]]:
    """Every file and directory but the installation's own: mode and digest."""
    found = {}
    for path in sorted(facts.root.rglob("*")):
        name = "/" + str(path.relative_to(facts.root))
        if name.startswith("/var/lib/cryoci") or name in ("/var", "/var/lib"):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        found[name] = (stat.S_IMODE(path.stat().st_mode), digest)
    return found


def install(facts: Facts, engine: str = "auto", runtime: str | None = None) -> list[str]:
    store, changed = Store(facts), []
    for one in engines.plans(facts, store, engine, runtime):
        changed += [c.path for c in store.pending(one)]
        store.apply(one)
    return changed


def test_containerds_own_handler_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """containerd 1 forgets it when a file has a table of handlers, and so it is written where nobody has."""
    written = {}
    for layout in ("containerd-1.7-debian", "containerd-1.7-kubeadm"):
        facts = node(tmp_path / layout, layout, monkeypatch, "containerd")
        (one,) = engines.plans(facts, Store(facts), "containerd", None)
        written[layout] = one.changes[0].after.decode().count(".containerd.runtimes.runc]")
    assert written == {"containerd-1.7-debian": 1, "containerd-1.7-kubeadm": 1}


def test_there_are_twelve_layouts() -> None:
    assert set(WHERE) | {"containerd-1.6-docker"} == {p.name for p in LAYOUTS.iterdir()}
    assert len(WHERE) >= 12


@pytest.mark.parametrize("layout", WHERE)
def test_install_and_undo(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, path, new = WHERE[layout]
    rancher = "rancher" in path
    facts = node(tmp_path, layout, monkeypatch, *([] if rancher else [engine]))
    before, original = tree(facts), None if new else facts.at(path).read_bytes()
    assert HANDLERS[engine](facts).verdict == ("skip" if rancher else "warn")

    assert install(facts, engine) == [path]
    after = tree(facts)
    assert [p for p in after if after[p] != before.get(p) and after[p][1] != "directory"] == [path]
    text = facts.at(path).read_bytes()
    if original is not None:  # the user's comments, order and spelling stay
        assert text.startswith(original)
        assert before[path][0] == after[path][0]
    if rancher:
        assert b'{{ template "base" . }}' in text and text.count(b".runtimes.cryoci]") == 1
    else:
        assert HANDLERS[engine](facts).verdict == "ok"
    assert engines.status(facts, Store(facts))[0]["state"] == "installed"

    assert install(facts, engine) == []  # a second time changes nothing
    assert tree(facts) == after

    Store(facts).undo()
    assert tree(facts) == before
    assert Store(facts).undo() == []


def effective(facts: Facts, engine: str) -> dict[str, Any]:
    return {"crio": read.crio, "containerd": read.containerd, "podman": read.podman}[engine](facts)


def without_ours(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {k: without_ours(v) for k, v in config.items() if "cryoci" not in k}


@pytest.mark.parametrize("layout", [n for n in WHERE if n.startswith("containerd")])
def test_all_else_is_as_it_was_to_containerd(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """containerd 1 replaces whole tables by imports: nothing of the user's may get lost on that way."""
    facts = node(tmp_path, layout, monkeypatch, "containerd")
    before = effective(facts, "containerd")
    install(facts)
    after = effective(facts, "containerd")
    _, cri = read.cri(after)
    handler = read.table(cri, "containerd", "runtimes", "cryoci")
    assert handler["options"]["BinaryName"] == facts.program("cryoci-runtime")
    old = read.table(before, "plugins", read.cri(after)[0], "containerd", "runtimes")
    wanted = read.table(old, "runc", "options").get("SystemdCgroup")
    assert handler["options"].get("SystemdCgroup", False) == bool(wanted)
    if not old.get("runc"):  # what containerd has by itself as long as no file names a handler
        own = read.table(cri, "containerd", "runtimes")
        assert own.pop("runc") == {"runtime_type": "io.containerd.runc.v2"}
    pruned, plugins = without_ours(after), before.get("plugins")
    if layout == "containerd-1.7-debian":
        assert pruned["plugins"][read.CRI_V2].pop("containerd") == {"runtimes": {}}
    if plugins is None:  # tables that lead to the handler
        pruned.pop("plugins")
    elif layout == "containerd-2.2-conf.d":
        assert plugins["io.containerd.cri.v1.images"] == pruned["plugins"]["io.containerd.cri.v1.images"]
    assert pruned == before


def test_the_handler_of_crio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(tmp_path, "crio-1.34-pkgs", monkeypatch, "crio")
    install(facts)
    runtime = effective(facts, "crio")["crio"]["runtime"]
    assert runtime["enable_criu_support"] is True and runtime["default_runtime"] == "crun"
    handler = runtime["runtimes"]["cryoci"]
    assert handler["monitor_path"] == "/usr/libexec/crio/conmon"
    assert (handler["runtime_type"], handler["runtime_root"]) == ("oci", "/run/runc")
    assert without_ours(runtime["runtimes"]) == without_ours(
        tomllib.loads((LAYOUTS / "crio-1.34-pkgs/etc/crio/crio.conf.d/10-crio.conf").read_text())["crio"][
            "runtime"
        ]["runtimes"]
    )


def test_a_runtime_that_only_crio_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(tmp_path, "crio-1.34-pkgs", monkeypatch, "crio")
    (tmp_path / "bin/runc").unlink()
    (made,) = engines.plans(facts, Store(facts), "crio", None)
    assert "/usr/libexec/crio/runc" in made.notes[0]


def test_the_list_of_podman_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(tmp_path, "podman-4.9-ubuntu", monkeypatch, "podman")
    install(facts)
    assert effective(facts, "podman")["engine"]["runtime_supports_json"] == [
        "crun",
        "runc",
        "kata",
        "cryoci-runtime",
    ]


def test_a_containerd_without_cri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(tmp_path, "containerd-1.6-docker", monkeypatch, "containerd")
    (made,) = engines.plans(facts, Store(facts), "auto", None)
    assert made.changes == () and "CRI plugin is disabled" in made.notes[0]


def test_version_1_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(tmp_path, "containerd-1.6-docker", monkeypatch, "containerd")
    facts.at(read.CONTAINERD).write_text("[plugins.cri]\n")
    with pytest.raises(ConfigError, match="version 1") as caught:
        install(facts)
    assert "config migrate" in str(caught.value.hint)


def test_the_engine_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parser says no: everything is as before, and its words are in the error."""
    facts = node(tmp_path, "containerd-1.7-kubeadm", monkeypatch, "containerd")
    (tmp_path / "bin/containerd").write_text(
        '#!/bin/sh\ntest "$1" = --version && exit 0\necho unknown key; exit 1\n'
    )
    before = tree(facts)
    with pytest.raises(ConfigError, match="unknown key"):
        install(facts)
    assert tree(facts) == before
    assert Store(facts).files == {}


def test_a_parser_that_does_not_show_the_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(tmp_path, "crio-1.30-pkgs", monkeypatch, "crio")
    (tmp_path / "bin/crio").write_text("#!/bin/sh\nexit 0\n")
    before = tree(facts)
    with pytest.raises(ConfigError, match="does not show the handler"):
        install(facts)
    assert tree(facts) == before


def test_what_was_edited_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(tmp_path, "containerd-1.7-kubeadm", monkeypatch, "containerd")
    path = facts.at(read.CONTAINERD)
    original = path.read_text()
    install(facts)
    path.write_text(path.read_text() + "[debug]\n  level = 'info'\n")
    assert install(facts) == [read.CONTAINERD]  # the block is at the end again, the edit stays
    assert "level = 'info'" in path.read_text()
    path.write_text("# mine\n" + path.read_text())
    assert [u.what for u in Store(facts).undo()] == ["block removed"]
    assert path.read_text() == "# mine\n" + original + "\n[debug]\n  level = 'info'\n"


def test_a_drop_in_that_was_edited_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = node(tmp_path, "podman-5.4-rhel", monkeypatch, "podman")
    (path,) = install(facts)
    facts.at(path).write_text("# mine\n")
    with pytest.raises(ConflictError, match="edited since"):
        Store(facts).undo()
    assert facts.at(path).read_text() == "# mine\n"
    Store(facts).undo(force=True)
    assert not facts.at(path).exists()


def test_runtime_of_config_toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        None: '[runtime]\npath = "runc"\n',
        "# mine\n[criu]\ntimeout = 5": '# mine\n[criu]\ntimeout = 5\n[runtime]\npath = "runc"\n',
        '[runtime] # below\npath = "crun" # old\n[criu]\n': '[runtime] # below\npath = "runc"\n[criu]\n',
        "[runtime]\n#path = 'x'\n": "[runtime]\npath = \"runc\"\n#path = 'x'\n",
    }
    for number, (text, wanted) in enumerate(texts.items()):
        facts = node(tmp_path / str(number), "podman-5.4-rhel", monkeypatch, "podman")
        path = facts.at(engines.CONFIG)
        if text is not None:
            path.parent.mkdir(parents=True)
            path.write_text(text)
        before = tree(facts)
        assert engines.CONFIG in install(facts, "podman", "runc")
        assert path.read_text() == wanted
        assert install(facts, "podman", "runc") == []
        Store(facts).undo()
        assert tree(facts) == before
    facts.at(engines.CONFIG).write_text("runtime = { path = 'x' }\n")
    with pytest.raises(ConfigError, match="cannot be edited"):
        install(facts, "podman", "runc")


def test_nothing_to_install_into(tmp_path: Path) -> None:
    facts = build(tmp_path, Given(programs={"cryoci-runtime": ""}))
    with pytest.raises(NotFoundError, match="no engine"):
        engines.plans(facts, Store(facts), "auto", None)
    with pytest.raises(NotFoundError, match="crun is not on PATH"):
        engines.plans(facts, Store(facts), "podman", "crun")
    facts = build(tmp_path / "b", Given())
    with pytest.raises(ConfigError, match="not on PATH"):
        engines.plans(facts, Store(facts), "podman", None)


def test_diff() -> None:
    change = plan.Change("/etc/x", b"a\nb", b"a\nc\n", whole=False)
    assert "-b\n" in change.diff() and "+c\n" in change.diff() and "No newline" in change.diff()
    assert plan.Change("/etc/x", None, b"a\n", whole=True).diff().startswith("--- /dev/null\n+++ /etc/x\n")


def test_a_damaged_manifest(tmp_path: Path) -> None:
    facts = build(tmp_path, Given({"/var/lib/cryoci/install/manifest.json": "{"}))
    with pytest.raises(ConfigError, match="damaged"):
        Store(facts)
