# SPDX-License-Identifier: Apache-2.0
"""`cryoci bake` and `cryoci warm`: a server that is slow to start, started on a node without a registry."""

from __future__ import annotations

import json
import time

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, Subject, failing, leftovers
from tests.nodes import workload

pytestmark = pytest.mark.node

# A model server: its weights must be computed before it listens; /predict uses them.
SERVER = """
import hashlib, http.server, os, socket
weights = hashlib.pbkdf2_hmac("sha256", b"model", b"salt", 3_000_000)
boot = os.urandom(8).hex()
class Model(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        try:
            settings = open("/data/settings").read().strip()
        except FileNotFoundError:
            settings = "none"
        body = f"{weights.hex()} {boot} {socket.gethostname()} {settings}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
print("listening", flush=True)
http.server.ThreadingHTTPServer(("", 8000), Model).serve_forever()
"""
# Each copy's own settings, in place of an environment, which nobody can change from outside.
REFRESH = "exec: sh -c 'echo for-$(cat /proc/sys/kernel/hostname) > /data/settings'"
_ASK = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/predict', timeout=5).read().decode())"


def predict(subject: Subject) -> list[str]:
    """The server's answer: weights, boot id, host name, what its file of settings says."""
    enter = ["nsenter", "-t", str(subject.pid), "-n"]
    return subject.node.run([*enter, "python3", "-c", _ASK], timeout=20).stdout.decode().split()


def test_a_baked_server_starts_where_it_was_ready(site: Site) -> None:
    image = f"{site.registry}/warm/model:1"
    said = site.a.run([
        "cryoci", "bake", "--json", "--name=model", "--ready-http=http://127.0.0.1:8000/health",
        "--ready-port=8000", "--ready-log=^listen", "--ready-command=test -d /data", "-o", image,
        f"--podman=--annotation=io.cryoci.post-restore={REFRESH}\nhttp: GET http://127.0.0.1:8000/health",
        site.image, "python3", "-u", "-c", SERVER,
    ])  # fmt: skip
    baked = json.loads(said.stdout)
    cold = baked["seconds"]["start"]
    there = Subject(site.b, KINDS["podman+runc"], "model")
    assert Subject(site.a, KINDS["podman+runc"], "model").status == "gone"
    warmed = json.loads(site.b.run(["cryoci", "warm", "--json", image]).stdout)[0]
    assert warmed["name"] == "warm/model:1" and warmed["base_pulled"] and warmed["fetched"] > 0
    again = json.loads(site.b.run(["cryoci", "warm", "--json", image]).stdout)[0]
    assert again["fetched"] == 0 and not again["base_pulled"] and again["digest"] == warmed["digest"]
    site.c.cut()
    try:
        began = time.monotonic()
        site.b.run(["cryoci", "restore", "warm/model:1", "-d", "--hostname=second"], timeout=120)
        first = predict(there)
        assert time.monotonic() - began < 60 and cold > 0.5
        site.b.run(["cryoci", "warm", "--to=unpacked", "warm/model:1"])
        again = ["cryoci", "restore", "--json", "warm/model:1", "-d", "--name=model2"]
        said = site.b.run([*again, "--runtime=cryoci-runtime"], timeout=120)
        second = predict(there.on(site.b, "model2"))
        assert json.loads(said.stdout)["image"]["kept"]
        assert site.b.sh("cryoci warm --drop") == "warm/model:1\n"
        held = json.loads(site.b.run(["cryoci", "warm", "--json", "--to=tmpfs", "warm/model:1"]).stdout)[0]
        assert held["digest"] == warmed["digest"] and held["fetched"] == held["size"]
        assert "warm/model:1" in site.b.sh("cryoci warm --list")
        # no disk is read for them
        site.b.sh("find /var/lib/cryoci/images/blobs -size +64k -exec truncate --size=1 {} +")
        site.b.run(["cryoci", "restore", "warm/model:1", "-d", "--name=model3"], timeout=120)
        assert predict(there.on(site.b, "model3"))[:2] == first[:2]
        assert site.b.sh("cryoci warm --drop; mount | grep cryoci-warm || true") == "warm/model:1\n"
    finally:
        site.c.join()
    assert first[:2] == second[:2]  # one boot: what was random once is the same in both
    assert first[2] == "second" and second[2] not in ("second", "")
    assert [one[3] for one in (first, second)] == [f"for-{one[2]}" for one in (first, second)]
    there.remove()
    for name in ("model2", "model3"):
        there.on(site.b, name).remove()


def test_what_never_gets_ready_leaves_nothing(site: Site) -> None:
    before = leftovers(site.a)
    bake = ["cryoci", "bake", "--name=never", "-o", "never:1"]
    run = [site.image, "python3", "-u", "-c", "print('cannot find the model'); raise SystemExit(3)"]
    said = failing(site.a, [*bake, "--ready-port=8000", *run])
    assert "exit code 3" in said and "cannot find the model" in said
    said = failing(site.a, [*bake, "--ready-port=8000", "--ready-timeout=1s", site.image, *workload.COMMAND])
    assert "not ready within 1 s (--ready-port 8000)" in said
    assert "nobody can tell" in failing(site.a, [*bake, site.image])
    assert "--ready-log '('" in failing(site.a, [*bake, "--ready-log=(", site.image])
    for wrong in (
        ["--bundle", "/srv", site.image],
        ["--bundle", "/srv", "--podman=-t"],
        ["--rootfs=none", site.image],
        [],
    ):
        failing(site.a, [*bake, "--ready-port=8000", *wrong])
    assert "could not be started from /srv" in failing(
        site.a, [*bake, "--ready-port=8000", "--bundle", "/srv"]
    )
    assert leftovers(site.a) == before


def test_bake_does_not_touch_a_container_of_that_name(site: Site) -> None:
    subject = site.subject(KINDS["podman+runc"])
    subject.start()
    bake = ["cryoci", "bake", f"--name={subject.name}", "--ready-port=8765", "-o", "never:1"]
    assert "already in use" in failing(site.a, [*bake, site.image])
    assert subject.status == "running"
    subject.remove()
