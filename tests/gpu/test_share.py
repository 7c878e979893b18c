# SPDX-License-Identifier: Apache-2.0
"""Two servers of language models of 8 GB each on one GPU that has room for one, by `cryoci share`."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.gpu import results, serving
from tests.gpu.machine import BASE, Node
from tests.gpu.results import report, spread
from tests.gpu.serving import Hog, Server

GPUS, _REASON = results.gpus()
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
if not GPUS:
    pytestmark.append(pytest.mark.skip(reason=f"no NVIDIA GPU here: {_REASON}"))

LAYERS = int(os.environ.get("GPU_LAYERS", "19"))  # 8.2 GB of weights
PORTS = {"one": 9001, "two": 9002}
SECONDS = float(os.environ.get("GPU_SHARE_SECONDS", "20"))  # of requests at random
CLIENTS = 4
PROMPTS = [[random.Random(n).randrange(32000) for _ in range(16)] for n in range(4)]


def listening(log: Path, count: int) -> None:
    """Wait until the daemon says that all members can be reached."""
    end = time.monotonic() + 30
    while log.read_text().count(" -> ") < count:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


class Clients:
    """People who ask either model at random, for `seconds`."""

    def __init__(self, truth: dict[str, list[object]], seconds: float) -> None:
        self.waits: list[float] = []
        self.problems: list[str] = []
        self._truth = truth
        self._end = time.monotonic() + seconds

    def run(self) -> None:
        """Return when all of them have their last answers."""
        threads = [threading.Thread(target=self._one, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, seed: int) -> None:
        dice = random.Random(seed)
        while time.monotonic() < self._end:
            name, number = dice.choice(sorted(PORTS)), dice.randrange(len(PROMPTS))
            try:
                answer, wait = serving.ask(PORTS[name], PROMPTS[number])
            except Exception as e:  # each of them is a request that failed
                self.problems.append(f"{name}: {e!r}")
                continue
            self.waits.append(wait)
            if answer != self._truth[name][number]:
                self.problems.append(f"{name}: another answer: {answer}")
            time.sleep(dice.uniform(0, 0.3))


def test_share() -> None:
    """No request fails, all answers are those of before, and coming in is measured against a cold start."""
    node = Node("runc")
    models = serving.make_models(*PORTS, layers=LAYERS)
    servers = {
        n: Server(node, f"model-{n}", models[n], port + 100, sleeps=True) for n, port in PORTS.items()
    }
    hog = None
    cold: dict[str, float] = {}
    truth: dict[str, list[object]] = {}
    try:
        for name, server in servers.items():
            answer, cold[name] = server.start(PROMPTS[0])
            truth[name] = [answer, *(serving.ask(server.port, p)[0] for p in PROMPTS[1:])]
            size = serving.held(server)
            if name == "one":
                parked = json.loads(node.cryoci("park", server.name, "--no-hooks", "--json").stdout)
        report("share: GPU memory of a server, GB", round(size / 1e9, 2))
        report("share: cold start to first answer", spread(list(cold.values())))
        report("share: park of an idle server", {k: round(v, 2) for k, v in parked["seconds"].items()})
        hog = Hog(size // 2)
        with sharing(node, "--no-hooks") as log:
            swaps = swap(truth, 2)
            report("share: request to first answer, the other brought out for it", spread(swaps))
            before = serving.huge_pages("always")
            if before:
                try:
                    report("share: the same, huge pages always", spread(swap(truth, 1)))
                finally:
                    serving.huge_pages(before)
            crowd(truth, log)
        with sharing(node) as log:
            swap(truth, 1)  # each gets its host memory, which it keeps
            asleep = swap(truth, 3)
            usual = [serving.ask(PORTS["two"], PROMPTS[1])[1] for _ in range(3)]
            report("share: an answer of the one that is there", spread(usual))
            report("share: the same, with servers that go to sleep (app hooks)", spread(asleep))
            crowd(truth, log)
        hog.end()
        with sharing(node, "--no-hooks"):
            ready = alone(node, servers, truth)
            report("share: request to first answer, the GPU being free", spread(ready))
        fastest = min(cold.values())
        ratio = {
            "with the other out": min(swaps) / fastest,
            "asleep, with the other out": min(asleep) / fastest,
            "GPU free": min(ready) / fastest,
        }
        report("share: of a cold start (goal 0.1)", {k: round(v, 3) for k, v in ratio.items()})
        assert min(swaps) < fastest and min(asleep) < fastest
    finally:
        if hog is not None:
            hog.end()
        for server in servers.values():
            server.remove()


@contextmanager
def sharing(node: Node, *words: str) -> Iterator[Path]:
    """The daemon, once all members can be reached, for a with block; yields its log."""
    log = BASE / "share.log"
    members = [f"--member=model-{n}={port}:{port + 100}" for n, port in PORTS.items()]
    daemon = node.daemon(log, "share", "--active=2", "--patience=1s", *members, *words)
    try:
        listening(log, len(PORTS))
        yield log
    finally:
        daemon.terminate()
        daemon.wait()
        print(log.read_text()[-4000:])


def crowd(truth: dict[str, list[object]], log: Path) -> None:
    """Clients at random, of whom none is refused or gets another answer."""
    clients, before = Clients(truth, SECONDS), log.read_text()
    clients.run()
    text = log.read_text().removeprefix(before)
    report(
        f"share: {CLIENTS} clients at random for {SECONDS:.0f} s",
        {
            "requests": len(clients.waits),
            "failed": len(clients.problems),
            "swaps": text.count(" runs: unparked"),
            "longest wait, s": round(max(clients.waits), 2),
        },
    )
    assert clients.problems == [], clients.problems[:5]
    assert "cannot be" not in text, text


def swap(truth: dict[str, list[object]], rounds: int) -> list[float]:
    """Seconds until the first answer of the one that is out, each time."""
    waits = []
    for _ in range(rounds):
        for name, port in PORTS.items():
            time.sleep(0.5)  # who has just answered keeps its place for a moment
            answer, wait = serving.ask(port, PROMPTS[1])
            assert answer == truth[name][1]
            waits.append(wait)
    return waits[1:]  # the first one may have found its model there


def alone(node: Node, servers: dict[str, Server], truth: dict[str, list[object]]) -> list[float]:
    """Seconds until the first answer of one that is parked while nobody is in its way."""
    waits = []
    for name, server in servers.items():
        node.cryoci("unpark", server.name)
        node.cryoci("park", server.name, "--no-hooks")
        time.sleep(2.5)  # the daemon looks every second what others have parked
        answer, wait = serving.ask(PORTS[name], PROMPTS[2])
        assert answer == truth[name][2]
        waits.append(wait)
    return waits
