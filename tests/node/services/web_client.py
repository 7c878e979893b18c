# SPDX-License-Identifier: Apache-2.0
"""A client of a web server over one connection that is never opened again: asks in a thread, as fast as it can.

The server answers /N with {"n": N, "sum": ..., "served": ...}: the same sum for the same N each time, and how many it
has served. Requests on stdin, answers on stdout: load (begin to ask), info (answers so far), stop (end of the load).
"""

from __future__ import annotations

import http.client
import json
import sys
import threading

TIMEOUT = 60  # seconds, of one answer: the server is away for a while
DIFFERENT = 50


class Load(threading.Thread):
    """Asks until it is stopped; `written` answers came, and `wrong` of them were others than before."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.web = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        self.web.auto_open = False
        self.web.connect()
        self.written, self.wrong, self.on, self.error = 0, 0, True, ""
        self.sums: dict[int, int] = {}

    def run(self) -> None:
        try:
            while self.on:
                number = self.written % DIFFERENT
                self.web.request("GET", f"/{number}")
                told = json.loads(self.web.getresponse().read())
                self.written += 1
                same = self.sums.setdefault(number, told["sum"]) == told["sum"]
                self.wrong += not (same and told["n"] == number and told["served"] == self.written)
        except Exception as e:
            self.error = f"{type(e).__name__}: {e}"


def main() -> None:
    load = Load(int(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)["ask"]
        if asked == "load":
            load.start()
        elif asked == "stop":
            load.on = False
            load.join()
        print(json.dumps({"written": load.written, "wrong": load.wrong, "error": load.error}), flush=True)


if __name__ == "__main__":
    main()
