# SPDX-License-Identifier: Apache-2.0
"""Why checkpoint and restore do not work here, asked before they fail."""
