# SPDX-License-Identifier: Apache-2.0
"""A web server of Python that answers with its model, 32 MiB of weights that it makes itself: see web_client.py."""

from __future__ import annotations

import array
import http.server
import json
import random
import sys

WEIGHTS = 4 << 20  # of 8 bytes
STEP = 4099


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else head and body of an answer are 40 ms apart
    weights = array.array("d")
    served = 0

    def do_GET(self) -> None:
        number = int(self.path[1:])
        Handler.served += 1
        told = {"n": number, "sum": sum(self.weights[number::STEP]), "served": Handler.served}
        raw = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: it has no log."""


def main() -> None:
    dice = random.Random(1)
    Handler.weights = array.array("d", (dice.random() for _ in range(1 << 16))) * (WEIGHTS >> 16)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
