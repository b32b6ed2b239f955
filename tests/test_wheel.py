"""The wheel alone is enough: built from a copy, installed into an empty environment, used outside
of the checkout. The packages that tfbench needs are lent by the running environment.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

from tfbench.workbench.chapters import find_chapters

CHAPTER = "architectures/rmsnorm"  # one of the quick ones


def call(*command, cwd: Path, timeout: int = 300) -> subprocess.CompletedProcess:
    "Run a program that knows nothing of the checkout."
    apart = ("PYTHONPATH", "TFBENCH_NBS", "TFBENCH_RUNS")
    environment = {k: v for k, v in os.environ.items() if k not in apart}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(part) for part in command]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "`installed(...)` calls the tfbench of an environment into which the wheel was installed."
    home = tmp_path_factory.mktemp("wheel")
    source, environment, elsewhere = home / "source", home / "environment", home / "elsewhere"
    elsewhere.mkdir()
    for name in ("tfbench", "nbs", "images"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    done = call(*pip, "wheel", *offline, "-w", home, source, cwd=home)
    assert done.returncode == 0, done.stderr
    done = call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=home)
    assert done.returncode == 0, done.stderr
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    packages = call(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home
    )
    lent = Path(packages.stdout.strip()) / "lent.pth"
    lent.write_text(f"{sysconfig.get_path('purelib')}\n")  # its own .pth files are not read
    wheel = next(home.glob("*.whl"))
    done = call(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home)
    assert done.returncode == 0, done.stderr
    where = call(python, "-c", "import tfbench; print(tfbench.__file__)", cwd=elsewhere)
    assert Path(where.stdout.strip()).is_relative_to(environment)
    return lambda *arguments: call(binaries / "tfbench", *arguments, cwd=elsewhere)


def test_list_and_show(installed):
    listed = installed("list")
    assert listed.returncode == 0, listed.stderr
    assert [c.slug for c in find_chapters() if c.slug not in listed.stdout] == []
    shown = installed("show", CHAPTER)
    assert shown.returncode == 0 and "arXiv:" in shown.stdout, shown.stderr


def test_run(installed):
    done = installed("run", CHAPTER, "--profile", "test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CHAPTER}: ok after" in done.stdout


def test_copy(installed, tmp_path):
    "Everything arrives, nothing is overwritten, and the copies are what runs in their folder."
    done = installed("copy", tmp_path / "mine")
    assert done.returncode == 0, done.stderr

    def files(top):
        paths = [p.relative_to(top) for n in ("nbs", "images") for p in (top / n).rglob("*")]
        seen = [p for p in paths if not any(part.startswith(".") for part in p.parts)]
        return {p for p in seen if (top / p).is_file()}

    mine = {p: (tmp_path / "mine" / p).read_bytes() for p in files(tmp_path / "mine")}
    assert mine == {p: (ROOT / p).read_bytes() for p in files(ROOT)}
    changed = tmp_path / "mine" / "nbs" / "papers.toml"
    changed.write_text("mine = 1")
    done = installed("copy", tmp_path / "mine")
    assert done.returncode == 0 and changed.read_text() == "mine = 1"
    assert "0 files" in done.stdout and f"{len(mine)} were there" in done.stdout
