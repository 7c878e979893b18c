# SPDX-License-Identifier: Apache-2.0
"""A client of PostgreSQL over two connections that are never opened again: one inserts rows, each a transaction of
its own, as fast as it can; the other is in the middle of a sorted query.

Requests on stdin, answers on stdout: load (begin to write), info (rows committed so far), stop (end of the load),
check (every committed row is there), sort (begin a query; some rows of it), rest (all other rows, in their order).
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading

TIMEOUT = 60  # seconds, of one answer: the server is away for a while
ROWS = 200_000


class Postgres:
    """The simple query protocol, version 3, without a password."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.settimeout(TIMEOUT)
        self.file = self.socket.makefile("rb")
        words = b"user\0postgres\0database\0postgres\0\0"
        self.socket.sendall(struct.pack("!II", len(words) + 8, 3 << 16) + words)
        self._answer()

    def ask(self, query: str) -> list[str]:
        """The first column of each row. Raises RuntimeError with what the server says."""
        raw = query.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!I", len(raw) + 4) + raw)
        return self._answer()

    def _answer(self) -> list[str]:
        rows: list[str] = []
        error = ""
        while True:
            head = self.file.read(5)
            if len(head) < 5:
                raise ConnectionError(f"the server closed the connection {error}")
            body = self.file.read(struct.unpack("!I", head[1:])[0] - 4)
            if head[:1] == b"D":
                size = struct.unpack("!i", body[2:6])[0]
                rows.append(body[6 : 6 + size].decode())
            elif head[:1] == b"E":
                error = body.replace(b"\0", b" ").decode()
            elif head[:1] == b"Z":
                if error:
                    raise RuntimeError(error)
                return rows


class Load(threading.Thread):
    """Writes until it is stopped; `written` rows were committed."""

    def __init__(self, postgres: Postgres) -> None:
        super().__init__(daemon=True)
        self.postgres, self.written, self.on, self.error = postgres, 0, True, ""
        postgres.ask("CREATE TABLE load (n integer PRIMARY KEY, text text)")

    def run(self) -> None:
        try:
            while self.on:
                self.postgres.ask(f"INSERT INTO load VALUES ({self.written}, md5('{self.written}'))")
                self.written += 1
        except Exception as e:
            self.error = f"{type(e).__name__}: {e}"


def main() -> None:
    port = int(sys.argv[1])
    load, sorting = Load(Postgres(port)), Postgres(port)
    rows: list[str] = []
    for line in sys.stdin:
        asked = json.loads(line)["ask"]
        answer: dict[str, object] = {}
        if asked == "load":
            load.start()
        elif asked == "stop":
            load.on = False
            load.join()
        elif asked == "check":
            right = "SELECT count(*) FROM load WHERE text = md5(n::text)"
            answer["there"] = int(load.postgres.ask(right)[0])
        elif asked == "sort":
            sorting.ask("SET work_mem = '128MB'")
            sorting.ask("BEGIN")
            query = f"SELECT md5(n::text) || repeat('x', 64) AS x FROM generate_series(1, {ROWS}) AS n ORDER BY x"
            sorting.ask(f"DECLARE sorted CURSOR FOR {query}")
            rows = sorting.ask("FETCH 1000 FROM sorted")
        elif asked == "rest":
            rows += sorting.ask("FETCH ALL FROM sorted")
            sorting.ask("COMMIT")
            answer["sorted"] = rows == sorted(rows) and len(set(rows)) == ROWS
        print(json.dumps({"written": load.written, "error": load.error, **answer}), flush=True)


if __name__ == "__main__":
    main()
