"""Build step that copies settings and presets from the repository's top level into the wheel.

Everything else about the package is in ``pyproject.toml``.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# What `mllm-msr` reads outside a checkout; mllm_msr/presets.py, find_shipped.
SHIPPED = ("params.yaml", "presets/*.yaml")


class BuildWithSettings(build_py):
    """Build the packages, with the shipped files in ``mllm_msr/shipped``."""

    def run(self) -> None:
        """Build; an editable install reads the checkout's own files instead."""
        super().run()
        if self.editable_mode:
            return
        for file in (file for pattern in SHIPPED for file in sorted(Path().glob(pattern))):
            target = Path(self.build_lib, "mllm_msr", "shipped", file)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithSettings})
