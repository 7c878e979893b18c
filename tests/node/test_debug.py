# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that really fails, and what can be told of it afterwards."""

from __future__ import annotations

import json
import tarfile

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS
from tests.node.trouble import running

pytestmark = pytest.mark.node


def test_a_failed_checkpoint(site: Site) -> None:
    node = site.a
    secret = "hunter2"
    options = (
        f"--env=DB_PASSWORD={secret}",
        f"--label=api-token={secret}",
        f"--annotation=my/password={secret}",
    )
    with running(site, KINDS["podman+cryoci-runtime"], options=options) as subject:
        identity = subject.id
        words = [
            "--api-key",
            secret,
            f"https://u:{secret}@h/",
            f'{{"password": "{secret}"}}',
            f"Bearer {secret}",
        ]
        node.run(["podman", "exec", "-d", subject.name, "sh", "-c", "sleep 60; :", "beside", *words])
        node.sh("mv /usr/sbin/iptables-restore /usr/sbin/iptables-restore.away")
        try:
            argv = ["cryoci", "--verbose", "checkpoint", subject.name, "--output", "debugged:1"]
            result = node.run(argv, check=False, env={"CRYOCI_LOG": "/tmp/cryoci.log"})
        finally:
            node.sh("mv /usr/sbin/iptables-restore.away /usr/sbin/iptables-restore")
        said = result.stderr.decode()
        assert result.returncode == 1 and "iptables" in said
        assert any(line.startswith("+ ") and " s  status " in line for line in said.splitlines()), said
        events = [json.loads(line) for line in node.read("/tmp/cryoci.log").decode().splitlines()]
        assert any(
            e["event"] == "call" and "checkpoint" in e["argv"] and e["status"] not in (0, None)
            for e in events
        )

        assert "  cryoci-runtime checkpoint " in said
        explained = node.run(["cryoci", "explain", "--json", subject.name], check=False)
        assert explained.returncode == 1 and json.loads(explained.stdout)["cause"]["id"] == "network-lock"

        node.run(["cryoci", "debug", subject.name, "--output", "/tmp/debug.tar.gz"])
        texts = {}
        with tarfile.open(node.path("/tmp/debug.tar.gz")) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                texts[member.name.partition("/")[2]] = content.read()
        assert json.loads(texts["record/dump.log.cause.json"])["id"] == "network-lock"
        assert json.loads(texts["record/dump-attempt.log"])["verb"] == "dump"
        assert "config/changes.diff" in texts and any(name.endswith("/maps") for name in texts)
        assert not [name for name, raw in texts.items() if secret.encode() in raw]
        processes = [json.loads(texts[name])["cmdline"] for name in texts if name.endswith("/process.json")]
        assert any("beside" in words and "--api-key" in words for words in processes), processes
        steps = json.loads(texts["record/dump.log.timeline.json"])
        assert 0 < len(steps) <= 20 and [step["at"] for step in steps] == sorted(
            step["at"] for step in steps
        )
    # its name is gone with it, and its log is not
    gone = node.run(["cryoci", "explain", subject.name], check=False)
    assert gone.returncode == 1 and f"{identity[:12]} (dump " in gone.stderr.decode()
    assert node.run(["cryoci", "explain", identity[:12]], check=False).stdout.startswith(b"cause")
