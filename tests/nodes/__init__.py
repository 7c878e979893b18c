# SPDX-License-Identifier: Apache-2.0
"""Test nodes: separate machines on one host, for everything that needs a real runtime and a real CRIU.

`namespace.Cluster` starts namespace nodes (well under a second, the host's kernel), `machine.Machine`
a virtual one (its own kernel, cgroup v2 controllers); both run the Debian tree of `tree`.
"""
