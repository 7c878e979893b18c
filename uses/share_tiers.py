# SPDX-License-Identifier: Apache-2.0
"""Tiers of `cryoci share`: a member runs, is parked in host memory, or stored on disk or in a registry.

A parked member takes host memory as large as what it held on GPUs. When that is more than may be, the least useful one
of those that nobody waits for is stored (uses/share_shelf.py), and whoever comes for it has it restored from there.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cryoci.errors import ConflictError, CryociError, UsageError
from cryoci.files import read_json
from cryoci.shim import paths
from cryoci.shim.criu.options import parse_size
from cryoci.shim.engines import processes
from cryoci.shim.gpu import nvml, preflight, tasks
from cryoci.uses.guard_state import start_time
from cryoci.uses.metrics import Metric
from cryoci.uses.share_member import Member
from cryoci.uses.share_shelf import Shelf

TIERS = ("running", "host", "disk", "registry", "gone")
_LOOK = 1.0  # seconds between two looks at memory
_RETRY = 300.0  # seconds until a member that could not be stored is tried again
VERSION = 1


@dataclass(frozen=True)
class Limits:
    """Bytes of host memory: parked members take `host` at most (None: as the node has), `reserve` stays free.

    `stores`: whether members are stored at all.
    """

    host: int | None = None
    reserve: int = 0
    stores: bool = False

    @classmethod
    def parse(cls, host: str | None, reserve: str | None, *, stores: bool) -> Limits:
        """Of sizes as people write them; a twentieth of this node's memory is the usual reserve.

        Raises ConfigError, UsageError.
        """
        if host is not None and reserve is not None:
            raise UsageError("--host-memory and --reserve are two ways to say how much", hint="give one")
        return cls(
            None if host is None else parse_size(host, "--host-memory"),
            _total() // 20 if reserve is None else parse_size(reserve, "--reserve"),
            stores or host is not None or reserve is not None,
        )


@dataclass
class State:
    """What /run/cryoci/share/NAME.json says of a member, for others to look at. `used` is Unix time."""

    name: str
    pid: int
    started: int
    tier: str
    used: float
    problem: str = ""

    @property
    def alive(self) -> bool:
        """Does the daemon run?"""
        return self.pid > 0 and start_time(self.pid) == self.started


class Tiers:
    """The tiers of `members`; `say` gets one line about each thing that happened."""

    def __init__(
        self,
        members: Sequence[Member],
        shelf: Shelf,
        limits: Limits,
        policy: str,
        say: Callable[[str], None],
    ) -> None:
        self._members = members
        self._shelf = shelf
        self._limits = limits
        self._policy = policy
        self._say = say
        self._lock = asyncio.Lock()  # room is made for one at a time
        self._counts = dict.fromkeys(("stored", "restored", "failed"), 0)
        self._seconds = dict.fromkeys(("store", "restore"), 0.0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other daemons off these members for a with block. Raises ConflictError, UsageError, OSError."""
        directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as locks:
            for member in self._members:
                if not paths.valid_id(member.name):
                    raise UsageError(f"{member.name!r} is not a name of a container", hint="see `cryoci ps`")
                known = load(member.name)
                if not locks.enter_context(processes.lock(directory() / f"{member.name}.lock")):
                    by = f", by process {known.pid}" if known is not None and known.alive else ""
                    raise ConflictError(
                        f"container {member.name} is shared already{by}", hint="one daemon is enough"
                    )
            try:
                yield
            finally:
                for member in self._members:
                    (directory() / f"{member.name}.json").unlink(missing_ok=True)

    async def begin(self) -> None:
        """See which members are stored. Raises ConfigError, and what `engines.find` raises."""
        for member in self._members:
            member.shelf = self._shelf
            member.stored = await asyncio.to_thread(self._shelf.settle, member.name)

    async def watch(self) -> None:
        """Keep host memory within its limit, and say where everybody is; for ever."""
        await asyncio.gather(self._keep(), self._tell())

    async def _keep(self) -> None:
        while True:
            await self._make_room(0)
            await asyncio.sleep(_LOOK)

    async def _tell(self) -> None:
        while True:
            with suppress(OSError):  # which must not end the work
                await asyncio.to_thread(self._publish)
            await asyncio.sleep(_LOOK)

    async def before_park(self, member: Member) -> None:
        """Make room in host memory for what `member` is about to bring there; never fails."""
        if self._limits.stores:
            await self._make_room(await asyncio.to_thread(self._brings, member))

    async def bring(self, member: Member, others: Callable[[], None] | None = None) -> None:
        """Have `member` run again, from where it is. Raises as `Member.unpark`."""
        made, began = member.stored, time.monotonic()
        if made is not None and self._limits.host is None:
            await self._make_room(made.need)
        await member.move(lambda: member.unpark(others))
        if made is not None:
            self._counts["restored"] += 1
            self._seconds["restore"] = time.monotonic() - began

    def tier(self, member: Member) -> str:
        """Where a member is; one of TIERS."""
        if member.active:
            return "gone" if member.gone else "running"
        if member.stored is not None:
            return member.stored.tier
        return "gone" if member.gone else "host"

    # host memory

    async def _make_room(self, need: int) -> None:
        """Store members until `need` bytes fit, or nobody is left who can be stored."""
        if not self._limits.stores or not await asyncio.to_thread(self._lacks, need):
            return
        async with self._lock:
            while await asyncio.to_thread(self._lacks, need):
                member = self._least_useful()
                if member is None:
                    return
                await self._store(member)

    async def _store(self, member: Member) -> None:
        """Store one. A failure leaves it parked, is told, and keeps it from the next attempts for a while."""
        began = time.monotonic()
        try:
            await member.move(member.storable)
            for close in list(member.closers.values()):
                close()
            await member.move(member.store)
        except (CryociError, OSError) as e:
            member.kept = time.monotonic() + _RETRY
            member.unstored = e.message if isinstance(e, CryociError) else str(e)
            self._counts["failed"] += 1
            self._say(f"{member.name} stays in host memory: {member.unstored}")
            return
        made = member.stored
        if made is not None:
            member.unstored = ""
            self._counts["stored"] += 1
            self._seconds["store"] = time.monotonic() - began
            self._say(
                f"{member.name} left host memory, in {self._seconds['store']:.3f} s: "
                f"{made.size / 1e6:.1f} MB in {made.where}"
            )

    def _lacks(self, need: int) -> bool:
        if self._limits.host is None:
            return need + self._limits.reserve > preflight.available_memory()
        return self.parked() + need > self._limits.host

    def parked(self) -> int:
        """Bytes of host memory that parked members take."""
        return sum(processes.private_memory(m.pid) for m in self._members if self.tier(m) == "host")

    def _brings(self, member: Member) -> int:
        """Bytes that host memory will hold of `member` more than now, or, where parked members are counted, in all."""
        on_gpus = 0
        with suppress(CryociError):  # a node without GPUs
            with nvml.opened() as management:
                on_gpus = sum(tasks.held(member.pid, management.used_by()).values())
        return on_gpus + (0 if self._limits.host is None else processes.private_memory(member.pid))

    def _least_useful(self) -> Member | None:
        """The parked member to store: nobody waits for it, and it can be stored; without clients first."""
        now = time.monotonic()
        free = [
            one
            for one in self._members
            if self.tier(one) == "host" and not (one.wanted or one.busy or one.moving) and now >= one.kept
        ]
        order: dict[str, Callable[[Member], float]] = {
            "lru": lambda one: one.used,
            "priority": lambda one: -one.rank,
            "round-robin": lambda one: one.since,
        }
        return min(free, key=lambda one: (bool(one.connections), order[self._policy](one)), default=None)

    # for others to see

    def _publish(self) -> None:
        me = os.getpid()
        started, now = start_time(me), time.monotonic()
        for member in self._members:
            used = time.time() - (now - max(member.used, member.since))
            problem = member.problem or member.unstored
            state = State(member.name, me, started, self.tier(member), used, problem)
            fresh = directory() / f".{member.name}.{me}"  # no fsync: it is worth nothing after a reboot
            fresh.write_text(json.dumps({"version": VERSION, **asdict(state)}) + "\n")
            fresh.rename(directory() / f"{member.name}.json")

    def metrics(self) -> list[Metric]:
        """Numbers for Prometheus."""
        tiers = [self.tier(member) for member in self._members]
        stored = [(m.name, m.stored.size) for m in self._members if m.stored is not None]
        limit = self._limits.host
        return [
            Metric("cryoci_share_members", "gauge", "Members in each tier.",
                   [({"tier": tier}, tiers.count(tier)) for tier in TIERS]),
            Metric("cryoci_share_host_bytes", "gauge", "Host memory of parked members.", [({}, self.parked())]),
            Metric("cryoci_share_host_limit_bytes", "gauge", "Host memory that they may take.",
                   [] if limit is None else [({}, limit)]),
            Metric("cryoci_share_stored_bytes", "gauge", "What is stored of a member.",
                   [({"member": name}, size) for name, size in stored]),
            Metric("cryoci_share_tier_moves_total", "counter", "Members stored, restored, and failures to store one.",
                   [({"what": what}, count) for what, count in self._counts.items()]),
            Metric("cryoci_share_tier_seconds", "gauge", "How long the last one took.",
                   [({"what": what}, seconds) for what, seconds in self._seconds.items()]),
        ]  # fmt: skip


def _total() -> int:
    """Bytes of this node's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def directory() -> Path:
    """Where the states are."""
    return Path(paths.run_directory()) / "share"


def load(name: str) -> State | None:
    """The state of member `name`, a container's; None without one that can be understood."""
    try:
        value = read_json(directory() / f"{name}.json")
        return State(**value) if value.pop("version") == VERSION else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def every_state() -> list[State]:
    """The states of all members whose daemon runs."""
    files = sorted(directory().glob("[!.]*.json")) if directory().is_dir() else []
    found = [load(file.stem) for file in files]
    return [state for state in found if state is not None and state.alive]
