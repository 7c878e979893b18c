# SPDX-License-Identifier: Apache-2.0
"""A sealed and signed checkpoint on its way between nodes: real CRIU, cosign, age, and podman's own policy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.node.conftest import Site
from tests.node.subject import KINDS, TMPFS, Subject, failing, leftovers, runs_on
from tests.nodes.node import Node

pytestmark = pytest.mark.node
PASSWORD = {"COSIGN_PASSWORD": "pw"}
POLICY = "/etc/cryoci/policy.toml"


@pytest.fixture(scope="module")
def recipient(site: Site) -> str:
    """A signing pair on a (its public half on b), and an identity on b; this is its recipient."""
    site.a.sh("mkdir -p /etc/cryoci && cd /etc/cryoci && COSIGN_PASSWORD=pw cosign generate-key-pair")
    site.b.write("/etc/cryoci/prod.pub", site.a.read("/etc/cryoci/cosign.pub"))
    return site.b.sh("cryoci keygen --seal /etc/cryoci/id").strip()


def policy(node: Node, text: str) -> None:
    node.write(POLICY, text)


@pytest.mark.parametrize("kind", ["podman+runc", "crun"])
def test_sealed_and_signed_runs_on_elsewhere(site: Site, recipient: str, kind: str) -> None:
    subject = site.subject(KINDS[kind])
    subject.start()
    before = subject.ask()
    place = f"{site.registry}/checkpoints/{subject.name}"
    digest = subject.checkpoint(f"{place}:1", "--encrypt-to", recipient)["image"]["digest"]
    there = subject.on(site.b)
    policy(
        site.b, f'mode = "strict"\n[[rule]]\nmatch = "{site.registry}/checkpoints/*"\nkeys = ["prod.pub"]\n'
    )
    clean = leftovers(site.b)
    command = ["cryoci", "restore", f"{place}:1", "--detach"]
    try:
        assert "is refused" in failing(site.b, [*command, "--decrypt-key", "/etc/cryoci/id"])
        sign = ["cryoci", "sign", "--key", "/etc/cryoci/cosign.key", f"{place}@{digest}"]
        site.a.run(sign, env=PASSWORD)
        assert "no key was given" in failing(site.b, command)
        site.b.sh("rm -f /etc/cryoci/wrong && cryoci keygen --seal /etc/cryoci/wrong")
        assert "opens the image" in failing(site.b, [*command, "--decrypt-key", "/etc/cryoci/wrong"])
        assert leftovers(site.b) == clean
        there.restore(f"{place}:1", "--decrypt-key", "/etc/cryoci/id")
    finally:
        site.b.sh(f"rm -f {POLICY}")
    runs_on(before, there.wait(before["count"] + 3))
    there.remove()
    if kind == "podman+runc":
        created_from(there, f"{place}:1", before)
    subject.remove()
    site.a.run(
        ["cosign", "verify", "--key", "/etc/cryoci/cosign.pub", "--insecure-ignore-tlog=true",
         "--allow-http-registry", f"{place}@{digest}"]
    )  # fmt: skip


def created_from(there: Subject, reference: str, before: dict[str, Any]) -> None:
    """An engine that creates and starts gives no key: the node has its own."""
    node = there.node
    node.run(["podman", "pull", "--quiet", there.image])
    argv = [
        "podman",
        "--runtime=cryoci-runtime",
        "run",
        "--detach",
        f"--name={there.name}",
        f"--tmpfs={TMPFS}",
    ]
    argv += [f"--annotation=io.cryoci.restore={reference}", there.image, "sleep", "1000"]
    refused = node.run(argv, check=False).stderr.decode()
    assert "no key was given" in refused and "/etc/cryoci/decrypt" in refused
    node.sh(
        f"podman rm --force --ignore {there.name}; install -D -m600 /etc/cryoci/id /etc/cryoci/decrypt/id"
    )
    try:
        node.run(argv)
    finally:
        node.sh("rm -r /etc/cryoci/decrypt")
    runs_on(before, there.wait(before["count"] + 3))
    there.remove()


def test_podmans_own_policy_takes_our_signature(site: Site, recipient: str) -> None:
    subject: Subject = site.subject(KINDS["podman+runc"])
    subject.start()
    place = f"{site.registry}/checkpoints/{subject.name}"
    subject.checkpoint(f"{place}:1")
    rules = {
        "default": [{"type": "reject"}],
        "transports": {
            "docker": {site.registry: [{"type": "sigstoreSigned", "keyPath": "/etc/cryoci/prod.pub",
                                        "signedIdentity": {"type": "matchRepository"}}]}
        },
    }  # fmt: skip
    site.b.write("/tmp/policy.json", json.dumps(rules))
    site.b.write(
        "/etc/containers/registries.d/signed.yaml",
        f"docker:\n  {site.registry}:\n    use-sigstore-attachments: true\n",
    )
    pull = ["podman", "pull", "--quiet", "--signature-policy=/tmp/policy.json", f"{place}:1"]
    try:
        refused = site.b.run(pull, check=False)
        assert refused.returncode != 0 and b"signature" in refused.stderr
        site.a.run(["cryoci", "sign", "--key", "/etc/cryoci/cosign.key", f"{place}:1"], env=PASSWORD)
        site.b.run(pull)
        site.b.run(["podman", "rmi", f"{place}:1"])
    finally:
        site.b.sh("rm -f /tmp/policy.json /etc/containers/registries.d/signed.yaml")
    subject.remove()
