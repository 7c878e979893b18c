# SPDX-License-Identifier: Apache-2.0
"""The two halves of a connection that goes through `cryoci share`: a client's, and the one into its member."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

CHUNK = 1 << 16
_FIRST = 0.1  # seconds for a client's first bytes


async def first(reader: asyncio.StreamReader) -> bytes | None:
    """A client's first bytes, b"" when it waits for the server to begin; None when it has left.

    Servers count the time from a connection to its request, so they get both at once.
    """
    try:
        return await asyncio.wait_for(reader.read(CHUNK), _FIRST) or None
    except TimeoutError:
        return b""


def sever(inner: asyncio.StreamWriter, writer: asyncio.StreamWriter) -> None:
    """End a connection: as usual for its client, by a reset in the frozen container, so that nothing is left of it."""
    with contextlib.suppress(OSError):  # it is closed already
        own = inner.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    inner.transport.abort()
    writer.close()


def end(writer: asyncio.StreamWriter) -> None:
    """Say that nothing more comes; the other side may be gone already."""
    with contextlib.suppress(OSError):
        if writer.can_write_eof():
            writer.write_eof()
