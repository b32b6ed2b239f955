"""What the tests share: the project's folder, its notebooks, and the command line as a user
calls it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tfbench.workbench.records import ROOMS

ROOT = Path(__file__).resolve().parents[1]
ALL = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ROOMED = [
    p for p in ALL if p.stem == "core" or p.parent.name in ROOMS
]  # the library's rooms, a family's own core too
CHAPTERS = [p for p in ALL if p not in ROOMED and re.match(r"(?!00)\d\d_", p.name)]
INDEXES = [p for p in ALL if p not in ROOMED and p not in CHAPTERS]
NOTEBOOKS = [*INDEXES, *ROOMED, *CHAPTERS]


def module(path: Path) -> str:
    "nbs/icl/06_curves.ipynb -> icl.curves; a room's index is its face, icl/__init__.py."
    name = slug(path).replace("/", ".")
    return name.removesuffix("index") + "__init__" if name.endswith(".index") else name


def slug(path: Path) -> str:
    "nbs/in_context/02_gradient_descent.ipynb -> in_context/gradient_descent"
    name = path.stem.lstrip("0123456789_")
    return name if path.parent.name == "nbs" else f"{path.parent.name}/{name}"


DEADLINE = 900  # seconds: only stops what hangs


def _default_interrupts():
    "A suite that was started with `nohup` or `&` ignores Ctrl-C; its children must not."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments, cwd=None, **environment) -> subprocess.Popen:
    "Start a program of this environment, one thread, in a session of its own."
    program, *rest = arguments
    return subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *map(str, rest)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        preexec_fn=_default_interrupts,
        start_new_session=True,
    )


def elsewhere(folder: Path) -> dict:
    """The environment of a kernel in which `fit` trains on a second device: the accelerator, or
    the stand-in of elsewhere.py, which every kernel loads when it starts."""
    import torch

    if torch.accelerator.is_available():
        return {"TFBENCH_DEVICE": "auto"}
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-travel.py").write_text(
        f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\n"
        "import elsewhere\nelsewhere.travel()\n"
        f"open({str(startup / 'travels')!r}, 'w').close()\n"
    )
    return {"IPYTHONDIR": str(folder / "ipython")}


def command(*arguments, timeout=DEADLINE, **options) -> subprocess.CompletedProcess:
    "Run a program as `start` does, and capture what it says."
    process = start(*arguments, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def until(condition, seconds=DEADLINE):
    "Wait for a condition; the test fails when it does not come true."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def tfbench(tmp_path):
    "`tfbench(...)` through the installed entry point, with its runs in a folder of the test."

    def call(*arguments, **options):
        return command("tfbench", *arguments, TFBENCH_RUNS=str(tmp_path / "runs"), **options)

    return call


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]


def browser_path() -> str | None:
    return next((p for name in BROWSERS if (p := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser():
    """Chromium, headless. Without one the tests are skipped, or fail where
    TFBENCH_REQUIRE_BROWSER is set."""
    try:
        from playwright.sync_api import sync_playwright

        missing = None if browser_path() else "no browser: apt-get install chromium"
    except ImportError:
        missing = 'no playwright: pip install "tfbench[dev]"'
    if missing and os.environ.get("TFBENCH_REQUIRE_BROWSER"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser):
    "`tab()` opens a tab; at the end none may have said anything on the console that is an error."
    contexts, errors = [], []

    def open_tab(**options):
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert errors == []
