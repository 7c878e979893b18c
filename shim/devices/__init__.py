# SPDX-License-Identifier: Apache-2.0
"""Devices of this node in containers: CDI specifications read, made, applied, and re-resolved on restore."""
