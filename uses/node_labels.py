# SPDX-License-Identifier: Apache-2.0
"""Labels of this node that say which GPUs it has: cryoci.io/gpu-chip and cryoci.io/gpu-driver.

The agent puts them there through the API server, with its pod's service account, where the cluster allows it (the
component gpu of crio-config/kubernetes). `kubectl cryoci restore` schedules by them, or by those of NVIDIA's
gpu-feature-discovery, whose way of writing a chip this is too: NVIDIA-H100-80GB-HBM3. An AMD chip is amd-74a1, by its
PCI device id, and needs no driver's version.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import requests

from cryoci.errors import CryociError, NotFoundError, PrivilegeError, ToolError
from cryoci.shim.devices import nvidia

CHIP, DRIVER = "cryoci.io/gpu-chip", "cryoci.io/gpu-driver"
AMD = "amd-"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_OTHER = re.compile(r"[^A-Za-z0-9_.-]+")
_LONGEST = 63  # of a label's value
_PERIOD, _RETRY = 3600.0, 60.0  # seconds
_TIMEOUT = (5, 20)  # seconds to connect, and without an answer


def value(text: str) -> str:
    """`text` as a label's value, as gpu-feature-discovery writes it: hyphens for what is not allowed."""
    return _OTHER.sub("-", text.strip())[:_LONGEST].strip("-_.")


def found(root: str = "/") -> dict[str, str | None]:
    """The labels of this node; None for those that it must not have. Of several chips it is the commonest.

    From /proc and /sys, which show drivers to every container: the agent needs neither their libraries nor devices.
    """
    driver = nvidia.driver_version(root)
    chips = Counter(gpu.name for gpu in nvidia.inventory(root) if gpu.name and driver)
    chips += Counter(_amd(root))
    if not chips:
        return {CHIP: None, DRIVER: None}
    chip = value(min(chips, key=lambda name: (-chips[name], name)))
    return {CHIP: chip, DRIVER: None if chip.startswith(AMD) or driver is None else value(driver)}


def _amd(root: str) -> list[str]:
    """amd-ID for each PCI device that the amdgpu driver has. KFD's own tree shows nothing to who may not use a GPU."""
    ids = []
    for path in Path(root, "sys/bus/pci/drivers/amdgpu").glob("*:*/device"):
        with contextlib.suppress(OSError, ValueError):
            ids.append(f"{AMD}{int(path.read_text(), 16):04x}")
    return ids


def put(node: str, labels: Mapping[str, str | None], account: Path = ACCOUNT) -> None:
    """Set labels of a node through the API server. Raises NotFoundError outside a pod, PrivilegeError, ToolError."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    try:
        token = (account / "token").read_text().strip()
    except OSError as e:
        raise NotFoundError(
            f"no service account to label node {node} with: {account}/token: {e.strerror}",
            hint="set automountServiceAccountToken: true and a serviceAccountName, as component gpu does",
        ) from e
    if not host or not port:
        raise NotFoundError("there is no API server here: KUBERNETES_SERVICE_HOST is not set")
    where = f"[{host}]" if ":" in host else host
    url = f"https://{where}:{port}/api/v1/nodes/{urllib.parse.quote(node, safe='')}"
    with requests.Session() as session:
        session.trust_env = False  # the token goes to the API server and to nobody else
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/merge-patch+json",
        }
        try:
            answer = session.patch(
                url,
                json={"metadata": {"labels": dict(labels)}},
                headers=headers,
                verify=str(account / "ca.crt"),
                timeout=_TIMEOUT,
                allow_redirects=False,
            )
        except (requests.RequestException, OSError) as e:
            raise ToolError(
                f"the API server at {where}:{port} cannot be asked to label node {node}: {e}"
            ) from e
    if answer.status_code in (401, 403):
        raise PrivilegeError(
            f"the API server forbids the agent to label node {node} ({answer.status_code})",
            hint="bind ClusterRole cryoci-node-labeller of crio-config/kubernetes/components/gpu to its account",
        )
    if answer.status_code != 200:
        raise ToolError(
            f"the API server did not label node {node}: {answer.status_code} {answer.text[:200]}"
        )


class Labeller:
    """Keeps the labels of `node` right, and says what changes; what fails is tried again and stops nothing."""

    def __init__(
        self, node: str, say: Callable[[str], None], account: Path = ACCOUNT, root: str = "/"
    ) -> None:
        self._node = node
        self._say = say
        self._account = account
        self._root = root
        self._next = 0.0
        self._said = ""

    def refresh(self) -> None:
        """Look at the GPUs and set the labels, when it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        try:
            labels = found(self._root)
            put(self._node, labels, self._account)
        except CryociError as e:
            line, pause = f"{e.message}{f' ({e.hint})' if e.hint else ''}", _RETRY
        else:
            shown = ", ".join(f"{key}={text}" for key, text in labels.items() if text) or "no GPU"
            line, pause = f"labelled node {self._node}: {shown}", _PERIOD
        self._next = now + pause
        if line != self._said:
            self._said = line
            self._say(line)
