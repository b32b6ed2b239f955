"The tools of authors: a new chapter, what CI will say about it, what its checks catch, copies."

import base64
import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, command

from tfbench.workbench.chapters import (
    copy_notebooks,
    find,
    read_chapter,
    read_mutants,
)
from tfbench.workbench.check import chapter_breaches, kept_breaches, notebook_breaches
from tfbench.workbench.check import output_breaches as outputs
from tfbench.workbench.mutants import cells_to_run, choose, mutants, mutants_of
from tfbench.workbench.new import new_chapter, skeleton
from tfbench.workbench.prose import prose_breaches
from tfbench.workbench.records import MIME, ChapterError
from tfbench.workbench.runs import notebook_text

PICTURE = base64.b64encode(b"a picture").decode()


def cell_of(notebook: dict, id: str) -> dict:
    return next(cell for cell in notebook["cells"] if cell["id"] == id)


def code(id: str, source: str, *tags: str) -> dict:
    metadata = {"tags": list(tags)} if tags else {}
    cell = dict(cell_type="code", id=id, source=source.splitlines(keepends=True))
    return cell | dict(metadata=metadata, outputs=[], execution_count=None)


def words(id: str, source: str) -> dict:
    return dict(cell_type="markdown", id=id, source=source.splitlines(keepends=True), metadata={})


@pytest.fixture
def chapter(tmp_path):
    "A chapter of the new form that keeps every rule: the skeleton, written out and drawn."
    notebook = skeleton("toys", "one", "A toy")
    text = json.dumps(notebook).replace("year: TO WRITE", "year: 2026").replace("TO WRITE", "Here")
    notebook = json.loads(text)
    alone = {"image/png": PICTURE, "text/plain": "Two bars."}
    drawn = dict(output_type="display_data", data=alone, metadata={})
    cell_of(notebook, "idea-figure")["outputs"] = [drawn]
    return notebook


def written(notebook: dict, folder: Path) -> Path:
    path = folder / "toys" / "01_one.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(notebook_text(notebook))
    return path


def test_the_new_form_can_be_kept(chapter, tmp_path):
    path = written(chapter, tmp_path)
    assert notebook_breaches(path) + chapter_breaches(path) + kept_breaches(path) == []


def heading(notebook, old, new):
    for cell in notebook["cells"]:
        cell["source"] = [line.replace(f"## {old}", f"## {new}") for line in cell["source"]]


def swap(notebook, a, b):
    cells = notebook["cells"]
    i, j = cells.index(cell_of(notebook, a)), cells.index(cell_of(notebook, b))
    cells[i], cells[j] = cells[j], cells[i]


def change(id, old, new):
    def damage(notebook):
        source = "".join(cell_of(notebook, id)["source"])
        assert old in source
        cell_of(notebook, id)["source"] = source.replace(old, new).splitlines(keepends=True)

    return damage


def output(id, **data):
    def damage(notebook):
        drawn = dict(output_type="display_data", data=data, metadata={})
        cell_of(notebook, id)["outputs"] = [drawn]

    return damage


MANY = "\n".join(f"p{i}: int = {i}  # a number" for i in range(12))
DAMAGE = {
    "not one of the parts": lambda n: heading(n, "Look", "Views"),
    "parts are missing: Look": lambda n: heading(n, "Look", "Exact checks again"),
    "Exercises: stands after Limits": lambda n: swap(n, "exercises", "limits"),
    "61 cells, at most 60": lambda n: n["cells"].extend(
        words(f"more-{i}", "More.") for i in range(61 - len(n["cells"]))
    ),
    "parameters, at most 12": change("parameters", "seed:", MANY + "\nseed:"),
    "26 lines, at most 25": lambda n: n["cells"].append(code("long", "x = 1\n" * 26)),
    "61 lines, at most 60": lambda n: n["cells"].append(
        code("long", "class A:\n" + "    x = 1\n" * 60)
    ),
    "101 columns, at most 100": lambda n: n["cells"].append(code("wide", "#" * 101)),
    "no cell is tagged checks": lambda n: cell_of(n, "exact-absolute").update(metadata={}),
    "no figure within the first five": lambda n: cell_of(n, "idea-figure").update(outputs=[]),
    "a figure without alt text": output("result", **{"image/png": PICTURE}),
    "figure without alt": output("result", **{"image/png": PICTURE, "text/plain": "<Figure>"}),
    "a picture without alt text": change("idea", "Here", "![](bars.png)"),
    "no profile quick": change("profiles", "quick", "fast"),
    "no parameter `again: bool`": change("parameters", "again: bool = False", "again: int = 0"),
    "text that is to be written": change("limits", "Here", "TO WRITE"),
    "no parameter seed": change("parameters", "seed:", "sed:"),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_every_rule_of_the_new_form_can_fail(chapter, tmp_path, says):
    DAMAGE[says](chapter)
    found = chapter_breaches(written(chapter, tmp_path))
    assert any(says in breach for breach in found), found


def test_old_chapters_keep_the_old_rules(chapter, tmp_path):
    change("title", "- form: 2", "- form: 1")(chapter)
    found = chapter_breaches(written(chapter, tmp_path))
    assert len(found) == 1 and "expected the headings" in found[0]


def test_tags_and_sizes(chapter, tmp_path):
    cell_of(chapter, "result")["metadata"] = {"tags": ["checks", "slow"]}
    large = base64.b64encode(b"x" * 40_001).decode()
    output("result", **{"image/png": large, "text/plain": "Large."})(chapter)
    chapter["cells"].append(words("long", "x" * 250_000))
    path = written(chapter, tmp_path)
    found = " ".join(notebook_breaches(path))
    assert "tags ['checks', 'slow']" in found and "figure of 40 kB" in found
    assert re.search(r"the notebook has 3\d\d kB", found)
    path.with_suffix(".kept.safetensors").write_bytes(bytes(1_000_001))
    assert kept_breaches(path) == ["01_one.kept.safetensors has 1000 kB, allowed are 1000"]


CLAIM = {
    "id": "headline",
    "headline": True,
    "kind": "statistical",
    "statement": "It falls",
    "note": "",
    "paper": {"value": 0.98, "source": "Table 2"},
    "measured": {"estimate": -0.4137, "low": -0.45, "high": -0.38, "n": 5},
    "verdict": "holds",
    "expected": False,
    "post_hoc": False,
}


def with_record(notebook: dict, folder: Path, claims: list) -> Path:
    path = written(notebook, folder)
    read = read_chapter(path)
    record = dict(chapter=read.slug, profile="laptop", parameters=read.resolve(), library={})
    record |= dict(code_sha256=read.code_sha256, seconds=9.0, versions={}, measurements={})
    record |= dict(claims=claims, kept={}, timings={}, mutants=None)
    shown = dict(output_type="display_data", data={MIME: record}, metadata={})
    cell_of(notebook, "judged")["outputs"] = [shown]
    return written(notebook, folder)


@pytest.mark.parametrize(
    "says, claims",
    [
        (None, [CLAIM]),
        ("0 claims, expected 1 to 8", []),
        ("9 claims", [CLAIM] + [CLAIM | {"id": str(i), "headline": False} for i in range(8)]),
        ("the first claim is the headline", [CLAIM | {"headline": False}]),
        ("the first claim is the headline", [CLAIM, CLAIM]),
        ("not declared before they were judged: headline", [CLAIM | {"post_hoc": None}]),
        ("verdict 'maybe'", [CLAIM | {"verdict": "maybe"}]),
        ("expected to hold, and undecided", [CLAIM | {"verdict": "undecided", "expected": True}]),
    ],
)
def test_committed_claims(chapter, tmp_path, says, claims):
    found = outputs(with_record(chapter, tmp_path, claims))
    assert found == [] if says is None else any(says in breach for breach in found), found


def test_committed_prose_and_stale_outputs(chapter, tmp_path):
    change("found", "Here", "It is 0.41, and not 0.52. Here")(chapter)
    path = with_record(chapter, tmp_path, [CLAIM])
    assert outputs(path) == ["found: the record has no 0.52: It is 0.41, and not 0.52."]
    change("declared", "below=0", "below=1")(chapter)
    assert "made from other code" in outputs(written(chapter, tmp_path))[0]


RECORD = {
    "claims": [CLAIM],
    "parameters": {"steps": 1200, "rates": [0.003, 0.01]},
    "measurements": {"error": {"ours": 0.0712, "ratio": 1.104}, "bytes": 52_428},
    "kept": {"main": {"seconds": 731.0}},
    "timings": {"speed": 0.12},
    "seconds": 41.0,
}
GOOD = (
    "Error falls by 0.41 [0.38, 0.45], that is 41 % (38 to 45 %), with n = 5.",
    "After 1,200 steps it is 7.1 %, or 0.071, at a rate of 0.003.",
    "It ends 10 % farther away, a ratio of 1.10; the file has 52,428 bytes.",
    "The paper reports 99.5 % in Table 7, and Fig. 3 shows 77 of 123.",
    "Training took 731 s; opening takes 41 s, and 0.12 s a step.",
    "Three of 20 heads, T5 and GPT-2, `lr=0.77` and $n = 400$ (Li et al., 2022).",
    "```\nsteps = 4711\n```\n### In 4711 steps\nSee [there](other_4711.ipynb), arXiv:2210.17323.",
)
BAD = {
    "0.42": "Error falls by 0.42.",
    "42 %": "Error falls by 42 %.",
    "0.412": "Error falls by 0.412, one digit too many.",
    "1,300": "After 1,300 steps it is 7.1 %.",
    "21": "All 21 of them.",
    "13 %": "It ends 13 %\nfarther away.",
    "99.5 %": "Table 7 says nothing of this. The paper reports 99.5 %.",
    "0.9": "| arm | error |\n|---|---|\n| ours | 0.9 |",
}


def told(text: str, place: str = "after") -> list:
    cells = [words("before", "Before, 0.999 is free."), words("exp", "## Experiment: which?")]
    last = [words("last", "## References\n1. Pages 456-789, volume 0.5")]
    return prose_breaches({"cells": [*cells, words("after", text), *last]}, RECORD)


@pytest.mark.parametrize("text", GOOD)
def test_numbers_that_the_record_holds(text):
    assert told(text) == []


@pytest.mark.parametrize("number", BAD)
def test_numbers_that_no_record_holds(number):
    found = told(BAD[number])
    assert len(found) == 1 and f"no {number}:" in found[0], found


def test_mutants_of_code_keep_what_is_around_them():
    source = 'def f(x, y):\n    "Adds 1."  # ü\n    return x.sum(-1) + y[1:] * 2  # ü + 1\n'
    found = mutants_of("f", source)
    assert {m.kind for m in found} == {"axis", "sign", "term", "off by one", "constant"}
    for mutant in found:
        compile(mutant.source, "f", "exec")
        assert mutant.source.splitlines()[1] == source.splitlines()[1]
        assert mutant.source.endswith("# ü + 1\n") and mutant.source != source
    assert len(choose(found, 9)) == 1, "one line, one mutant"
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        choose(found, 0)


EXPORTED = """#| export
def total(n):
    found = 0
    while n:
        found += n
        n -= 1
    return found
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "`toy(check)`: a chapter `toys/toy` with one function, one check, and a cell that fails later."
    monkeypatch.setenv("TFBENCH_NBS", str(tmp_path))
    (tmp_path / "toys").mkdir()

    def write(check, form=2):
        cells = [words("title", f"# Toy\n> Sums.\n\n- form: {form}"), code("function", EXPORTED)]
        cells += [code("parameters", "n: int = 9  # a number", "parameters")]
        cells += [code("profiles", "profiles = {'test': {'n': 3}}", "profiles")]
        cells += [words("exact", "## Exact checks"), code("check", check, "checks")]
        cells += [words("experiment", "## Experiment"), code("later", "1 / 0")]
        notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        (tmp_path / "toys" / "01_toy.ipynb").write_text(notebook_text(notebook))
        return notebook

    return write


@pytest.mark.parametrize("form", [1, 2])
def test_which_cells_run(toy, form):
    ids = [cell["id"] for cell in cells_to_run(toy("assert total(n) == n", form), form)]
    used = ["function", "parameters", "check"]
    assert ids == (used if form == 2 else [*used[:2], "profiles", "check"])


def test_what_is_defined_after_its_use_runs_too(toy):
    notebook = toy("assert total(2) == 3")
    first = code("first", "#| export\ndef outer(n):\n    return total(n)")
    notebook["cells"].insert(1, first)
    notebook["cells"][-3]["source"] = "assert outer(2) == 3"
    assert [c["id"] for c in cells_to_run(notebook, 2)][:2] == ["first", "function"]


def test_what_binds_a_name_after_the_checks_does_not_run(toy):
    notebook = toy("assert outer(n) == total(n)")
    later = [
        code("endless", "for n in range(10**9):\n    pass"),
        code("rebound", "total = None\nn += 1"),
        code("defined", "class Unused:\n    pass\ndef outer(n):\n    return total(n)"),
    ]
    at = 1 + [c["id"] for c in notebook["cells"]].index("check")
    notebook["cells"][at:at] = later
    ids = [c["id"] for c in cells_to_run(notebook, 2)]
    assert ids == ["function", "parameters", "check", "defined"]


def test_mutants_are_caught_or_named(toy, monkeypatch):
    "One of them never ends: it hangs, and is caught."
    monkeypatch.setattr("tfbench.workbench.mutants.PATIENCE", 2)
    toy("assert total(n) == 6")
    found = mutants("toy", n=20)
    assert found["n"] == 3 and found["share"] == 1 and found["survivors"] == [], found
    toy("assert total(n) >= 6")
    (survivor,) = mutants("toy", n=20, keep=True)["survivors"]
    assert survivor == dict(cell="function", line=3, kind="constant", before="0", after="1")


def test_what_the_checks_catch_is_kept_for_the_record(toy):
    "It counts for this very code alone."
    toy("assert total(n) >= 6")
    chapter = find("toy")
    assert read_mutants(chapter.path, chapter.code_sha256) is None
    found = mutants("toy", n=2, keep=True)
    told = {name: found[name] for name in ("share", "n", "seed")}
    assert read_mutants(chapter.path, chapter.code_sha256) == told
    assert read_mutants(chapter.path, "of other code") is None


def test_mutants_of_what_is_broken_already(toy):
    toy("assert total(n) == 9")
    with pytest.raises(ChapterError, match="fails without being broken: check: AssertionError"):
        mutants("toy")


def test_copies_overwrite_nothing(tmp_path):
    (tmp_path / "mine" / "nbs").mkdir(parents=True)
    (tmp_path / "mine" / "nbs" / "papers.toml").write_text("mine = 1")
    written, there = copy_notebooks(tmp_path / "mine")
    assert (
        there == [tmp_path / "mine" / "nbs" / "papers.toml"] and there[0].read_text() == "mine = 1"
    )
    assert len(written) > 80 and all(path.exists() for path in written)
    (tmp_path / "file").write_text("")
    with pytest.raises(ChapterError, match="is a file"):
        copy_notebooks(tmp_path / "file")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["new", "compression/minilmm"], "did you mean compression/minilm"),
        (["new", "minilm"], "did you mean compression/minilm"),
        (["new", "compression/gptq"], "compression/gptq exists: "),
        (["check", "workbench/runs"], "is no chapter"),
        (["check", "gptqq"], "did you mean"),
        (["mutants", "gptqq"], "did you mean"),
    ],
)
def test_bad_input_is_one_line(tfbench, arguments, says):
    done = tfbench(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"tfbench: [^\n]+\n", done.stderr) and says in done.stderr, done.stderr


def test_a_new_chapter_from_skeleton_to_check(tmp_path):
    "It exports, runs, is refreshed, and all that `check` misses is what is to be written."
    for name in ("nbs", "tfbench"):
        left = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left)
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)

    def call(*arguments):
        return command(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path), timeout=600)

    made = call("tfbench", "new", "compression/minilm")
    assert made.returncode == 0 and "nbs/compression/" in made.stdout.replace(os.sep, "/")
    assert call("nbdev_export").returncode == 0
    done = call("tfbench", "refresh", "compression/minilm")
    assert done.returncode == 0, done.stdout + done.stderr
    done = call("tfbench", "check", "compression/minilm")
    wrong = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert done.returncode == 1 and len(wrong) > 10
    assert [line for line in wrong if "text that is to be written" not in line] == [], done.stdout
    found = call("tfbench", "mutants", "compression/minilm", "--n", "3")
    assert found.returncode == 0 and "mutants caught (" in found.stdout, found.stderr


def test_new_chapters_are_numbered(tmp_path, monkeypatch):
    shutil.copy(ROOT / "nbs" / "papers.toml", tmp_path)
    monkeypatch.setenv("TFBENCH_NBS", str(tmp_path))
    assert new_chapter("language/prop").name == "01_prop.ipynb"
    assert new_chapter("language/ul2").name == "02_ul2.ipynb"
    before = copy.copy((tmp_path / "language" / "01_prop.ipynb").read_bytes())
    with pytest.raises(ChapterError, match="language/prop exists"):
        new_chapter("language/prop")
    assert (tmp_path / "language" / "01_prop.ipynb").read_bytes() == before
