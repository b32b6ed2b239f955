"""The wheel carries the notebooks, with what lies beside them, as tfbench/_tree; everything else
is said in pyproject.toml. In an editable install they stay where they are.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    "Copies nbs and images into the package."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        tree = Path(self.build_lib) / "tfbench" / "_tree"
        shutil.rmtree(tree, ignore_errors=True)
        for name in ("nbs", "images"):
            shutil.copytree(name, tree / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))


setup(cmdclass={"build_py": Build})
