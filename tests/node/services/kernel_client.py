# SPDX-License-Identifier: Apache-2.0
"""A client of a Jupyter kernel, as a notebook is one: jupyter_client's, over sockets that are never opened again.

Requests on stdin, answers on stdout: begin CODE (execute it, and answer at once), and CODE (execute it, wait, and
answer with what it prints; a cell that was begun before comes first).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient  # type: ignore[import-not-found]

TIMEOUT = 60  # seconds


def said(client: Any, asked: str) -> str:
    """What the cell `asked` prints, when it has ended. Raises RuntimeError with its error."""
    text = ""
    while True:
        message = client.get_iopub_msg(timeout=TIMEOUT)
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        if message["msg_type"] == "stream":
            text += content["text"]
        elif message["msg_type"] == "error":
            raise RuntimeError(content["evalue"])
        elif message["msg_type"] == "status" and content["execution_state"] == "idle":
            return text


def main() -> None:
    path = Path(sys.argv[1])
    end = time.monotonic() + TIMEOUT
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    client = BlockingKernelClient()
    client.load_connection_file(str(path))
    client.start_channels(hb=False)
    client.wait_for_ready(timeout=TIMEOUT)
    begun = ""
    for line in sys.stdin:
        asked = json.loads(line)["ask"]
        if asked.startswith("begin "):
            begun = client.execute(asked.removeprefix("begin "))
            print(json.dumps({}), flush=True)
            continue
        answer = {"before": said(client, begun) if begun else ""}
        begun = ""
        print(json.dumps({**answer, "said": said(client, client.execute(asked))}), flush=True)


if __name__ == "__main__":
    main()
