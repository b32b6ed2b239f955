"What the tests share: the project's folder, its notebooks, and the command line as a user calls it."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(p for p in (ROOT / "nbs").glob("*/[0-9]*.ipynb") if p.parent.name != "foundations")
FOUNDATIONS = sorted((ROOT / "nbs" / "foundations").glob("[0-9]*.ipynb"))
INDEXES = [ROOT / "nbs" / "index.ipynb", *sorted((ROOT / "nbs").glob("*/index.ipynb"))]
NOTEBOOKS = [*INDEXES, *FOUNDATIONS, *CHAPTERS]


def slug(path: Path) -> str:
    "nbs/in_context/02_gradient_descent.ipynb -> in_context/gradient_descent"
    name = path.stem.lstrip("0123456789_")
    return name if path.parent.name == "nbs" else f"{path.parent.name}/{name}"


def command(*arguments, timeout=300, cwd=None, **environment) -> subprocess.CompletedProcess:
    "Run a program of this environment, one thread, and capture what it says."
    program, *rest = arguments
    return subprocess.run([str(Path(sys.executable).with_name(program)), *map(str, rest)], capture_output=True, text=True, timeout=timeout, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment})


@pytest.fixture
def tfbench(tmp_path):
    "`tfbench(...)` through the installed entry point, with its runs in a folder of the test."
    def call(*arguments, **options): return command("tfbench", *arguments, TFBENCH_RUNS=str(tmp_path / "runs"), **options)
    return call
