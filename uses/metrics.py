# SPDX-License-Identifier: Apache-2.0
"""Numbers of a daemon for Prometheus: the text exposition format 0.0.4, at http://ADDRESS:PORT/metrics.

Written here, not by prometheus_client: what it would add to these few lines is a registry of counters, and every
number here is read from the daemon's own state when it is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from cryoci.errors import ConflictError, UsageError

_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Metric:
    """One metric; `samples` are pairs of label values and number."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    samples: Sequence[tuple[dict[str, str], float]]


def text(metrics: Sequence[Metric]) -> str:
    """What Prometheus reads."""
    lines = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for labels, value in metric.samples:
            inner = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
            head = f"{metric.name}{{{inner}}}" if inner else metric.name
            # to the last digit: rounded to nine, a time of day is right to 100 s
            lines.append(f"{head} {int(value) if value == value // 1 else value!r}")
    return "\n".join(lines) + "\n"


@contextmanager
def serving(address: str | None, read: Callable[[], Sequence[Metric]]) -> Iterator[int]:
    """Serve what `read` gives, for a with block; yields the port (0 and no server when `address` is None).

    Raises UsageError, ConflictError.
    """
    if address is None:
        yield 0
        return
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not host or not int(port) < 65536:
        raise UsageError(f"{address!r} is no address to listen on", hint="write 127.0.0.1:9464")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path.partition("?")[0] == "/metrics"
            body = text(read()).encode() if found else b"see /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", _TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing: scrapes are no news."""

    try:
        server = ThreadingHTTPServer((host, int(port)), Handler)
    except OSError as e:
        raise ConflictError(
            f"cannot listen on {address}: {e.strerror}", hint="give another address to --metrics"
        ) from e
    server.daemon_threads = True
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
