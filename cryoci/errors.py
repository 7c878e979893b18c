# SPDX-License-Identifier: Apache-2.0
"""Typed errors: what happened, why, and what to do.

Every failure a user can meet is a `CryociError`. `message` says what happened and why in one
sentence; `hint` says what to do. Rooms raise; only the CLI and the runtime's entry points print.
"""

from __future__ import annotations


class CryociError(Exception):
    """Base of all errors shown to users. `exit_code` is the process status that reports it."""

    exit_code = 1
    advice: str | None = None  # what to do when nothing more particular is known

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UsageError(CryociError):
    """The caller's words are off: a bad reference, option or combination."""

    exit_code = 2


class ConfigError(CryociError):
    """/etc/cryoci/config.toml, or a file it names, is wrong."""


class NotFoundError(CryociError):
    """A container, image, tag, file or tool that was named is not there."""


class ConflictError(CryociError):
    """The name is taken, or the object is in a state that forbids the operation."""


class PrivilegeError(CryociError):
    """Root (or a capability) is needed."""


class UnsupportedError(CryociError):
    """This node, kernel, tool version or container cannot do what was asked."""


class ToolError(CryociError):
    """A program that cryoci runs failed; the message holds its copy-pasteable command line."""


class CheckpointError(CryociError):
    """The dump failed. The container was put back to the state it had before."""


class RestoreError(CryociError):
    """The restore failed. Whatever it had made on this node was removed."""


class HookError(CryociError):
    """What an application asked to be done before a checkpoint or after a restore failed."""


class ImageError(CryociError):
    """An archive, manifest, config or layer is not a valid checkpoint image."""

    advice = "it is damaged or not a checkpoint: fetch it again, or use another one (`cryoci list`)"


class IntegrityError(ImageError):
    """Bytes do not match the digest or size that was promised for them."""

    advice = "it was altered or damaged on its way or where it lies: fetch it again, or use another one"


class TrustError(CryociError):
    """Nobody who is trusted vouches for an image, or a key does not open it."""

    advice = "`cryoci verify` shows who signed it; /etc/cryoci/policy.toml says whose signature counts"


class RegistryError(CryociError):
    """A registry refused, failed or could not be reached."""

    advice = "see that the registry runs and can be reached, then try again"


class SpaceError(CryociError):
    """A file system or memory is too small for the operation."""
