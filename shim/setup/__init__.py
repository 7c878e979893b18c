# SPDX-License-Identifier: Apache-2.0
"""Engines' configuration: read as the engine reads it, and edited so that it can be undone to the byte."""
