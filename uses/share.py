# SPDX-License-Identifier: Apache-2.0
"""`cryoci share`: several containers, of which only some run at a time; clients see all of them.

    client -> proxy -> [is it parked? another one is parked, it is unparked] -> container

A client's bytes are held until its container runs; nothing is refused. A container that is parked while it owes an
answer is unparked again in its turn, for its connections stay open all the while. Where there is room for it, one
comes in before the other goes out. All of this is one event loop; what blocks (park, unpark, connect) is done by
threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from cryoci.errors import ConflictError, CryociError, SpaceError
from cryoci.shim.engines import overview
from cryoci.uses import share_connection, share_turns
from cryoci.uses.metrics import Metric
from cryoci.uses.share_member import Member
from cryoci.uses.share_tiers import Tiers

_CONFLICT_SECONDS = 60.0
_NOTICE = 1.0  # seconds between two looks at what somebody else has parked or unparked
_LOOK = 0.05  # seconds between two looks at who is idle, while somebody waits


class Share:
    """The daemon; `say` gets one line about each thing that happened."""

    def __init__(
        self,
        members: Sequence[Member],
        options: share_turns.Options,
        say: Callable[[str], None],
        *,
        name: str = "share",
        tiers: Tiers | None = None,
    ) -> None:
        self.members = list(members)
        self._tiers = tiers
        self._name = name
        self._options = options
        self._say = say
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: dict[asyncio.Task[None], share_turns.Leaving] = {}

    async def run(self, beside: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serve until SIGTERM or SIGINT; containers stay as they are then. `beside` runs as long, in the same loop.

        Raises ConflictError, NotFoundError, and what `beside` raises.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            # ports first: who is parked for a daemon that cannot start stays parked
            doors = []
            for member in self.members:
                if member.port:
                    doors.append((member, await self._listen(member)))
                    stack.push_async_exit(doors[-1][1])
            await self._begin()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
            for member, server in doors:
                await server.start_serving()
                self._say(f"{member.name}: {member.host}:{member.port} -> {member.inner}")
            parts = [self._schedule, self._notice] + ([beside] if beside is not None else [])
            parts += [self._tiers.watch] if self._tiers is not None else []
            work = [asyncio.ensure_future(part()) for part in parts]
            stopped = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait({*work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in (*work, stopped, *self._tasks):
                task.cancel()
            self._let_go()
            await asyncio.gather(*work, *self._tasks, *self._leaving, return_exceptions=True)
            for one in work:
                if one in done:
                    one.result()
        self._say("ended; members stay as they are: `cryoci unpark NAME` brings one back")

    async def _begin(self) -> None:
        """See which members run; park those that are too many."""
        if self._tiers is not None:
            await self._tiers.begin()
        for member in self.members:
            if member.stored is not None:
                self._say(f"{member.name} is on {member.stored.tier}: {member.stored.where}")
                continue
            await asyncio.to_thread(member.check)
        rows = {row.name: row.state for row in await asyncio.to_thread(overview.rows)}
        for member in self.members:
            if rows.get(member.name) == "paused":
                raise ConflictError(
                    f"container {member.name} is paused by somebody else",
                    hint="let it run, or park it by cryoci",
                )
            member.active = rows.get(member.name) == "running"
            member.since = time.monotonic()
            if member.active:
                member.ready.set()
        for member in [one for one in self.members if one.active][self._options.active :]:
            await self._park(member)

    async def _listen(self, member: Member) -> asyncio.Server:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(member, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        try:
            return await asyncio.start_server(connected, member.host, member.port, start_serving=False)
        except OSError as e:
            raise ConflictError(
                f"cannot listen on {member.host}:{member.port} for {member.name}: {os.strerror(e.errno or 0)}",
                hint="another program has that port: give the member another one",
            ) from e

    # clients

    async def _serve(
        self, member: Member, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One client's connection, from its first byte to its end."""
        key = id(writer)
        member.connections.add(key)
        inner: asyncio.StreamWriter | None = None
        try:
            first = await share_connection.first(reader)
            if first is None:
                return
            if first:
                member.waiting.add(key)
            if not await self._need(member):
                return
            made = await asyncio.to_thread(member.connect)
            answers, inner = await asyncio.open_connection(sock=made)
            member.closers[key] = functools.partial(share_connection.sever, inner, writer)
            member.served += 1
            back = asyncio.create_task(self._answers(member, key, answers, writer))
            try:
                inner.write(first)
                await self._questions(member, key, reader, inner)
                await back
            finally:
                back.cancel()
        except (OSError, CryociError) as e:
            self._say(f"{member.name}: a connection ended: {e.message if isinstance(e, CryociError) else e}")
        finally:
            member.connections.discard(key)
            member.closers.pop(key, None)
            member.waiting.discard(key)
            self._changed.set()
            if inner is not None and not member.active:  # it cannot close its end while it is frozen
                share_connection.sever(inner, writer)
            for end in (inner, writer):
                if end is not None:
                    end.close()

    async def _questions(
        self, member: Member, key: int, reader: asyncio.StreamReader, inner: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(share_connection.CHUNK):
            member.waiting.add(key)
            if not await self._need(member):
                return
            inner.write(data)
            await inner.drain()
        share_connection.end(inner)

    async def _answers(
        self, member: Member, key: int, answers: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while data := await answers.read(share_connection.CHUNK):
            member.touch()
            member.waiting.discard(key)
            self._changed.set()
            writer.write(data)
            await writer.drain()
        share_connection.end(writer)

    async def _need(self, member: Member) -> bool:
        """Wait until the member runs; False when it cannot be brought back."""
        member.touch()
        before = member.failures
        while not member.active:  # it may be parked again before this task has its turn
            if member.failures != before:
                return False
            member.wanted = member.wanted or time.monotonic()
            self._changed.set()
            await member.ready.wait()
        return True

    # who runs

    async def _schedule(self) -> None:
        """Bring in who is wanted, longest first; bring out who is not used."""
        while True:
            waiting = sorted((m for m in self.members if m.wanted and not m.active), key=lambda m: m.wanted)
            for member in self.members:  # parked while it owed answers: it gets its turn
                if not member.active and member.busy and not member.wanted:
                    member.wanted = time.monotonic()
                    waiting.append(member)
            if waiting and await self._bring_in(waiting[0]):
                continue
            if not waiting:
                await self._make_even()
                await self._rest()
            timeout = _LOOK if waiting else self._next_rest()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout)
            self._changed.clear()

    async def _notice(self) -> None:
        """See what others do with members: `cryoci park` and `unpark`, and who restarts one."""
        while True:
            for member in self.members:
                moves = member.moves
                seen = await asyncio.to_thread(member.seen)
                if seen is None or member.moves != moves or member.moving:
                    continue
                if (seen == "gone") != member.gone:
                    self._say(f"{member.name} has ended" if seen == "gone" else f"{member.name} is back")
                member.gone = seen == "gone"
                if not member.gone and (seen == "running") != member.active:
                    self._say(
                        f"{member.name} was {'un' if seen == 'running' else ''}parked by somebody else"
                    )
                    member.active, member.since = seen == "running", time.monotonic()
                    member.rested = False
                    (member.ready.set if member.active else member.ready.clear)()
                    self._changed.set()
            await asyncio.sleep(_NOTICE)

    async def _bring_in(self, member: Member) -> bool:
        """Activate `member`, parking others for it; False when it must wait yet."""
        while sum(one.active for one in self.members) >= self._options.active:
            victim = share_turns.victim(self.members, member, self._options)
            if victim is None:
                return False
            await self._leave(victim)
        how = f"restored from {member.stored.tier}" if member.stored is not None else "unparked"
        began = time.monotonic()
        while True:
            leaving = set(self._leaving)
            try:
                await self._come(member)
                break
            except SpaceError as e:
                if leaving:  # they have given their room by then, or run on
                    await asyncio.wait(leaving)
                    continue
                victim = share_turns.victim(self.members, member, self._options)
                if victim is None and any(one.active for one in self.members):
                    return False  # somebody will be done, or has had the place for long enough
                if victim is None:
                    return self._failed(member, e.message)
                await self._leave(victim)
            except (CryociError, OSError) as e:
                if not isinstance(e, ConflictError) or time.monotonic() - began > _CONFLICT_SECONDS:
                    return self._failed(member, e.message if isinstance(e, CryociError) else str(e))
                await asyncio.sleep(_LOOK)  # a checkpoint of it is under way
        now = time.monotonic()
        member.seconds, waited = now - began, now - member.wanted
        member.active, member.since, member.wanted, member.problem = True, now, 0.0, ""
        member.rested = False
        member.swaps += 1
        member.ready.set()
        self._say(f"{member.name} runs: {how} in {member.seconds:.3f} s, its clients waited {waited:.3f} s")
        return True

    async def _come(self, member: Member) -> None:
        """Have it run again; who leaves goes only then, for the driver would be slower at both at once."""
        leaving = list(self._leaving.values())
        others = functools.partial(share_turns.all_lulled, leaving) if leaving else None
        try:
            if self._tiers is not None:
                await self._tiers.bring(member, others)
            else:
                await member.move(functools.partial(member.unpark, others))
        finally:
            self._let_go()

    def _failed(self, member: Member, why: str) -> bool:
        """Let its clients go: they are told by a closed connection, and the next one is tried anew."""
        member.failures += 1
        member.problem, member.wanted = why, 0.0
        member.waiting.clear()
        member.ready.set()
        member.ready.clear()  # those who wait were woken already
        self._say(f"{member.name} cannot be brought back: {why}")
        return True

    async def _park(self, member: Member) -> None:
        """Bring it out; it runs on when that fails."""
        if self._tiers is not None:
            await self._tiers.before_park(member)
        await self._out(member)

    async def _out(self, member: Member, lulled: Callable[[], None] = lambda: None) -> None:
        """`lulled` is called when its application has prepared itself."""
        member.active = False
        member.ready.clear()
        began = time.monotonic()
        try:
            await member.move(lambda: member.park(lulled))
        except (CryociError, OSError) as e:
            member.active = True  # it runs on, as parking promises
            member.ready.set()
            member.failures += 1
            member.used = time.monotonic()  # somebody else is next
            member.problem = e.message if isinstance(e, CryociError) else str(e)
            self._say(f"{member.name} cannot be parked: {member.problem}")
            await asyncio.sleep(1)
            self._changed.set()
            return
        self._say(f"{member.name} is parked, in {time.monotonic() - began:.3f} s")

    async def _leave(self, member: Member) -> None:
        """Begin to bring it out: another one may come in meanwhile, as far as it finds room."""
        if self._tiers is not None:
            await self._tiers.before_park(member)
        leaving = share_turns.Leaving()
        task = asyncio.create_task(self._out(member, leaving.prepared))
        self._leaving[task] = leaving

        def left(task: asyncio.Task[None]) -> None:
            self._leaving.pop(task).lulled.set()

        task.add_done_callback(left)
        await asyncio.sleep(0)  # it has begun

    def _let_go(self) -> None:
        for leaving in self._leaving.values():
            leaving.go.set()

    async def _make_even(self) -> None:
        """Park whom nobody asks while too many run: one did not leave, and its successor was in already."""
        running = [one for one in self.members if one.active and not one.busy]
        if self._leaving or sum(one.active for one in self.members) <= self._options.active or not running:
            return
        await self._park(min(running, key=lambda one: one.used))

    async def _rest(self) -> None:
        """Park who has not been used for long."""
        if self._options.idle is None:
            return
        for member in self.members:
            last = max(member.used, member.since)
            if (
                member.active
                and not member.busy
                and not member.gone
                and time.monotonic() - last >= self._options.idle
            ):
                await self._park(member)
                member.rested = not member.active

    def _next_rest(self) -> float | None:
        """Seconds until somebody may have to rest; None when nobody ever has."""
        if self._options.idle is None or not any(one.active for one in self.members):
            return None
        lasts = [
            max(one.used, one.since) for one in self.members if one.active and not one.busy and not one.gone
        ]
        return max(_LOOK, min(lasts, default=time.monotonic()) + self._options.idle - time.monotonic())

    def metrics(self) -> list[Metric]:
        """Numbers for Prometheus."""

        def each(
            name: str, kind: Literal["gauge", "counter"], text: str, value: Callable[[Member], float]
        ) -> Metric:
            return Metric(
                f"cryoci_{self._name}_{name}",
                kind,
                text,
                [({"member": m.name}, value(m)) for m in self.members],
            )

        tiers = self._tiers.metrics() if self._tiers is not None else []
        return [
            *tiers,
            each("active", "gauge", "1 while the member runs.", lambda m: float(m.active)),
            each("connections", "gauge", "Open connections.", lambda m: len(m.connections)),
            each("waiting", "gauge", "Connections to which an answer is owed.", lambda m: len(m.waiting)),
            each("served_total", "counter", "Connections that reached the member.", lambda m: m.served),
            each("swaps_total", "counter", "Times that the member was unparked.", lambda m: m.swaps),
            each("failures_total", "counter", "Parks and unparks that failed.", lambda m: m.failures),
            each("unpark_seconds", "gauge", "How long the last unpark took.", lambda m: m.seconds),
        ]
