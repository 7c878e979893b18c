# SPDX-License-Identifier: Apache-2.0
"""The one thing pyproject.toml cannot say: engines execute shim/launcher.py where it is installed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class ExecutableLauncher(build_py):
    """build_py drops the mode of modules; the launcher is a program as well."""

    def run(self) -> None:
        super().run()
        launcher = Path(self.build_lib, "cryoci/shim/launcher.py")
        if launcher.exists():  # an editable install builds nothing
            launcher.chmod(0o755)


setup(cmdclass={"build_py": ExecutableLauncher})
