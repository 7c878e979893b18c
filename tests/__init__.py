# SPDX-License-Identifier: Apache-2.0
"""Tests of cryoci: `unit` mirrors the modules, `nodes` is the harness of test machines."""
