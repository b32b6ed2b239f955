"""Every reader of files, given files that are damaged or made to do harm: it says in one line which
file is wrong and why, or reads what is right; it runs nothing, and the other files are still read.
"""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from tfbench.study import kept as files
from tfbench.study.searches import read_searches, searches_text
from tfbench.train.loop import TrainConfig, fit
from tfbench.workbench import chapters
from tfbench.workbench.front import papers, scoreboard
from tfbench.workbench.records import MIME, claims_record, read_notebook
from tfbench.workbench.results import read_sweep, results, run_rows

# ---- damages: what becomes of the good bytes


class Evil:
    "Leaves a file behind when it is unpickled."

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def cut(share: float):
    return lambda good: good[: int(len(good) * share)]


def always(data: bytes):
    return lambda good: data


def again(good: bytes) -> bytes:
    "Its first name twice."
    inside = good.lstrip()[1:]
    name = inside.split(b":")[0].split(b"=")[0]
    return b"{" + name + b": 1," + inside


def text(encoding: str):
    return lambda good: (good.decode(errors="replace") + "\u00e4").encode(encoding)


def first_value(value: bytes):
    "One level down: another value in the place of the first one of the top."

    def damage(good: bytes) -> bytes:
        found = json.loads(good)
        name = next(iter(found))
        return json.dumps(found | {name: "HERE"}).encode().replace(b'"HERE"', value)

    return damage


BYTES = {
    **{f"cut at {share}": cut(share) for share in (0.01, 0.3, 0.6, 0.99)},
    **{repr(top): always(top) for top in (b"", b"null", b"1", b"[]", b'"text"', b"true", b"{")},
    **{f"inside {v[:20]}": first_value(v) for v in (b"null", b"[1]", b"-1e999", b"NaN")},
    "Infinity inside": first_value(b"-Infinity"),
    "5,000 digits": first_value(b"1" * 5000),
    "400 digits": first_value(b"1" * 400),
    "deep inside": first_value(b"[" * 10_000 + b"]" * 10_000),
    "deep": always(b"[" * 10_000),
    "a name twice": again,
    "UTF-16": text("utf-16"),
    "BOM": lambda good: b"\xef\xbb\xbf" + good,
    "Latin-1": lambda good: good + b"\xe4",
    "null bytes": always(b"\0" * 100),
    "null bytes after": lambda good: good + b"\0",
    "random": always(torch.randint(256, (999,), generator=torch.Generator()).byte().numpy()),
    "pickle": always(pickle.dumps(Evil())),
    "a conflict": lambda good: b"<<<<<<< ours\n" + good,
    "a header of 2^62 bytes": always((1 << 62).to_bytes(8, "little") + b"{}"),
}
JSON_ALONE = [n for n, d in BYTES.items() if d.__qualname__.startswith(("first_value", "again"))]


def a_folder(path: Path):
    path.unlink()
    path.mkdir()


def a_pipe(path: Path):
    path.unlink()
    os.mkfifo(path)


def a_link(target: str):
    def damage(path: Path):
        path.unlink()
        path.symlink_to(target)

    return damage


PLACES = {
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a dangling link": a_link("nowhere"),
    "a link to itself": lambda path: a_link(path.name)(path),
    "a link out": a_link("/etc/hostname"),
    "a link to a device": a_link("/dev/zero"),
}


def damaged(path: Path, name: str) -> None:
    if name in PLACES:
        PLACES[name](path)
    else:
        path.write_bytes(bytes(BYTES[name](path.read_bytes())))


# ---- readers: a good file in a folder, and what is read from it


def cell(source: str, *tags: str, kind="code", **more) -> dict:
    made = {"cell_type": kind, "id": hashlib.sha256(source.encode()).hexdigest()[:8]}
    return made | {"source": [source], "metadata": {"tags": list(tags)}, "outputs": []} | more


CLAIM = {
    "id": "falls",
    "kind": "statistical",
    "statement": "It falls",
    "paper": {"value": 1, "source": "Table 1"},
    "measured": {"estimate": 0.5, "low": 0.4, "high": 0.6, "n": 5},
    "verdict": "holds",
    "expected": True,
    "note": "",
}
RECORD = {
    "chapter": "toys/toy",
    "profile": "laptop",
    "seconds": 1.5,
    "code_sha256": "0" * 64,
    "measurements": {"loss": 0.1},
    "claims": [CLAIM],
}
CELLS = [
    cell("# Toy\n> Sums.", kind="markdown"),
    cell("n: int = 9  # a number", "parameters"),
    cell("profiles = {'test': {'n': 3}}", "profiles"),
    cell("n", outputs=[{"output_type": "display_data", "data": {MIME: RECORD}, "metadata": {}}]),
]
NOTEBOOK = {"cells": CELLS, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
UNIT = {"steps": 1, "first": [1.0], "every": 1, "losses": [1.0], "measured": {}, "seconds": 1.0}
UNIT |= {"when": "now", "threads": 1, "versions": {}}
RECIPE = {"call": "torch.nn:Linear", "args": [2, 1], "named": {}}
ARM = {"settings": [{}], "tried": None, "setting": {}, "recipe": RECIPE, "models": [0]}
LINES = {"identity": "0" * 16, "parameters": {}, "code": {}, "library": "1", "declared": None}
KEPT = {"format": 1, "chapter": "toys/toy", "weights": None}
KEPT |= {"experiments": {"lines": LINES | {"arms": {"one": ARM | {"units": {"0": UNIT}}}}}}
SEARCH = {"parameters": {}, "code": {}, "settings": {"a": [{"lr": 1}]}, "losses": {"a": [0.5]}}
RUN = {"chapter": "toys/toy", "profile": "test", "parameters": {"n": 3}, "device": "cpu"}
RUN |= {"status": "ok", "seconds": 1.5, "started": "2026-01-01T00:00:00+00:00", "identity": "a"}
RUN |= {"cell": None, "error": None, "record": None}
MUTANTS = {"code_sha256": "a", "n": 40, "seed": 0, "share": 0.9, "survivors": []}
SWEEP = {"chapter": "toys/toy", "profile": "test", "identities": ["a"]}
PAPERS = 'toys.toy = "A toy"\n'


def dumped(value) -> bytes:
    return json.dumps(value).encode()


def weights(path: Path, notebook: Path):
    "The hash in the JSON file is that of the damaged file: only its contents can be refused."
    known = path.read_bytes() if path.is_file() else b""
    return files.read_weights(notebook, {"weights": hashlib.sha256(known).hexdigest()})


def trained(path: Path, notebook: Path):
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    config = TrainConfig(2, checkpoint=str(path))
    batch = lambda step: torch.ones(1, 1)  # noqa: E731
    return fit(model, batch, lambda m, x: m(x).square().mean(), config).rows


def checkpoint(folder: Path) -> bytes:
    path = folder / "made.safetensors"
    trained(path, None)
    return path.read_bytes()


READERS = {  # name of the file, its good bytes, reader(path, notebook)
    "kept": ("nbs/toys/01_toy.kept.json", dumped(KEPT), lambda p, n: files.read_kept(n)),
    "weights": ("nbs/toys/01_toy.kept.safetensors", save({"a": torch.ones(3)}), weights),
    "notebook": ("nbs/toys/02_read.ipynb", dumped(NOTEBOOK), lambda p, n: read_notebook(p)),
    "record": (
        "nbs/toys/02_read.ipynb",
        dumped(NOTEBOOK),
        lambda p, n: claims_record(read_notebook(p)),
    ),
    "chapter": ("nbs/toys/02_read.ipynb", dumped(NOTEBOOK), lambda p, n: chapters.read_chapter(p)),
    "checkpoint": ("fit.safetensors", checkpoint, trained),
    "searches": (
        "nbs/toys/01_toy.searches.json",
        searches_text({"all": SEARCH}).encode(),
        lambda p, n: read_searches(n),
    ),
    "mutants": (
        "nbs/toys/01_toy.mutants.json",
        dumped(MUTANTS),
        lambda p, n: chapters.read_mutants(n, "a"),
    ),
    "sweep": ("runs/.sweeps/all.json", dumped(SWEEP), lambda p, n: read_sweep("runs", "all")),
    "papers": ("nbs/papers.toml", PAPERS.encode(), lambda p, n: papers()),
}
NO_JSON = ("weights", "checkpoint", "papers")
CASES = [
    (reader, damage)
    for reader in READERS
    for damage in [*BYTES, *PLACES]
    if not (reader in NO_JSON and damage in JSON_ALONE)
]

HARMLESS = {  # what is read then; None: what is right
    ("papers", "b''"): "{}",  # an empty list of papers
    ("papers", "cut at 0.01"): "{}",
    ("papers", "cut at 0.99"): None,  # it lacks a line's end
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder to stand in, with one good chapter."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFBENCH_NBS", str(tmp_path / "nbs"))
    written(Path("nbs/toys/01_toy.ipynb"), dumped(NOTEBOOK))
    Path("nbs/papers.toml").write_text(PAPERS)
    yield tmp_path
    assert not Path("executed").exists()


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refusal(path: Path, read, *given) -> str | None:
    "What the reader says, which must be of use; None if it reads."
    try:
        read(*given)
    except ValueError as error:
        said = str(error)
    else:
        return None
    assert path.name in said and "\n" not in said and len(said) < 600, said
    return said


def test_there_are_enough():
    counts = {reader: sum(r == reader for r, _ in CASES) for reader in READERS}
    assert min(counts.values()) >= 20, counts


@pytest.mark.parametrize(("reader", "damage"), CASES)
def test_hostile(place, reader, damage):
    name, good, read = READERS[reader]
    path = written(place / name, good(place) if callable(good) else good)
    notebook = place / "nbs/toys/01_toy.ipynb"
    right = read(path, notebook)
    damaged(path, damage)
    if refusal(path, read, path, notebook) is None:
        expected = HARMLESS[reader, damage] or repr(right)
        assert repr(read(path, notebook)) == expected, "harmless damage changes nothing"
    assert chapters.find("toy").title == "Toy", "the good file is read still"


@pytest.mark.parametrize("damage", [*BYTES, *PLACES])
def test_one_bad_notebook_hides_no_other(place, damage):
    path = written(place / "nbs/toys/02_bad.ipynb", dumped(NOTEBOOK))
    damaged(path, damage)
    assert [c.slug for c in chapters.find_chapters()] == ["toys/toy"]
    (problem,) = chapters.unreadable()
    assert str(path) in problem and refusal(path, chapters.find, "bad") == problem


@pytest.mark.parametrize("damage", [*BYTES, *PLACES])
@pytest.mark.parametrize("name", ["run.json", "notebook.ipynb", "../../../.index.json"])
def test_one_bad_run_hides_no_other(place, name, damage):
    for run in ("one", "two"):
        folder = place / "runs/toys/toy" / run
        written(folder / "run.json", dumped(RUN))
        written(folder / "notebook.ipynb", dumped(NOTEBOOK))
    run_rows("runs")
    damaged(place / "runs/toys/toy/one" / name, damage)
    table = results(runs="runs")
    bad, good = table.to_dict("records")
    assert good["status"] == "ok" and good["loss"] == 0.1 and good["n"] == 3
    if name.endswith(".index.json"):
        assert bad["status"] == "ok" and bad["loss"] == 0.1
    else:
        assert bad["status"] == "damaged" and bad["error"].startswith(name)


ODD_CELLS = {
    "parameters": (
        "n: int = " + "-" * 10_000 + "1",
        "n: int = " + "[" * 10_000,
        "n: int = " + "9" * 5000,
        "n: int = 10**3",
        "n: int = __import__('pathlib').Path('executed').touch()",
        "n: int = 9  # a number [low..high]",
        "n: int = 9  # a number [10..20]",
        "n: list = [1]",
        'n: str = """',
        "n: int = 9\0",
        "n: int",
        "import os",
        "seconds: int = 3",
    ),
    "profiles": (
        "profiles = open('executed', 'w')",
        "profiles = 3",
        "profiles = {'test': 3}",
        "profiles = {'test': {'n': 'x'}}",
        "profiles = {'test': {'m': 3}}",
        "profiles = {'test': {3: 3}}",
        "profiles = " + "{1:" * 10_000,
        "# none",
        "import os",
    ),
}


@pytest.mark.parametrize(("tag", "source"), [(t, s) for t in ODD_CELLS for s in ODD_CELLS[t]])
def test_odd_cells(place, tag, source):
    cells = [c for c in CELLS if tag not in c["metadata"]["tags"]]
    path = written(Path("nbs/toys/02_bad.ipynb"), dumped({"cells": [*cells, cell(source, tag)]}))
    assert refusal(path, chapters.read_chapter, path) is not None


ODD_RECORDS = [
    *(None, 1, "text", [], [RECORD], {}),
    *(RECORD | {name: value} for name in list(RECORD)[1:] for value in (None, True)),
    *(RECORD | {"claims": [CLAIM | {name: [1]}]} for name in CLAIM),
    *(RECORD | {"claims": [{n: v for n, v in CLAIM.items() if n != name}]} for name in CLAIM),
    *(RECORD | {"mutants": odd} for odd in (3, [], {"share": 0.5}, {"share": "high", "n": 3})),
    *(RECORD | {"library": odd} for odd in (None, [1], {"tfbench.core": 3})),
    *(
        RECORD | {"claims": [CLAIM | {"rule": odd}]}
        for odd in ([1], True, {"above": None}, {"above": []}, {"above": "0"})
    ),
    RECORD | {"claims": [CLAIM | {"rule": {"above": 0}, "headline": 1}]},
]


@pytest.mark.parametrize("number", range(len(ODD_RECORDS)))
def test_odd_records(place, number):
    output = {"output_type": "display_data", "data": {MIME: ODD_RECORDS[number]}, "metadata": {}}
    path = written(Path("nbs/toys/02_bad.ipynb"), dumped({"cells": [cell("n", outputs=[output])]}))
    assert refusal(path, chapters.read_chapter, path) is not None
    assert [row["id"] for row in scoreboard()] == ["falls"]


@pytest.mark.parametrize("started", ["2026-01-01", "2026", "2026-01-01T00:00:00.5", "yesterday"])
def test_an_odd_time_is_no_other_runs_time(place, started):
    for name, when in (("one", started), ("two", "2026-01-02T03:04:05+00:00")):
        folder = place / "runs/toys/toy" / name
        written(folder / "run.json", dumped(RUN | {"started": when}))
        written(folder / "notebook.ipynb", dumped(NOTEBOOK))
    table = results(runs="runs")
    assert table["started"].dt.day.tolist()[1] == 2 and len(table) == 2
    assert table["started"].isna().tolist() == [started == "yesterday", False]


@pytest.mark.parametrize(
    "text",
    ["toys = 1", "toys.toy = 1", "toys.toy = ['x']", "toys = ['x']", 'toys."../evil" = "x"']
    + ['"..".toy = "x"', "toys.toy = " + "[" * 10_000, "toys.toy = " + "9" * 5000]
    + [PAPERS + PAPERS, "toys.a.b = 'x'", "toys.toy = nan", "toys.toy = 2026-01-01"],
)
def test_odd_papers(place, text):
    path = place / "nbs/papers.toml"
    path.write_text(text)
    assert refusal(path, papers) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [("losses", {"a": []}), ("losses", {"b": [0.5]}), ("losses", {"a": ["low"]})]
    + [("settings", {"a": [{"lr": [1]}]}), ("settings", {"a": {}}), ("code", {"x": 1})],
)
def test_odd_searches(place, name, value):
    path = written(place / "nbs/toys/01_toy.searches.json", dumped({"all": SEARCH | {name: value}}))
    assert refusal(path, read_searches, place / "nbs/toys/01_toy.ipynb") is not None
