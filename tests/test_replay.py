"""What is kept beside a chapter: replayed for every chapter that has it, and the whole way of it
for a toy, with real processes.
"""

import json
import os
import signal

import pytest
from conftest import ALL, DEADLINE, command, slug, start, until
from test_cli import toy

from tfbench.workbench.chapters import find
from tfbench.workbench.records import ChapterError, read_notebook
from tfbench.workbench.runs import notebook_text, replay

KEPT = [p for p in ALL if p.with_suffix(".kept.json").exists()]


@pytest.mark.parametrize("path", KEPT, ids=map(slug, KEPT))
def test_replay(path):
    "Code that computes something else than what is kept turns red until it is made anew."
    result = replay(slug(path))
    assert result.status == "ok", f"cell {result.cell}: {result.error}"


# An experiment as the runner sees it: it trains in two units of its own cache, keeps where it is
# told to, reads what is kept, and compares when it is replayed.
EXPERIMENT = """
import json, os, pathlib, time
kept = pathlib.Path(os.environ["TFBENCH_NOTEBOOK"]).with_suffix(".kept.json")
units = pathlib.Path(os.environ["TFBENCH_UNITS"])
class Experiment:
    def __init__(self, title): self.title = title
    def __call__(self):
        if os.environ.get("TFBENCH_REPLAY"):
            found = json.loads(kept.read_text())["experiments"][self.title]
            if found != RATE: raise ValueError(f"kept {found}, now {RATE}")
        elif again:
            units.joinpath("first").touch()
            while n == 3 and units.joinpath("wait").exists(): time.sleep(0.05)
            if units.joinpath("fail").exists(): raise ValueError("no further")
            folder = pathlib.Path(os.environ["TFBENCH_KEEP"])
            found = {"experiments": {self.title: RATE}}
            folder.joinpath(kept.name).write_text(json.dumps(found))
            folder.joinpath(kept.stem + ".safetensors").write_bytes(b"weights")
            return "trained"
        return "read" if kept.exists() else "nothing is kept"
"""
CELLS = {
    "set-up": EXPERIMENT + "RATE = 3",
    "make": 'rates = Experiment("rates")',
    "checks": "raise ValueError('a check that a replay does not run')",
    "call": "print(rates())",
    "after": "assert not os.environ.get('TFBENCH_REPLAY'), 'a replay ends before'",
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    "A chapter with an experiment, and the command line on it."

    class Bench:
        units, nbs = tmp_path / "units", toy(tmp_path)
        path = nbs / "toys" / "01_toy.ipynb"
        kept = path.with_suffix(".kept.json")
        environment = {
            "TFBENCH_NBS": str(nbs),
            "TFBENCH_RUNS": str(tmp_path / "runs"),
            "TFBENCH_UNITS": str(units),
        }

        def write(self, **changed):
            "The notebook, with some of its cells changed."
            notebook = read_notebook(self.path)
            cells = notebook["cells"][:4]
            line = "again: bool = False  # train anew"
            cells[2]["source"] = f"n: int = 3  # a number [1..9]\n{line}"
            for name, source in (CELLS | changed).items():
                tags = {"tags": ["checks"]} if name == "checks" else {}
                more = {"cell_type": "code", "outputs": [], "execution_count": None}
                cells.append({"id": name, "source": source, "metadata": tags} | more)
            self.path.write_text(notebook_text(notebook | {"cells": cells}))

        def __call__(self, *arguments):
            return command("tfbench", *arguments, cwd=tmp_path, **self.environment)

        def printed(self):
            cells = read_notebook(self.path)["cells"]
            outputs = next(c for c in cells if c["id"] == "call")["outputs"]
            return "".join("".join(o["text"]) for o in outputs)

        def files(self):
            return {p.name: p.read_bytes() for p in self.path.parent.iterdir()}

    made = Bench()
    made.units.mkdir()
    made.write(checks="pass")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def test_trained_kept_and_read(bench):
    done = bench("refresh", "toy", "--again")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(bench.kept.read_text()) == {"experiments": {"rates": 3}}
    assert bench.kept.with_suffix(".safetensors").read_bytes() == b"weights"
    assert bench.printed() == "read\n", "the committed outputs are those of a run that reads"
    assert len(bench.files()) == 3, "nothing else lies beside the notebook"


def test_a_failed_first_run_leaves_everything(bench):
    before = bench.files()
    (bench.units / "fail").touch()
    done = bench("refresh", "toy", "--again")
    assert done.returncode == 1 and "no further" in done.stdout
    assert "the same command goes on" in done.stderr and bench.files() == before
    (bench.units / "fail").unlink()
    assert bench("refresh", "toy", "--again").returncode == 0 and bench.printed() == "read\n"


def test_an_interrupted_first_run_leaves_everything(bench):
    before = bench.files()
    (bench.units / "wait").touch()
    process = start("tfbench", "refresh", "toy", "--again", cwd=bench.nbs, **bench.environment)
    until(lambda: (bench.units / "first").exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130 and "the same command goes on" in said, said
    assert "Traceback" not in said and bench.files() == before


def test_a_chapter_that_keeps_nothing(bench):
    bench.write(checks="pass", call="print('no experiment')")
    before = bench.files()
    done = bench("refresh", "toy", "--again")
    assert done.returncode == 2 and "has no experiment that keeps" in done.stderr
    assert bench.files() == before


def test_replay_passes_and_fails(bench):
    with pytest.raises(ChapterError, match="nothing is kept"):
        replay("toy")
    bench.kept.write_text('{"experiments": {"rates": 3}}')
    bench.write()
    result = replay("toy")
    assert (result.status, result.error) == ("ok", None)
    bench.write(**{"set-up": EXPERIMENT + "RATE = 4"})
    result = replay("toy")
    assert result.status == "failed" and result.cell == "call"
    assert "kept 3, now 4" in result.error


@pytest.mark.parametrize(
    "cells, last",
    [
        ({"call": "run = Experiment('rates')()"}, "call"),
        ({"call": "first = rates()", "after": "if n: second = rates()"}, "after"),
        ({"call": "print(rates)"}, None),
        ({"make": "rates = Experiment('others')"}, None),
    ],
)
def test_a_replay_finds_the_last_call(bench, cells, last):
    from tfbench.workbench.runs import _last_call

    bench.write(**cells)
    chapter = find("toy")
    if last:
        assert chapter.notebook["cells"][_last_call(chapter, {"rates"})]["id"] == last
        return
    with pytest.raises(ChapterError, match="no cell calls the experiment 'rates'"):
        _last_call(chapter, {"rates"})
