# SPDX-License-Identifier: Apache-2.0
"""Open files and sockets of a checkpoint: fdinfo-*.img names them by number, files.img says what they are."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from cryoci.ociimage.criu.image import Images, messages
from cryoci.protobuf import Message

# fd_types of fdinfo.proto, and the field of file_entry with the details
_KINDS = {
    1: ("file", 3),
    2: ("pipe", 18),
    3: ("fifo", 17),
    4: ("inet socket", 4),
    5: ("unix socket", 16),
    6: ("eventfd", 8),
    7: ("epoll", 9),
    8: ("inotify", 13),
    9: ("signalfd", 10),
    10: ("packet socket", 6),
    11: ("terminal", 19),
    12: ("fanotify", 14),
    13: ("netlink socket", 7),
    14: ("namespace", 5),
    15: ("tun", 11),
    16: ("external", 15),
    17: ("timerfd", 12),
    18: ("memfd", 20),
    19: ("bpf map", 21),
    20: ("pidfd", 22),
}
_INET, _INET6 = 2, 10
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 136: "udplite"}
_TYPES = {1: "stream", 2: "dgram", 3: "raw", 5: "seqpacket"}
_STATES = {  # include/net/tcp_states.h
    1: "established",
    2: "syn-sent",
    3: "syn-recv",
    4: "fin-wait-1",
    5: "fin-wait-2",
    6: "time-wait",
    7: "close",
    8: "close-wait",
    9: "last-ack",
    10: "listen",
    11: "closing",
}
_SEND, _RECEIVE = 1, 2  # so_sndbuf, so_rcvbuf of sk-opts.proto


@dataclass(frozen=True)
class OpenFile:
    """A file descriptor: `what` is a path, or what can be said of the object."""

    fd: int
    kind: str
    what: str
    position: int | None = None


@dataclass(frozen=True)
class Socket:
    """A socket; addresses are HOST:PORT, or a unix socket's name. Buffers are in bytes."""

    fd: int
    protocol: str
    state: str
    source: str
    destination: str
    send_buffer: int = 0
    receive_buffer: int = 0


class Files:
    """All open files of a checkpoint, by CRIU's own ids."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._entries: dict[int, Message] = {}
        self._peers: dict[int, str] = {}
        if "checkpoint/files.img" not in images.names():
            return
        for entry in messages(images.read("checkpoint/files.img"), "files", "files.img"):
            self._entries[entry.number(2)] = entry
            if 16 in entry:
                unix = entry.message(16)
                self._peers[unix.number(2)] = _unix_name(unix)

    def path(self, file_id: int) -> str:
        """The path of a regular file or directory, such as a program or a working directory."""
        entry = self._entries.get(file_id)
        return entry.message(3).text(6) if entry is not None and 3 in entry else ""

    def mode(self, file_id: int) -> int:
        """Its st_mode; 0 when the image does not say."""
        entry = self._entries.get(file_id)
        return entry.message(3).number(10) if entry is not None and 3 in entry else 0

    def table(self, files_id: int) -> tuple[list[OpenFile], list[Socket]]:
        """The descriptors in one table (fdinfo-ID.img), in order of their numbers."""
        name = f"checkpoint/fdinfo-{files_id}.img"
        if name not in self._images.names():
            return [], []
        files, sockets = [], []
        for info in messages(self._images.read(name), "fdinfo", name):
            fd, kind, entry = info.number(4), info.number(3), self._entries.get(info.number(1))
            word, field = _KINDS.get(kind, (f"type {kind}", 0))
            detail = entry.message(field) if entry is not None and field else Message(b"")
            if kind == 4:
                sockets.append(_inet(fd, detail))
            elif kind == 5:
                sockets.append(self._unix(fd, detail))
            elif kind in (10, 13):
                state = _STATES.get(detail.number(4), "") if kind == 13 else ""
                sockets.append(Socket(fd, word.partition(" ")[0], state, "", ""))
            position = detail.number(3) if kind == 1 else None
            files.append(OpenFile(fd, word, self._what(kind, detail), position))
        return sorted(files, key=lambda f: f.fd), sorted(sockets, key=lambda s: s.fd)

    def _what(self, kind: int, detail: Message) -> str:
        if kind == 1:
            return detail.text(6)
        if kind in (2, 3):
            return f"pipe:[{detail.number(2)}]"
        if kind == 4:
            socket = _inet(0, detail)
            return f"{socket.protocol} {socket.source} -> {socket.destination}"
        if kind == 5:
            return _unix_name(detail) or f"socket:[{detail.number(2)}]"
        if kind == 11:
            return f"tty {detail.number(2)}"
        return ""

    def _unix(self, fd: int, unix: Message) -> Socket:
        peer = unix.number(8)
        name = _unix_name(unix) or f"[{unix.number(2)}]"
        other = (self._peers.get(peer) or f"[{peer}]") if peer else ""
        protocol = f"unix {_TYPES.get(unix.number(3), '')}".strip()
        send, receive = _buffers(unix.message(10))
        return Socket(fd, protocol, _STATES.get(unix.number(4), ""), name, other, send, receive)


def _inet(fd: int, socket: Message) -> Socket:
    family, kind, protocol = socket.number(3), socket.number(4), socket.number(5)
    word = _PROTOCOLS.get(protocol, _TYPES.get(kind, f"protocol {protocol}"))
    source = _address(family, socket.numbers(11), socket.number(7))
    destination = _address(family, socket.numbers(12), socket.number(8))
    send, receive = _buffers(socket.message(14))
    state = _STATES.get(socket.number(6), "")
    return Socket(fd, word + ("6" if family == _INET6 else ""), state, source, destination, send, receive)


def _address(family: int, words: list[int], port: int) -> str:
    count = 4 if family == _INET6 else 1
    raw = b"".join(struct.pack("<I", word & 0xFFFFFFFF) for word in words[:count]).ljust(4 * count, b"\0")
    host = str(ipaddress.IPv6Address(raw)) if family == _INET6 else str(ipaddress.IPv4Address(raw))
    return f"[{host}]:{port}" if family == _INET6 else f"{host}:{port}"


def _buffers(options: Message) -> tuple[int, int]:
    return options.number(_SEND), options.number(_RECEIVE)


def _unix_name(unix: Message) -> str:
    name = unix.data(11)
    text = name.rstrip(b"\0").decode(errors="replace")
    return f"@{text[1:]}" if name[:1] == b"\0" and text else text.lstrip("\0")
