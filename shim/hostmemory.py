# SPDX-License-Identifier: Apache-2.0
"""Memory that this node has left."""

from __future__ import annotations


def available_memory() -> int:
    """Bytes of memory that can be had without swapping (MemAvailable, proc_meminfo(5)). Raises OSError."""
    with open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0
