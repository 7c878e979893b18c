# SPDX-License-Identifier: Apache-2.0
"""The one thing pyproject.toml cannot say: some modules are executed where they are installed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# cryoci-runtime, cuda-checkpoint, cryoci-hook
PROGRAMS = ("shim/launcher.py", "shim/gpu/front.py", "hooks/hook.py")


class ExecutablePrograms(build_py):
    """build_py drops the mode of modules; these are programs as well."""

    def run(self) -> None:
        super().run()
        for name in PROGRAMS:
            program = Path(self.build_lib, "cryoci", name)
            if program.exists():  # an editable install builds nothing
                program.chmod(0o755)


setup(cmdclass={"build_py": ExecutablePrograms})
