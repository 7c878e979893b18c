#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Round trips by the thousand: do the daemons stay as small as they were, and does every container keep its state?

    python -m bench.soak [--parks 1000] [--restores 100] [--kills 30] [--guarded 100]      in a fresh test node (root)

Containers with a CUDA process each, on the driver that stands in for NVIDIA's, with real CRIU and runc. Four phases:
`cryoci share` parks one and unparks the other at each request; with no host memory for parked members it checkpoints
one to disk and restores the other; that daemon is killed at random moments; `cryoci guard` checkpoints one again and
again. At every answer the bytes in GPU memory are compared with their digest, and the counter there must have gone on.
Between rounds it is read what each daemon holds, and what lies about on the node. Prints markdown tables; ends with 1
when something has grown.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bench.share import Client, holds
from tests.fakegpu import build
from tests.node import gpu
from tests.node.gpu import Trainer
from tests.nodes import workload
from tests.nodes.cluster import Cluster
from tests.nodes.namespace import NamespaceNode

_ROWS = 10  # of a table
_READS = 4
_RSS_MIB, _FEW = 8, 3  # growth that is none: what an allocator keeps, descriptors and files of the moment
_COLUMNS = ("round", "memory, MiB", "descriptors", "threads", "zombies", "processes", "files", "mounts")
_FILES = "find /run/cryoci /var/lib/cryoci /srv/parked -type f ! -name '*.log' 2>/dev/null | wc -l"


@dataclass
class Phase:
    """One soak: what was held after so many rounds, and the seconds of each round."""

    title: str
    rows: list[tuple[int, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def look(self, node: NamespaceNode, daemon: str, number: int) -> None:
        """Read what the daemon and the node hold after round `number`."""
        pid = int(node.sh(f"pgrep -f '/cryoci {daemon}'").split()[0])
        seen = []
        for _ in range(_READS):  # it works meanwhile: the least is what it keeps
            stats = node.sh("ps -eo stat=").split()
            zombies = sum(one.startswith("Z") for one in stats)
            mounts = len(node.read("/proc/self/mountinfo").splitlines())
            seen.append((*holds(node, pid), zombies, len(stats), int(node.sh(_FILES)), mounts))
        self.rows.append((number, *map(min, zip(*seen, strict=True))))

    def grown(self) -> list[str]:
        """What is always larger in the last third of the rounds than it ever was in the first, by more than noise."""
        third = max(1, len(self.rows) // 3)
        early = map(max, zip(*self.rows[:third], strict=True))
        late = map(min, zip(*self.rows[-third:], strict=True))
        return [
            f"{self.title}: {column} {was} -> {now}"
            for column, was, now in list(zip(_COLUMNS, early, late, strict=True))[1:]
            if now - was > (_RSS_MIB if column.startswith("memory") else _FEW)
        ]

    def report(self) -> None:
        """Print it."""
        times = sorted(self.seconds)
        middle, late = times[len(times) // 2], times[len(times) * 95 // 100]
        print(f"\n## {self.title}\n\n{len(times)} rounds, median {middle:.3f} s, 95 % within {late:.3f} s\n")
        print("| " + " | ".join(_COLUMNS) + " |\n|" + "---:|" * len(_COLUMNS))
        for row in self.rows:
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


class Models:
    """Containers that serve at 8000, and clients' ports 9000 and 9001; every answer is looked at."""

    def __init__(self, node: NamespaceNode) -> None:
        self._node = node
        self._counts = {9000: 0, 9001: 0}
        self._pids: dict[int, tuple[int, str]] = {}
        one = build.devices(build.UUIDS[:1])
        gpu.equip(node, one)
        self.models = [Trainer(node, f"model{n}", devices=one, mib=4, port=8000).start() for n in (0, 1)]
        self._client = Client(node)

    @property
    def members(self) -> list[str]:
        return [word for n in (0, 1) for word in ("--member", f"model{n}=900{n}:8000")]

    def ask(self, port: int) -> None:
        """A request; the answer must be of the same process, later than the last, with intact memory."""
        said, _ = self._client.ask(port)
        state = json.loads(said) if said else {}
        known = self._pids.setdefault(port, (state.get("pid", 0), state.get("uuid", "")))
        same = known == (state.get("pid"), state.get("uuid"))
        if not (state.get("good") and same and state["count"] > self._counts[port]):
            raise SystemExit(f"at {port}: {said or 'no answer'}, after {self._counts[port]} steps")
        self._counts[port] = state["count"]


@contextlib.contextmanager
def daemon(node: NamespaceNode, *words: str) -> Iterator[None]:
    """`cryoci WORDS` for the time of a with block; its log goes to stderr when something fails."""
    process = node.popen(
        ["sh", "-c", 'exec "$@" >>/srv/soak.log 2>&1', "sh", "cryoci", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    except BaseException:
        sys.stderr.write(node.sh("tail -n 30 /srv/soak.log"))
        raise
    finally:
        node.run(["pkill", "-TERM", "-f", f"/cryoci {words[0]}"], check=False)
        process.wait(60)


def soak(phase: Phase, rounds: int, act: Callable[[int], None], look: Callable[[int], None]) -> Phase:
    """Do `act` so often."""
    for number in range(1, rounds + 1):
        began = time.monotonic()
        act(number)
        phase.seconds.append(time.monotonic() - began)
        if number % max(1, rounds // _ROWS) == 0 or number == rounds:
            look(number)
    phase.report()
    return phase


def share(node: NamespaceNode, models: Models, phase: Phase, rounds: int, *words: str) -> Phase:
    """Each round is one request, to one and the other in turn: one container leaves, the other comes."""
    with daemon(node, "share", *models.members, *words):
        await_listening(node, 9001)
        for port in (9001, 9000):
            models.ask(port)
        return soak(
            phase,
            rounds,
            lambda number: models.ask(9000 + number % 2),
            lambda number: phase.look(node, "share", number),
        )


def guard(node: NamespaceNode, model: Trainer, phase: Phase, rounds: int) -> Phase:
    """Each round is one checkpoint that leaves the container running."""

    def taken() -> int:
        asked = node.run(["cryoci", "guard", "status", model.name, "--json"], check=False)
        return int(json.loads(asked.stdout)[0]["state"]["taken"]) if asked.returncode == 0 else 0

    def one_more(number: int) -> None:
        end = time.monotonic() + 120
        while taken() < number:
            if time.monotonic() > end:
                raise SystemExit(f"the guard has taken no checkpoint {number}")
            time.sleep(0.05)

    words = ["guard", model.name, "--every", "100ms", "--to", "tmpfs", "--rootfs", "none"]
    with daemon(node, *words):
        soak(phase, rounds, one_more, lambda number: phase.look(node, "guard", number))
    model.runs_on()
    return phase


def killed(node: NamespaceNode, models: Models, phase: Phase, rounds: int, *words: str) -> Phase:
    """Each round kills the daemon at some moment of a request; the next one must serve both from where they were."""
    chance = random.Random(7)
    request = (
        "import sys, urllib.request as u; u.urlopen(f'http://127.0.0.1:{sys.argv[1]}/', timeout=60).read()"
    )

    def kill(number: int) -> None:
        with daemon(node, "share", *models.members, *words):
            await_listening(node, 9001)
            client = node.popen(["python3", "-c", request, str(9000 + chance.randrange(2))])
            time.sleep(chance.uniform(0.1, 3))
            node.run(["pkill", "-KILL", "-f", "/cryoci share"])
            client.communicate()
        with daemon(node, "share", *models.members, *words):
            await_listening(node, 9001)
            for port in (9001, 9000):
                models.ask(port)
            if number % max(1, rounds // _ROWS) == 0 or number == rounds:
                phase.look(node, "share", number)

    return soak(phase, rounds, kill, lambda number: None)


def await_listening(node: NamespaceNode, port: int) -> None:
    end = time.monotonic() + 60
    while f":{port} " not in node.sh("ss -Hltn"):
        if time.monotonic() > end:
            raise SystemExit(f"nobody listens at {port}: {node.sh('tail /srv/soak.log')}")
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--parks", type=int, default=1000, help="requests that park one and unpark the other"
    )
    parser.add_argument(
        "--restores", type=int, default=100, help="requests that checkpoint one and restore the other"
    )
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs of a daemon in the middle of those")
    parser.add_argument("--guarded", type=int, default=100, help="checkpoints by a guard")
    options = parser.parse_args()
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, Python {platform.python_version()}, "
        f"Linux {platform.release()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    done = []
    with Cluster(tag="bench") as cluster:
        node = cluster.start("node")
        workload.load(node)
        models = Models(node)
        if options.parks:
            done.append(share(node, models, Phase("Parked and unparked"), options.parks))
        words = ("--host-memory", "0", "--disk", "/srv/parked")
        if options.restores:
            done.append(share(node, models, Phase("To disk and back"), options.restores, *words))
        if options.kills:
            done.append(killed(node, models, Phase("Killed"), options.kills, *words))
        if options.guarded:
            last = 0 if options.kills else (options.restores or options.parks) % 2  # who was asked last runs
            model = models.models[last]
            done.append(guard(node, model, Phase("Guarded"), options.guarded))
    grown = [line for phase in done for line in phase.grown()]
    print("\nGrown: " + ("nothing" if not grown else "; ".join(grown)))
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
