# SPDX-License-Identifier: Apache-2.0
"""A machine node: the node tree with Debian's own kernel under qemu, for what the host's kernel cannot give.

cgroup v2 controllers, soft-dirty, engines with their defaults. Software emulation only (`-accel tcg`): where
/dev/kvm exists in a virtual machine its guests often die in the decompressor. One processor: with two, each on a
thread of its own, emulation is not faithful when the kernel patches its own code (CRIU's breakpoints switch
perf_sched_events in __schedule on and off), and the kernel panics with "Oops: int3" in one of two runs of the tests.
Commands go over virtio-serial to guest.py.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import queue
import shutil
import socket
import struct
import subprocess
import tarfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from cryoci.command import which
from tests.nodes import defaults, tree, workload
from tests.nodes.network import Switch
from tests.nodes.node import Node, NodeError, Result
from tests.nodes.supervisor import Supervisor

KERNEL_PACKAGES = ("busybox-static", "linux-image-cloud-amd64")
DISK_MIB = 16384  # sparse
CHANNELS = 6  # commands that can run at the same time
GUEST = Path(__file__).with_name("guest.py")
SHORT, PATIENCE = (
    10.0,
    3.0,
)  # what takes long may take longer still here; shorter limits are meant as they are
BOOT_TIMEOUT = 120.0  # seconds; 15 are usual, software emulation on a busy machine takes longer
# The counter in podman's storage, which takes an emulated processor 15 s. On a tmpfs first, as an overlay cannot have
# another as its upper directory.
_LOAD = f"""
skopeo copy -q oci-archive:{workload.ARCHIVE} 'containers-storage:[overlay@/tmp/storage+/tmp/run]{workload.IMAGE}'
mkdir -p /var/lib/containers && cp -a /tmp/storage /var/lib/containers/storage
"""
# The only module that is needed before the root file system is there.
_INIT = """#!/bin/sh
mount -t devtmpfs dev /dev
insmod /virtio_blk.ko
for i in 1 2 3 4 5 6 7 8 9; do [ -b /dev/vdb ] && break; sleep 0.1; done
mount -t ext4 -o rw,noatime /dev/vda /root || exec sh
tar -x -f /dev/vdb -C /root
mount -t devtmpfs dev /root/dev
exec switch_root /root /usr/bin/python3 -IS /opt/node/guest.py
"""


def kernel() -> Path:
    """A directory with /boot/vmlinuz-*, /usr/lib/modules and a static busybox, as packaged."""
    name = f"kernel-{tree.digest([tree.SUITE, *KERNEL_PACKAGES])}"
    return tree.cached(name, lambda path: tree.mmdebstrap(path, KERNEL_PACKAGES, variant="extract"))


def image() -> Path:
    """A directory with `root.ext4`, `vmlinuz` and `initrd`, all but cryoci itself (about 20 s to make)."""
    lowers = [workload.layer(), tree.dependencies(), tree.debian()]
    base = kernel()
    name = f"machine-{tree.digest([base.name, *(p.name for p in lowers), _INIT, _LOAD, str(DISK_MIB)])}"

    def build(path: Path) -> None:
        path.mkdir(parents=True)
        version = next(p.name for p in (base / "usr/lib/modules").iterdir())
        os.link(base / f"boot/vmlinuz-{version}", path / "vmlinuz")
        module = next((base / "usr/lib/modules" / version).rglob("virtio_blk.ko*"))
        driver = module.read_bytes()
        driver = lzma.decompress(driver) if module.suffix == ".xz" else driver
        busybox = next(base.glob("**/bin/busybox")).read_bytes()
        (path / "initrd").write_bytes(_initrd(busybox, driver))
        disk = path / "root.ext4"
        with disk.open("wb") as f:
            f.truncate(DISK_MIB << 20)
        script = (
            f"set -e; cp -a /mnt/usr/lib/modules /usr/lib/; depmod {version}; mkdir -p /opt/node\n{_LOAD}"
        )
        tree.make_layer(path / "upper", lowers, script, inputs=base)
        mke2fs = which("mke2fs", package="e2fsprogs")
        options = ["-m", "0", "-O", "^metadata_csum", "-E", "lazy_itable_init=1,lazy_journal_init=1"]
        tree.with_merged(
            [path / "upper", *lowers],
            [mke2fs, "-q", "-F", "-t", "ext4", *options, "-d", tree.MERGED, str(disk)],
        )
        shutil.rmtree(path / "upper")

    return tree.cached(name, build)


class Machine(Node):
    """A virtual machine; made by `Cluster.machine`. `console` is its serial console's log on the host."""

    def __init__(self, cgroup: Path, switch: Switch, name: str, index: int) -> None:
        self.name = name
        self.address = defaults.address(index)
        self.cgroup = cgroup
        self.console = Path()
        self._switch = switch
        self._port = f"port{index}"
        self._index = index
        self._supervisor: Supervisor | None = None
        self._channels: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        self._open: list[Channel] = []

    def start(self, files: Mapping[str, str], *, run: Path, memory_mib: int) -> None:
        """Boot it with `files` (path to text) and this checkout; sockets and console are in `run`."""
        program = which("qemu-system-x86_64", package="qemu-system-x86")
        base, layer = image(), tree.checkout()
        run.mkdir(parents=True)
        self.console = run / "console.log"
        settings = {"name": self.name, "address": self.address, "gateway": f"{defaults.SUBNET}.1"}
        _write_tar(run / "layer.tar", layer, {**files, "/opt/node/node.json": json.dumps(settings)})
        self._switch.tap(self._port)
        argv = [
            program, "-name", self.name, "-accel", "tcg,thread=single", "-cpu", "max", "-smp", "1",
            "-m", str(memory_mib), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", str(base / "vmlinuz"), "-initrd", str(base / "initrd"),
            "-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on tsc=unstable",
            "-serial", f"file:{self.console}",
            "-drive", f"file={base / 'root.ext4'},if=virtio,format=raw,snapshot=on,cache=unsafe",
            "-drive", f"file={run / 'layer.tar'},if=virtio,format=raw,readonly=on",
            "-netdev", f"tap,id=n0,ifname={self._port},script=no,downscript=no",
            "-device", f"virtio-net-pci,netdev=n0,mac=52:54:00:77:00:{self._index + 2:02x}",
            "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
        ]  # fmt: skip
        for i in range(CHANNELS):
            argv += ["-chardev", f"socket,id=c{i},path={run}/c{i},server=on,wait=off"]
            argv += ["-device", f"virtserialport,chardev=c{i},name=node{i}"]
        self._supervisor = Supervisor({
            "name": self.name, "cgroup": str(self.cgroup), "argv": argv, "netns": self._switch.path,
            "log": str(run / "qemu.log"),
        })  # fmt: skip
        for i in range(CHANNELS):
            channel = Channel(run / f"c{i}", self._supervisor)
            self._open.append(channel)
            self._channels.put(channel)

    def wait(self) -> None:
        """Wait until it has booted and answers. Raises NodeError with the console's last lines."""
        end = time.monotonic() + BOOT_TIMEOUT
        try:
            self.run(["true"], timeout=end - time.monotonic())
        except (NodeError, OSError) as e:
            raise NodeError(f"machine {self.name} did not come up: {e}\n{self._last_words()}") from e

    def _last_words(self) -> str:
        """The end of its console, where a panic of its kernel stands, and of qemu's own log."""
        logs = (self.console, self.console.with_name("qemu.log"))
        return "".join(p.read_text(errors="replace")[-4000:] for p in logs if p.exists())

    @property
    def alive(self) -> bool:
        return self._supervisor is not None and self._supervisor.alive

    def cut(self) -> None:
        self._switch.ip(f"link set {self._port} down")

    def join(self) -> None:
        self._switch.ip(f"link set {self._port} up")

    def kill(self) -> None:
        if self._supervisor is None:
            return
        self._supervisor.stop()
        for channel in self._open:
            channel.close()
        self._supervisor = None

    def _execute(
        self, argv: list[str], input: bytes | None, timeout: float | None, env: Mapping[str, str]
    ) -> Result:
        if not self.alive:
            raise NodeError(f"machine {self.name} is not running")
        if timeout is not None and timeout >= SHORT:
            timeout *= PATIENCE
        channel = self._channels.get(timeout=timeout)
        try:
            return channel.execute(argv, input, timeout, env)
        except Dead as e:
            raise NodeError(f"{e}; its last words:\n{self._last_words()}") from None
        finally:
            self._channels.put(channel)

    def _by_hand(self) -> str:
        return f"(in machine {self.name}, console {self.console})"


class Dead(NodeError):
    """The machine ended while a command ran in it."""


class Channel:
    """One virtio-serial port; guest.py at its other end runs one command at a time.

    A frame is a kind (1 byte), a length (4 bytes, network order) and that many bytes.
    """

    def __init__(self, path: Path, supervisor: Supervisor) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end = time.monotonic() + 20
        while True:  # qemu makes the socket a moment after it starts
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > end or not supervisor.alive:
                    log = path.with_name("qemu.log")
                    said = log.read_text(errors="replace") if log.exists() else ""
                    raise NodeError(f"qemu does not run: {said}") from None
                time.sleep(0.02)

    def execute(
        self, argv: list[str], input: bytes | None, timeout: float | None, env: Mapping[str, str]
    ) -> Result:
        """Run a command and wait. Raises subprocess.TimeoutExpired; NodeError when the machine dies."""
        end = None if timeout is None else time.monotonic() + timeout
        sender = threading.Thread(target=self._send_all, args=(argv, input, env), daemon=True)
        sender.start()
        out, err = bytearray(), bytearray()
        expired = False
        while True:
            left = None if end is None or expired else end - time.monotonic()
            try:
                kind, data = self._receive(left)
            except TimeoutError:
                if expired:
                    raise NodeError("the machine does not answer any more") from None
                expired = True
                self._send(b"k", b"")
                continue
            if kind == b"o":
                out += data
            elif kind == b"r":
                err += data
            elif kind == b"x":
                sender.join()
                if expired:
                    raise subprocess.TimeoutExpired(argv, timeout or 0, bytes(out), bytes(err))
                return Result(argv, struct.unpack("!i", data)[0], bytes(out), bytes(err))

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _send_all(self, argv: list[str], input: bytes | None, env: Mapping[str, str]) -> None:
        try:
            self._send(
                b"c", json.dumps({"argv": argv, "env": dict(env), "input": input is not None}).encode()
            )
            for start in range(0, len(input or b""), 1 << 16):
                self._send(b"i", (input or b"")[start : start + (1 << 16)])
            if input is not None:
                self._send(b"e", b"")
        except OSError:
            pass  # the machine died; the reader says so

    def _send(self, kind: bytes, data: bytes) -> None:
        self._socket.settimeout(None)
        self._socket.sendall(kind + struct.pack("!I", len(data)) + data)

    def _receive(self, timeout: float | None) -> tuple[bytes, bytes]:
        head = self._read(5, timeout)
        return head[:1], self._read(struct.unpack("!I", head[1:])[0], 30)

    def _read(self, size: int, timeout: float | None) -> bytes:
        data = b""
        while len(data) < size:
            self._socket.settimeout(None if timeout is None else max(timeout, 0.01))
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise Dead("the machine died")
            data += piece
        return data


def _initrd(busybox: bytes, driver: bytes) -> bytes:
    """A cpio (newc) with busybox, the disk's driver and the script that finds the root."""
    out = io.BytesIO()

    def add(name: str, mode: int, data: bytes = b"", *, inode: int) -> None:
        fields = [inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        out.write(b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0")
        out.write(b"\0" * (-out.tell() % 4))
        out.write(data + b"\0" * (-len(data) % 4))

    entries: list[tuple[str, int, bytes]] = [(d, 0o040755, b"") for d in ("bin", "dev", "proc", "root")]
    entries += [("bin/busybox", 0o100755, busybox), ("virtio_blk.ko", 0o100644, driver)]
    applets = ("sh", "mount", "insmod", "sleep", "tar", "switch_root", "[")
    entries += [(f"bin/{a}", 0o120777, b"busybox") for a in applets]
    entries += [("init", 0o100755, _INIT.encode())]
    for inode, (name, mode, data) in enumerate(entries, 1):
        add(name, mode, data, inode=inode)
    add("TRAILER!!!", 0, inode=0)
    return out.getvalue()


def _write_tar(path: Path, layer: Path, files: Mapping[str, str]) -> None:
    """What is unpacked over the root at boot: cryoci, the guest's agent, files of this node."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for child in sorted(layer.iterdir()):
            tar.add(child, arcname=child.name)
        tar.add(GUEST, arcname="opt/node/guest.py")
        for name, text in files.items():
            info = tarfile.TarInfo(name.lstrip("/"))
            raw = text.encode()
            info.size, info.mode, info.mtime = len(raw), 0o644, int(time.time())
            tar.addfile(info, io.BytesIO(raw))
