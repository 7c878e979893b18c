# SPDX-License-Identifier: Apache-2.0
"""The node tree: a Debian trixie root directory, plus layers for cryoci and its dependencies.

Everything lives under `.cache/node/`, each directory named after the hash of what went into it, so
a changed package list or source makes a new one. `lower()` is what a node mounts its overlay over:

    cryoci-HASH   this checkout, installed from a real wheel (about 3 s, only when a source changed)
    deps-HASH     /opt/cryoci: a venv of the tree's python with the dependencies of pyproject.toml
    tree-HASH     Debian, minimal variant (about 30 s)
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from cryoci.command import run, which
from cryoci.errors import NotFoundError, PrivilegeError, UnsupportedError

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / ".cache" / "node"
SUITE = "trixie"
PACKAGES = (
    "aardvark-dns", "age", "buildah", "ca-certificates", "checkpointctl", "conmon", "containerd",
    "containernetworking-plugins", "cosign", "criu", "crun", "docker-registry", "iproute2", "iptables", "kmod",
    "libcriu2", "netavark", "nftables", "oras", "podman", "procps", "python3", "python3-venv", "runc", "skopeo",
    "strace", "zstd",
)  # fmt: skip
# Linux 6.16 made SO_PASSCRED an error on sockets that are not unix ones, and CRIU before 4.2 then dumps no
# TCP socket at all ("sockets: Can't get 1:16 opt"). Trixie has 4.1.1, so CRIU comes from the next suite.
NEXT_SUITE = "forky"
NEXT_PACKAGES = "criu libcriu2 libcompel1 libnet9 libnl-3-200"
PREFERENCES = f"""\
Package: *
Pin: release n={NEXT_SUITE}
Pin-Priority: 50

Package: {NEXT_PACKAGES}
Pin: release n={NEXT_SUITE}
Pin-Priority: 990
"""
_PINS = f"""mkdir -p "$1/etc/apt/preferences.d" && cat >"$1/etc/apt/preferences.d/50-nodes" <<END
{PREFERENCES}END"""
# Trixie's own CRIU stays reachable, for tests of one that is too old.
OLD_CRIU = "/opt/criu-4.1/criu"
_OLD_CRIU = f"""chroot "$1" sh -euc '
    mkdir -p /opt/criu-4.1/tmp && cd /opt/criu-4.1/tmp
    apt-get -q download criu/{SUITE} libcompel1/{SUITE} libnl-3-200/{SUITE} libnet1
    for deb in *.deb; do dpkg-deb -x "$deb" ..; done
    cd .. && rm -r tmp usr/share
    {{
        echo "#!/bin/sh"
        echo "export LD_LIBRARY_PATH=/opt/criu-4.1/usr/lib/$(uname -m)-linux-gnu"
        echo "exec /opt/criu-4.1/usr/sbin/criu \\"\\$@\\""
    }} >criu
    chmod 755 criu && ./criu --version
'"""
# cosign 3 signs with bundles, trixie's cosign 2 with tags: images have to please both.
NEW_COSIGN = "/opt/cosign-3/usr/bin/cosign"
_NEW_COSIGN = f"""chroot "$1" sh -euc '
    mkdir -p /opt/cosign-3 && cd /opt/cosign-3
    apt-get -q download cosign/{NEXT_SUITE}
    dpkg-deb -x cosign_*.deb . && rm -r cosign_*.deb usr/share && usr/bin/cosign version
'"""
# Trixie's containerd is 1.7; 2 has another configuration and other checkpoints.
NEW_CONTAINERD = "/opt/containerd-2"
_NEW_CONTAINERD = f"""chroot "$1" sh -euc '
    mkdir -p {NEW_CONTAINERD} && cd {NEW_CONTAINERD}
    apt-get -q download containerd/{NEXT_SUITE}
    dpkg-deb -x containerd_*.deb . && rm -r containerd_*.deb etc usr/share && usr/bin/containerd --version
'"""
# By the host's apt with the tree's configuration; nothing is unpacked, so no dpkg-dev is needed.
_SOURCE = 'cd "$1" && APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get -q source --download-only --tar-only'
# What the sources of the wheel are; everything else in the checkout does not change a node.
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "cryoci",
    "shim",
    "ociimage",
    "hooks",
    "cli",
    "uses",
)
VENV = "/opt/cryoci"
SITE = f"{VENV}/lib/python3.13/site-packages"
# Documentation is a third of the tree and read by nobody.
_DPKG = (
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/locale/*",
)


def require_root() -> None:
    """Raise PrivilegeError unless this is root: mmdebstrap, namespaces and mounts need it."""
    if os.geteuid() != 0:
        raise PrivilegeError(
            "test nodes need root (namespaces, mounts, CRIU)", hint="run as root: sudo make test"
        )


def debian() -> Path:
    """The Debian tree, built when its package list is new. Raises PrivilegeError, UnsupportedError."""
    name = f"tree-{digest([SUITE, *PACKAGES, PREFERENCES, _OLD_CRIU, _NEW_COSIGN, _NEW_CONTAINERD, *_DPKG])}"
    return cached(name, lambda path: mmdebstrap(path, PACKAGES, variant="minbase"))


def dependencies() -> Path:
    """The layer with the venv of cryoci's dependencies, made by the tree's own python and pip."""
    base = debian()
    wanted: list[str] = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    name = f"deps-{digest([base.name, *wanted])}"

    def build(path: Path) -> None:
        wheels = path.with_name(f"{path.name}.wheels")
        try:
            # Fetched by the host's pip: a tree has neither a resolver nor the host's proxy and certificates.
            run([
                sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check",
                "--python-version", "3.13", "--only-binary=:all:", "-d", wheels, *wanted,
            ])  # fmt: skip
            script = (
                f"python3 -m venv {VENV} && {VENV}/bin/pip install -q --no-index --find-links /mnt "
                f"{shlex.join(wanted)} && python3 -m compileall -q {VENV}/lib >/dev/null"
            )
            make_layer(path, [base], script, inputs=wheels)
        finally:
            shutil.rmtree(wheels, ignore_errors=True)

    return cached(name, build)


def checkout() -> Path:
    """The layer with this checkout of cryoci: `cryoci` and `cryoci-runtime` on the node's PATH."""
    base = dependencies()
    name = f"cryoci-{digest([base.name, source_digest()])}"

    def build(path: Path) -> None:
        scratch = path.with_name(f"{path.name}.wheel")
        try:
            wheel(scratch)
            launcher = f"{SITE}/cryoci/shim/launcher.py"
            script = (
                f"{VENV}/bin/pip install -q --no-deps --no-index /mnt/*.whl"
                f" && python3 -m compileall -q {SITE}/cryoci >/dev/null"
                f" && ln -sf {VENV}/bin/cryoci {VENV}/bin/kubectl-cryoci /usr/local/bin/"
                f" && ln -sf {launcher} /usr/local/bin/cryoci-runtime"
            )
            make_layer(path, [base, debian()], script, inputs=scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    return cached(name, build)


@functools.cache
def lower() -> tuple[Path, ...]:
    """The lower directories of a node's overlay, topmost first; built once per process."""
    return checkout(), dependencies(), debian()


def wheel(destination: Path) -> Path:
    """Build cryoci's wheel from a copy of the sources, so that nothing is written into the checkout."""
    with contextlib.ExitStack() as stack:
        source = destination / "src"
        stack.callback(shutil.rmtree, source, ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
        source.mkdir(parents=True)
        for name in SOURCES:
            path = REPO / name
            if path.is_dir():
                shutil.copytree(path, source / name, symlinks=True, ignore=ignore)
            elif path.exists():
                shutil.copy(path, source / name)
        (source / "README.md").touch()  # named by pyproject.toml; its text changes nothing in a node
        run([
            sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps",
            "--no-build-isolation", "-w", destination, source,
        ])  # fmt: skip
    return next(destination.glob("*.whl"))


def source_digest() -> str:
    """Hash of every byte that goes into the wheel."""
    total = hashlib.sha256()
    for name in SOURCES:
        root = REPO / name
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file() and not path.is_symlink() and path.suffix != ".pyc":
                total.update(f"{path.relative_to(REPO)}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def mmdebstrap(
    path: Path,
    packages: Iterable[str],
    *,
    variant: str,
    source: str | None = None,
    exclude: Iterable[str] = (),
) -> None:
    """Make a Debian tree at `path` from the host's own mirror and proxy, without files like `exclude`.

    The tar of a `source` package goes into it.
    """
    require_root()
    program = which("mmdebstrap")
    options = [f"--dpkgopt={o}" for o in (*_DPKG, *(f"path-exclude={pattern}" for pattern in exclude))]
    options += [f"--aptopt={key} {_quote(value)}" for key, value in apt_settings()]
    extra = [_OLD_CRIU, _NEW_COSIGN, _NEW_CONTAINERD] if variant == "minbase" else []
    hooks = [f"--setup-hook={_PINS}", *(f"--customize-hook={script}" for script in extra)]
    url = mirror()
    lines = [f"deb {url} {SUITE} main", f"deb {url} {SUITE}-updates main"]
    lines.append(f"deb [check-valid-until=no] {url} {NEXT_SUITE} main")
    if source is not None:
        lines.append(f"deb-src [check-valid-until=no] {url} {NEXT_SUITE} main")
        hooks.append(f"--extract-hook={_SOURCE} {source}/{NEXT_SUITE}")
    result = subprocess.run(
        [
            program, "--mode=root", f"--variant={variant}", "--format=directory",
            f"--include={','.join(packages)}", *hooks, *options, SUITE, str(path), *lines,
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if result.returncode != 0:
        tail = result.stdout.decode(errors="replace")[-3000:]
        raise UnsupportedError(
            f"cannot build the Debian {SUITE} tree from {url}:\n{tail}",
            hint="check that the mirror answers, and that debian-archive-keyring is bookworm's or newer",
        )


def mirror() -> str:
    """The Debian mirror of the host's apt sources (one-line or deb822), else deb.debian.org."""
    texts = [
        p
        for p in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*")))
        if p.is_file()
    ]
    for path in texts:
        if path.suffix not in (".list", ".sources"):
            continue
        text = re.sub(r"^\s*#.*$", "", path.read_text(errors="replace"), flags=re.M)
        for uri in re.findall(r"https?://\S+", text):
            if uri.rstrip("/").endswith("/debian"):
                return str(uri).rstrip("/")
    return "http://deb.debian.org/debian"


def apt_settings() -> list[tuple[str, str]]:
    """The host's apt settings that decide whether a download works: proxies and clock checks."""
    if shutil.which("apt-config") is None:
        raise NotFoundError("apt is not on this machine", hint="the node tree is built on Debian 12 or 13")
    keep = re.compile(
        r'^(Acquire::(?:https?::(?:Proxy|Timeout|Verify-\w+|CaInfo)|Check-\w+|Retries)) "(.*)";$', re.M
    )
    return [(k, v) for k, v in keep.findall(run(["apt-config", "dump"]).stdout.decode()) if v]


def make_layer(upper: Path, lowers: Iterable[Path], script: str, *, inputs: Path | None = None) -> None:
    """Run `script` in a chroot of `lowers` and leave what it changed in `upper`, an overlay layer.

    `inputs` appears there as /mnt. The mounts live in a mount namespace that ends with the script.
    """
    work, merged = upper.with_name(f"{upper.name}.work"), upper.with_name(f"{upper.name}.merged")
    for path in (upper, work, merged):
        path.mkdir(parents=True, exist_ok=True)
    stacked = ":".join(str(p) for p in lowers)
    setup = [
        "set -e",
        f"mount -t overlay overlay -o lowerdir={stacked},upperdir={upper},workdir={work} {merged}",
        f"mount -t tmpfs tmpfs {merged}/tmp",
        f"mount -t proc proc {merged}/proc",
        f"mount --bind /dev {merged}/dev",
    ]
    if inputs is not None:
        setup.append(f"mount --bind {inputs} {merged}/mnt")
    setup.append(f"exec chroot {merged} /bin/sh -c {shlex.quote(script)}")
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
    }
    try:
        run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(setup)], env=environment
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(merged, ignore_errors=True)


MERGED = "/mnt"


def with_merged(layers: Iterable[Path], argv: Sequence[str]) -> None:
    """Run a command of the host that sees the merged layers, read-only, at MERGED."""
    stacked = ":".join(str(p) for p in layers)
    script = f'mount -t overlay overlay -o ro,lowerdir="$1" {MERGED} && shift && exec "$@"'
    run(["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", stacked, *argv])


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """`CACHE/name`, built under a lock when it is not there; a build that fails leaves nothing."""
    path = CACHE / name
    if path.is_dir():
        os.utime(path)
        return path
    require_root()
    with lock(name):
        if path.is_dir():
            return path
        temporary = CACHE / f"tmp-{name}"
        shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed; the lock says it is dead
        try:
            build(temporary)
            os.utime(temporary)  # mmdebstrap gives it the time of a package, which looks long unused
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _prune(f"{name.partition('-')[0]}-")
    return path


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold `CACHE/name.lock`: parallel test workers build a thing once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _prune(prefix: str, *, days: float = 1) -> None:
    """Remove the directories of a prefix that nothing asked for in `days`; a running node mounts its own."""
    for path in CACHE.glob(f"{prefix}*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > days * 86400:
            shutil.rmtree(path, ignore_errors=True)
            (CACHE / f"{path.name}.lock").unlink(missing_ok=True)


def digest(words: Iterable[str]) -> str:
    """A short hash of words, for the name of what is made of them."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


def _quote(value: str) -> str:
    return '"' + value.replace('"', "") + '"'
