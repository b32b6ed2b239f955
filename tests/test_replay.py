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


# A chapter with an experiment of one arm and two seeds; the second seed waits and fails as told.
SET_UP = """
import os, pathlib, time
from tfbench.study.arms import Own
from tfbench.study.claims import Claims
from tfbench.study.experiment import Experiment

claims = Claims("toys/toy", globals())
told = pathlib.Path(os.environ["TFBENCH_TOLD"])

def train(seed, setting, limit):
    with told.joinpath("begun").open("a") as log: print(seed, file=log)
    while seed and told.joinpath("wait").exists(): time.sleep(0.05)
    if seed and told.joinpath("fail").exists(): raise ValueError("no further")
    return None, [RATE / (step + 1) for step in range(20)][:limit], {"rate": RATE + seed}
"""
CELLS = {
    "set-up": SET_UP + "\nRATE = 3",
    "make": 'rates = Experiment("rates", claims, {"toy": Own(train)}, [0, 1])',
    "checks": "raise ValueError('a check that a replay does not run')",
    "call": "print(rates().values('toy', 'rate'))",
    "after": "assert not os.environ.get('TFBENCH_REPLAY'), 'a replay ends before'",
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    "A chapter with an experiment, and the command line on it."

    class Bench:
        told, nbs = tmp_path / "told", toy(tmp_path)
        path = nbs / "toys" / "01_toy.ipynb"
        kept = path.with_suffix(".kept.json")
        environment = {
            "TFBENCH_NBS": str(nbs),
            "TFBENCH_RUNS": str(tmp_path / "runs"),
            "TFBENCH_UNITS": str(tmp_path / "units"),
            "TFBENCH_TOLD": str(told),
        }

        def write(self, **changed):
            "The notebook, with some of its cells changed."
            notebook = read_notebook(self.path)
            cells = notebook["cells"][:4]
            cells[2]["source"] = "n: int = 3  # a number [1..9]\nagain: bool = False  # train anew"
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

        def begun(self):
            log = self.told / "begun"
            return log.read_text().split() if log.exists() else []

        def files(self):
            return {p.name: p.read_bytes() for p in self.path.parent.iterdir()}

    made = Bench()
    made.told.mkdir()
    made.write(checks="pass")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def test_trained_kept_read_and_replayed(bench):
    with pytest.raises(ChapterError, match="nothing is kept"):
        replay("toy")
    done = bench("refresh", "toy", "--again")
    assert done.returncode == 0, done.stdout + done.stderr
    units = json.loads(bench.kept.read_text())["experiments"]["rates"]["arms"]["toy"]["units"]
    assert {seed: unit["measured"] for seed, unit in units.items()} == {
        "0": {"rate": 3},
        "1": {"rate": 4},
    }
    assert bench.begun() == ["0", "1"], "the second run reads"
    assert bench.printed() == "[3. 4.]\n" and len(bench.files()) == 2
    bench.write()  # its checks fail
    result = replay("toy")
    assert (result.status, result.error) == ("ok", None)
    bench.write(**{"set-up": SET_UP + "\nRATE = 2 + 1"})
    assert replay("toy").status == "ok", "other code that computes the same"
    bench.write(**{"set-up": SET_UP + "\nRATE = 4"})
    result = replay("toy")
    assert result.status == "failed" and result.cell == "call"
    assert result.error.startswith("ReplayError") and "kept is 3" in result.error


def test_a_failed_first_run_leaves_everything_and_goes_on(bench):
    before = bench.files()
    (bench.told / "fail").touch()
    done = bench("refresh", "toy", "--again")
    assert done.returncode == 1 and "no further" in done.stdout
    assert "the same command goes on" in done.stderr and bench.files() == before
    (bench.told / "fail").unlink()
    assert bench("refresh", "toy", "--again").returncode == 0
    assert bench.printed() == "[3. 4.]\n"
    assert bench.begun() == ["0", "1", "1"], "the first seed was finished"


def test_an_interrupted_first_run_leaves_everything(bench):
    before = bench.files()
    (bench.told / "wait").touch()
    process = start("tfbench", "refresh", "toy", "--again", cwd=bench.nbs, **bench.environment)
    until(lambda: process.poll() is not None or bench.begun()[-1:] == ["1"])
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130 and "the same command goes on" in said, said
    assert "Traceback" not in said and bench.files() == before


def test_nothing_to_keep_and_nothing_to_read(bench):
    bench.write(checks="pass", make="", call="print('no experiment')")
    before = bench.files()
    done = bench("refresh", "toy", "--again")
    assert done.returncode == 2 and "has no experiment that keeps" in done.stderr, done.stderr
    assert bench.files() == before
    bench.kept.write_text("{half")
    with pytest.raises(ChapterError, match="01_toy.kept.json: it cannot be read"):
        replay("toy")


@pytest.mark.parametrize(
    "cells, last",
    [
        ({"call": "run = Experiment('rates', claims)()"}, "call"),
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
