# SPDX-License-Identifier: Apache-2.0
"""Memory out of band: big anonymous areas are captured in parallel, dropped before CRIU dumps, filled after.

    find -> capture (durable) -> stop -> drop -> [CRIU's dump] -> guard | fill back, continue
    guard off -> [CRIU's restore, which leaves the processes stopped] -> fill -> continue

Processes whose memory is away are stopped by SIGSTOP, and CRIU dumps and restores them as stopped ones. So
whatever dies (this program, CRIU, an engine), none of them runs on missing memory. docs/memory.md has the
format and the journal's states.
"""
