# SPDX-License-Identifier: Apache-2.0
"""The suite for a machine with a real GPU: `make test-gpu`."""
