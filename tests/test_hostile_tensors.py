"""Files of tensors that are damaged or made to do harm: checkpoints, kept models and what a recipe
may say, units; and names that lead out of their folder. More is in test_hostile_files.py.
"""

import copy
import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save, save_file
from test_hostile_files import BYTES, JSON_ALONE, PLACES, Evil, damaged
from torch import nn

from tfbench.study import kept as files
from tfbench.study.kept import KeptError, adopt, check_kept, read_kept
from tfbench.train.loop import TrainConfig, fit
from tfbench.workbench.chapters import find
from tfbench.workbench.records import ChapterError
from tfbench.workbench.results import read_sweep, results

BEHIND = ("Latin-1", "null bytes after")  # of an archive, which is whole all the same
OF_BYTES = [name for name in BYTES if name not in JSON_ALONE]
UL2 = ROOT / "nbs" / "language" / "01_ul2.ipynb"


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder of the test, with its units in units; nothing in it may have been run."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFBENCH_UNITS", str(tmp_path / "units"))
    yield tmp_path
    assert not list(tmp_path.rglob("evil*")), "a file's contents were run"
    assert not list(tmp_path.rglob("*.part"))


# ---- checkpoints


def net():
    return nn.Linear(2, 1)


def about():
    "Batches and their loss."

    def loss(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square().mean()

    return lambda step: (torch.full((4, 2), step + 1.0), torch.ones(4)), loss


def train(path: Path, model=None) -> nn.Module:
    model = model or net()
    config = TrainConfig(3, clip=None, ema=0.5, checkpoint=str(path))
    fit(model, *about(), config)
    return model


def continue_from(path: Path, model=None) -> None:
    "Continue; where that is refused, model and random numbers are as they were."
    model, random = model or net(), torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    try:
        train(path, model)
    except ValueError:
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())
        raise


def header(text: bytes, size: int | None = None, tensors: bytes = b"") -> bytes:
    "A safetensors file with this header, which says its own size."
    return struct.pack("<Q", len(text) if size is None else size) + text + tensors


def one(dtype="F32", shape=(1,), offsets=(0, 4)) -> bytes:
    told = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    return json.dumps({"a": told}).encode()


TENSORS = {
    "huge header": header(b"{}", 2**63),
    "largest header": header(b"{}", 2**64 - 1),
    "header longer than the file": header(b"{}", 1000),
    "empty header": header(b""),
    "header as list": header(b"[]"),
    "header cut": header(b'{"a": '),
    "deep header": header(b'{"a": ' + b"[" * 100_000),
    "header of UTF-16": header("{}".encode("utf-16")),
    "unknown dtype": header(one("PICKLE"), tensors=bytes(4)),
    "tensor longer than the file": header(one(shape=(10**12,), offsets=(0, 4 * 10**12))),
    "shape of more than there is": header(one(shape=(10**6,)), tensors=bytes(4)),
    "sizes that overflow": header(one(shape=(2**62, 2**62)), tensors=bytes(4)),
    "negative shape": header(one(shape=(-1,)), tensors=bytes(4)),
    "offsets backward": header(one(offsets=(4, 0)), tensors=bytes(4)),
    "offsets outside": header(one(offsets=(2**40, 2**40 + 4)), tensors=bytes(4)),
    "more behind": header(one(), tensors=bytes(99)),
    "a tensor of another": header(one(), tensors=bytes(4)),
}


def notes(change):
    def damage(tensors: dict, told: dict) -> None:
        found = json.loads(told["notes"])
        change(found)
        told["notes"] = json.dumps(found)

    return damage


def tensor(name: str, value):
    return lambda tensors, told: tensors.update({name: value})


CHECKPOINTS = {
    "no notes": lambda tensors, told: told.clear(),
    "notes as text": lambda tensors, told: told.update(notes="x"),
    "notes as list": lambda tensors, told: told.update(notes="[]"),
    "deep notes": lambda tensors, told: told.update(notes="[" * 100_000),
    "another configuration": notes(lambda n: n["config"].update(lr=9)),
    "configuration a list": notes(lambda n: n.update(config=[])),
    "no steps": notes(lambda n: n.update(rows=[])),
    "more steps than there are": notes(lambda n: n["rows"].append(n["rows"][0])),
    "steps as text": notes(lambda n: n.update(rows="xyz")),
    "half a step": notes(lambda n: n.update(rows=[[1.0]])),
    "loss as text": notes(lambda n: n["rows"].__setitem__(0, ["low", 0.1, 1.0])),
    "loss NaN": notes(lambda n: n["rows"].__setitem__(0, [float("nan"), 0.1, 1.0])),
    "evaluations a number": notes(lambda n: n.update(evaluations=3)),
    "weight gone": lambda tensors, told: tensors.pop("model.weight"),
    "weight more": tensor("model.evil", torch.ones(1)),
    "weight of another shape": tensor("model.weight", torch.ones(2, 2)),
    "weight of another type": tensor("model.weight", torch.ones(1, 2).long()),
    "weight NaN": tensor("model.weight", torch.full((1, 2), torch.nan)),
    "average gone": lambda tensors, told: tensors.pop("ema.bias"),
    "average of another shape": tensor("ema.bias", torch.ones(9)),
    "random numbers gone": lambda tensors, told: tensors.pop("rng.cpu"),
    "random numbers too few": tensor("rng.cpu", torch.zeros(3, dtype=torch.uint8)),
    "random numbers of floats": tensor("rng.cpu", torch.zeros(5056)),
    "random numbers of zeros": tensor("rng.cpu", torch.full((5056,), 255, dtype=torch.uint8)),
    "state of no parameter": tensor("optimizer.7.step", torch.ones(())),
    "state of a name": tensor("optimizer.x.step", torch.ones(())),
    "state unknown": tensor("optimizer.0.evil", torch.ones(())),
    "state of another shape": tensor("optimizer.0.exp_avg", torch.ones(5)),
    "state NaN": tensor("optimizer.0.exp_avg", torch.full((1, 2), torch.nan)),
    "half a state": lambda tensors, told: tensors.pop("optimizer.0.exp_avg_sq"),
}


@pytest.mark.parametrize("damage", [*CHECKPOINTS, *TENSORS, *PLACES])
def test_damaged_checkpoints(here, damage):
    path = here / "run.safetensors"
    train(path)
    if damage in PLACES:
        PLACES[damage](path)
    elif damage in TENSORS:
        path.write_bytes(TENSORS[damage])
    else:
        with safe_open(path, "pt") as file:
            told = file.metadata()
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}
        CHECKPOINTS[damage](tensors, told)
        save_file(tensors, path, told)
    with pytest.raises(ValueError, match="checkpoint: .*run.safetensors") as error:
        continue_from(path)
    assert "\n" not in str(error.value)


def test_a_good_checkpoint_is_continued(here):
    path = here / "run.safetensors"
    weights = train(path).state_dict()
    again = nn.Linear(2, 1)
    continue_from(path, again)
    assert all(torch.equal(weights[n], t) for n, t in again.state_dict().items())


@pytest.mark.parametrize("name", ["step", "loss", "lr", "grad_norm"])
def test_what_every_step_says_is_no_evaluation(name):
    config = TrainConfig(2, eval_every=1)
    with pytest.raises(ValueError, match=f"evaluate: every step has a {name} of its own"):
        fit(net(), *about(), config, evaluate=lambda model: {name: 1.0})


# ---- kept models: what their recipes may say

RECIPES = {
    "a deep recipe": None,
    "no recipe": {"call": "torch.nn:Linear"},
    "no text": {"call": 3, "args": [], "named": {}},
    "no model": {"call": "tfbench.train.loop:TrainConfig", "args": [3], "named": {}},
    "a value": {"call": "tfbench.core:DEVICES", "args": [], "named": {}},
    "a huge model": {"call": "torch.nn:Linear", "args": [10**9, 10**9], "named": {}},
    "a dict of lists": {"call": "torch.nn:Linear", "args": [{"dict": [[[1], 2]]}], "named": {}},
    "a pair of one": {"call": "torch.nn:Linear", "args": [{"dict": [[1]]}], "named": {}},
    "a name with zero": {"call": "torch.nn:Linear\0", "args": [], "named": {}},
    "a path": {"call": "../../evil:Linear", "args": [], "named": {}},
    "a file": {"call": "tfbench.core:write_whole", "args": ["evil", "x"], "named": {}},
    "a shell": {"call": "os:system", "args": ["mkdir evil"], "named": {}},
    "a loader": {"call": "torch.nn:torch.hub.load", "args": ["evil", "x"], "named": {}},
}


def deep() -> dict:
    recipe = {"call": "torch.nn:Identity", "args": [], "named": {}}
    for _ in range(300):
        recipe = {"call": "torch.nn:Identity", "args": [recipe], "named": {}}
    return recipe


@pytest.fixture
def ul2(here) -> Path:
    "What is kept of ul2, copied."
    for path in files.kept_files(UL2):
        shutil.copy(path, here)
    return here / "01_ul2.kept.json"


def rewritten(path: Path, change) -> None:
    "A kept file after `change(experiments)`."
    found = json.loads(path.read_text())
    change(list(found["experiments"].values()))
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes(ul2, name):
    def change(experiments):
        arms = [arm for e in experiments for arm in e["arms"].values()]
        next(a for a in arms if a["models"])["recipe"] = RECIPES[name] or deep()

    rewritten(ul2, change)
    notebook = ul2.with_name("01_ul2.ipynb")
    with pytest.raises(KeptError, match=f"{notebook.with_suffix('')}.*rebuilt") as error:
        check_kept(notebook)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert read_kept(notebook), "its numbers can still be read"


def test_adopting_a_hostile_file_removes_nothing(here, ul2):
    for folder in ("precious", "units", "mine"):
        (here / folder).mkdir()
    rewritten(ul2, lambda experiments: experiments[0].update(identity="../precious"))
    with pytest.raises(KeptError, match="identity of 16 hexadecimal digits"):
        adopt(here, here / "mine" / "01_ul2.ipynb")
    assert (here / "precious").exists() and not list((here / "mine").iterdir())


# ---- units of an experiment that was stopped


@pytest.mark.parametrize("damage", [*OF_BYTES, *TENSORS, *PLACES])
def test_a_damaged_unit_is_none(here, damage):
    path = here / "unit.safetensors"
    path.write_bytes(save({"0|weight": torch.ones(1)}, {"notes": "[]"}))
    if damage in TENSORS:
        path.write_bytes(TENSORS[damage])
    else:
        damaged(path, damage)
    assert files.read_unit(path) is None


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "null", "[3]", "[{}]", "NaN"])
def test_damaged_notes_of_a_unit(here, text):
    path = here / "unit.safetensors"
    path.write_bytes(save({"0|weight": torch.ones(1)}, {"notes": text}))
    assert files.read_unit(path) is None


# ---- arrays: filters and records of attention


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    "A small database of filters and a small record of attention, once."
    from tfbench.analysis.filter_db import FilterDB, extract_filters
    from tfbench.interp.capture import AttentionRecord, save_record

    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    FilterDB([extract_filters(nn.Conv2d(2, 2, 3), {"model_id": "toy"})]).save(folder)
    record = AttentionRecord({"layer": torch.ones(1, 2, 3, 3)}, tokens=list("abc"))
    save_record(record, folder / "record.npz")
    return folder


def arrays(**named) -> bytes:
    file = io.BytesIO()
    np.savez(file, **named)
    return file.getvalue()


ARRAYS = {
    "a pickle inside": lambda: arrays(filters=np.array([Evil()]), about=np.array([Evil()])),
    "nothing inside": lambda: arrays(),
    "a number inside": lambda: arrays(filters=np.array(3), about=np.array(3)),
    "texts inside": lambda: arrays(filters=np.array(["x"]), about=np.array(["x"])),
    "an archive of a text": lambda: zipped("filters.npy", b"no array"),
    "a shape of more than there is": lambda: zipped("filters.npy", claimed((10**15, 9))),
    "a negative shape": lambda: zipped("filters.npy", claimed((-1, 9))),
    "a name that leads out": lambda: zipped("../evil.npy", b"x"),
}


def zipped(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
        archive.writestr(name.replace("filters", "about"), data)
    return file.getvalue()


def claimed(shape: tuple) -> bytes:
    "The beginning of an array of that shape, and hardly any of its numbers."
    file = io.BytesIO()
    told = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, told)
    return file.getvalue() + bytes(16)


@pytest.mark.parametrize("damage", [*OF_BYTES, *ARRAYS, *PLACES])
@pytest.mark.parametrize("name", ["filters.npz", "layers.parquet", "record.npz"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_arrays(here, saved, name, damage):
    from tfbench.analysis.filter_db import FilterDB
    from tfbench.interp.capture import load_record

    path = shutil.copytree(saved, here / "saved") / name
    if damage in ARRAYS:
        path.write_bytes(ARRAYS[damage]())
    else:
        damaged(path, damage)
    read, given = (load_record, path) if name == "record.npz" else (FilterDB.load, path.parent)
    if name.endswith("npz") and damage in BEHIND:
        read(given)
        return
    with pytest.raises(ValueError, match=f"{name} cannot be read") as error:
        read(given)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("column, value", [("start", -1), ("stop", 10**9), ("out", None)])
def test_layers_without_their_filters(here, saved, column, value):
    from tfbench.analysis.filter_db import FilterDB

    db = FilterDB.load(saved)
    if value is None:
        db.layers = db.layers.drop(columns=column)
    else:
        db.layers = db.layers.assign(**{column: value})
    db.save(here)
    with pytest.raises(ValueError, match="layers.parquet cannot be read"):
        FilterDB.load(here)


@pytest.mark.parametrize("about", [b"", b"[]", b"{}", b"[" * 100_000, b'{"tokens": 3}', b"\xff"])
def test_a_record_of_something_else(here, saved, about):
    from tfbench.interp.capture import load_record

    with np.load(saved / "record.npz") as file:
        parts = dict(file)
    path = here / "record.npz"
    path.write_bytes(arrays(**parts | {"about": np.frombuffer(about, np.uint8)}))
    with pytest.raises(ValueError, match="record.npz cannot be read"):
        load_record(path)


# ---- names


@pytest.mark.parametrize(
    "name", ["..", "../evil", "a/../../evil", "/etc/passwd", "", ".hidden", "a\0b", "x" * 999]
)
def test_names_lead_nowhere(here, name):
    (here / "runs").mkdir()
    with pytest.raises(ChapterError, match="no chapter"):
        find(name)
    with pytest.raises(ChapterError, match="no chapter"):
        results(name or "..", runs=here / "runs")
    with pytest.raises(ChapterError, match="does not fit"):
        read_sweep(here / "runs", name)
