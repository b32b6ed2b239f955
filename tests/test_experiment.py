"Experiments: what is kept, read and refused; killed, repeated and replayed in real processes."

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from tfbench.nn.transformer import Transformer, TransformerConfig
from tfbench.study import kept as files
from tfbench.study.arms import Arm, Own, grid, train
from tfbench.study.experiment import Experiment, ReplayError, kept_results
from tfbench.study.kept import KeptError, NotKept, adopt, check_kept, load_kept, read_kept
from tfbench.train.loop import NonFiniteLoss, TrainConfig
from tfbench.workbench.chapters import notebook_code

CODE = """
import functools, os, signal, torch
from torch import nn
from tfbench.train.loop import TrainConfig
from tfbench.study.arms import Arm, Own, grid, train
from tfbench.study.experiment import Experiment
from pathlib import Path

def seen(what):
    "Leave a trace, and die where the test wants it."
    if "TOY_LOG" in os.environ:
        with open(os.environ["TOY_LOG"], "a") as log: print(what, file=log)
    if os.environ.get("TOY_KILL") == what: os.kill(os.getpid(), signal.SIGKILL)

def points(name):
    def of(seed):
        def batch(step):
            if step in (0, 3): seen(f"{name} {seed} {step}")
            x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1000 * seed + step))
            return x, x.sum(1) * 1.0
        return batch
    return of

def squared(model, batch): return (model(batch[0])[:, 0] - batch[1]).square().mean()
def error(model): return {"items": model.weight[0].abs(), "mean": model.bias.item()}

make = functools.partial(nn.Linear, 2, 1)
config = TrainConfig(steps)
arms = {"alone": Arm(make, points("alone"), squared, config, grid(lr=rates), side_by_side=False),
        "together": Arm(make, points("together"), squared, config, grid(lr=rates))}
MORE
lines = Experiment("lines", claims, arms, range(2), {"error": error}, keep=["together"])
run = lines()
"""
USUAL = {"steps": 25, "rates": [0.01, 0.1], "again": False}
HEAD = "steps: int = 25  # steps\nrates: list[float] = [0.01, 0.1]  # rates\n"
HEAD += "again: bool = False  # train"


class FakeClaims(SimpleNamespace):
    "What an experiment asks of the claims."

    def __init__(self, notebook, profile, parameters):
        super().__init__(chapter="language/toy", notebook=notebook, profile=profile)
        self.parameters, self.kept, self.measurements, self.begun = parameters, {}, {}, []

    def measure(self, **values):
        self.measurements |= values

    def begin(self, declared):
        self.begun.append(declared)

    def declared(self):
        return [{"id": "first", "rule": {"above": 0}}]


def write(folder: Path, old: str = "MORE", new: str = "") -> Path:
    "The toy chapter, with some of its code replaced."
    assert old in CODE
    code = CODE.replace(old, new).replace("MORE", "")
    sources = {"parameters": HEAD, "profiles": "profiles = {'quick': {'steps': 5}}", "code": code}
    cells = [
        {"cell_type": "code", "id": k, "metadata": {"tags": [k]}, "source": [s], "outputs": []}
        for k, s in sources.items()
    ]
    path = folder / "nbs" / "language" / "01_toy.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    return path


def run_toy(notebook: Path, profile: str = "laptop", **parameters) -> dict:
    "Run the toy chapter here; its globals."
    claims = FakeClaims(notebook, profile, USUAL | parameters)
    scope = {"claims": claims, **claims.parameters}
    exec(notebook_code(json.loads(notebook.read_text())), scope)
    return scope


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "The toy chapter in a folder of the test; `toy.kept()` makes its files, `toy.log()` empties."
    for name in ("TFBENCH_KEEP", "TFBENCH_REPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TFBENCH_UNITS", str(tmp_path / "units"))
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))

    def log() -> list:
        path = tmp_path / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return [line[:-2] for line in lines if line.endswith(" 0")]

    def keep(**parameters) -> dict:
        monkeypatch.setenv("TFBENCH_KEEP", str(tmp_path / "keep"))
        scope = run_toy(toy.notebook, **parameters)
        monkeypatch.delenv("TFBENCH_KEEP")
        assert adopt(tmp_path / "keep", toy.notebook) == ["lines"]
        log()
        return scope

    toy = SimpleNamespace(notebook=write(tmp_path), folder=tmp_path, log=log, keep=keep)
    return toy


@pytest.fixture(scope="session")
def kept_toy(tmp_path_factory):
    "The kept files of the toy chapter, made once."
    folder = tmp_path_factory.mktemp("kept")
    notebook = write(folder)
    before = dict(os.environ)
    os.environ |= {"TFBENCH_KEEP": str(folder / "keep"), "TFBENCH_UNITS": str(folder / "units")}
    try:
        run_toy(notebook)
    finally:
        os.environ.clear()
        os.environ.update(before)
    adopt(folder / "keep", notebook)
    return [path.read_bytes() for path in files.kept_files(notebook)]


@pytest.fixture
def made(toy, kept_toy):
    "The toy chapter with its kept files."
    for path, data in zip(files.kept_files(toy.notebook), kept_toy, strict=True):
        path.write_bytes(data)
    return toy


# ---- what is read, and what is trained


def test_a_run_that_reads_says_the_same(toy):
    before = toy.keep()
    after = run_toy(toy.notebook)
    assert toy.log() == [] and after["claims"].begun == [[{"id": "first", "rule": {"above": 0}}]]
    one, two = before["run"], after["run"]
    assert one.entry == two.entry and one.table() == two.table()
    assert one.values("alone", "error.items").shape == (2, 2)
    for a, b in zip(
        one.model("together").parameters(), two.model("together").parameters(), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a, a.half().float())
    assert before["claims"].measurements == after["claims"].measurements
    assert before["claims"].kept == after["claims"].kept and before["claims"].begun == [None]
    assert not list((toy.folder / "units").glob("*/*")), "units go once they are kept"


def test_the_text_is_canonical_and_small(made):
    text, _ = files.kept_files(made.notebook)
    kept = read_kept(made.notebook)
    assert files.kept_text(kept) == text.read_text() and len(text.read_bytes()) < 8_000
    unit = kept["experiments"]["lines"]["arms"]["alone"]["units"]["1"]
    assert len(unit["first"]) == 20 and len(unit["losses"]) == 25
    assert all(len(f"{abs(v):.12g}".replace(".", "").lstrip("0")) <= 7 for v in unit["losses"])


@pytest.mark.parametrize(
    "change",
    [
        dict(steps=4),
        dict(again=True),
        dict(profile="test"),
        dict(rates=[0.1, 0.2]),
        dict(old="range(2)", new="range(1, 3)"),
        dict(old='{"error": error}', new='{"error": error, "zero": lambda model: 0.0}'),
        dict(old='"together": Arm', new='"sideways": Arm', third='keep=["sideways"]'),
        dict(old='keep=["together"]', new='keep=["together", "alone"]'),
        dict(old="grid(lr=rates)", new="grid(lr=[2 * r for r in rates])"),
    ],
    ids=lambda c: "-".join(c) + str(list(c.values())[0])[:12],
)
def test_what_trains_anew(made, change):
    old, new, third = (change.pop(k, None) for k in ("old", "new", "third"))
    if old:
        write(made.folder, old, new)
    if third:
        path = made.notebook
        path.write_text(
            path.read_text().replace('keep=[\\"together\\"]', third.replace('"', '\\"'))
        )
    scope = run_toy(made.notebook, **change)
    assert made.log() and scope["claims"].begun == [None]
    assert files.kept_files(made.notebook)[0].read_bytes(), "and the kept files stay"
    assert not list((made.folder / "units").glob("*/*")), "nothing stays in the cache"


def test_the_test_profile_leaves_the_cache_alone(process, toy):
    environment = dict(TOY_KILL="together 0 0", TFBENCH_PROFILE="test")
    assert process.finish(parameters={"profile": "test"}, **environment) == -signal.SIGKILL
    assert not (toy.folder / "units").exists()


def test_changed_code_reads_and_is_named(made):
    assert files.stale(made.notebook) == {}
    write(made.folder, "* 1.0", "* 2.0")
    scope = run_toy(made.notebook)
    assert made.log() == [] and files.stale(made.notebook) == {"lines": ["the notebook"]}
    assert scope["claims"].kept["lines"]["changed"] == ["the notebook"]


def test_to_train_names_what_a_run_would_train(made):
    assert files.to_train(made.notebook, USUAL) == {}
    assert list(files.to_train(made.notebook, USUAL | {"steps": 3})) == ["lines"]


def test_it_says_how_long(made, monkeypatch, capsys):
    monkeypatch.delenv("TFBENCH_STATIC", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run_toy(made.notebook, steps=3)
    said = capsys.readouterr()
    assert "lines: steps = 3 (kept: 25); it trains now; about " in said.err
    assert "the profile quick takes at most 3 min" in said.err and said.out == ""


def test_kept_takes_along_what_it_reads(made, monkeypatch):
    "A refresh with one new experiment keeps the old ones."
    monkeypatch.setenv("TFBENCH_KEEP", str(made.folder / "new"))
    run_toy(made.notebook)
    for a, b in zip(
        *(files.kept_files(made.notebook, f) for f in (None, made.folder / "new")), strict=True
    ):
        assert a.read_bytes() == b.read_bytes()


# ---- training


def experiment(toy, arms, **options):
    "An experiment of these arms, called."
    claims = FakeClaims(toy.notebook, options.pop("profile", "test"), dict(USUAL))
    return Experiment("lines", claims, arms, **{"seeds": range(5)} | options)


def batches(seed):
    return lambda step: (torch.full((4, 2), float(seed + 1)), torch.ones(4))


def squared(model, batch):
    return (model(batch[0])[:, 0] - batch[1]).square().mean()


def an_arm(**changes):
    usual = dict(make=functools.partial(nn.Linear, 2, 1), batch=batches, loss=squared)
    return Arm(**usual | dict(config=TrainConfig(6, lr=0.01)) | changes)


def test_arms_are_tuned_alike(toy):
    with pytest.raises(ValueError, match="settings: expected as many for every arm"):
        experiment(toy, {"a": an_arm(settings=grid(lr=[1, 2])), "b": an_arm()})
    with pytest.raises(ValueError, match="settings: expected as many for every arm"):
        experiment(toy, {"a": an_arm(settings=[])})
    rates = grid(lr=[0.001, 0.01, 0.1])
    arms = {"a": an_arm(settings=rates), "b": an_arm(settings=rates)}
    tried = []

    def tune(model, arm, seed):
        tried.append((arm, seed))
        return [3.0, 1.0, 2.0, 2.0, 3.0, 1.0][len(tried) - 1]

    run = experiment(toy, arms, tune=tune)()
    assert tried == [("a", 1004)] * 3 + [("b", 1004)] * 3
    assert (run.setting("a"), run.setting("b")) == ({"lr": 0.01}, {"lr": 0.1})
    assert run.notes == ["Best value at an end of its list: b: lr."] and run.notes[0] in run.table()


def test_a_setting_that_breaks_down_loses(toy):
    arm = an_arm(settings=grid(lr=[1e30, 0.01]))
    run = experiment(toy, {"a": arm})()
    assert run.entry["arms"]["a"]["tried"]["losses"][0] is None and run.setting("a") == {"lr": 0.01}
    assert "inf" in run.tried.table()
    with pytest.raises(NonFiniteLoss, match="lines: every setting of a broke down"):
        experiment(toy, {"a": an_arm(settings=grid(lr=[1e30, 1e29]))})()


def test_arms_see_the_same_batches_and_their_own_view(toy):
    seen = {"plain": [], "shifted": []}

    def shift(batch, generator):
        seen["shifted"].append((batch[0][0, 0].item(), torch.rand(1, generator=generator).item()))
        return batch

    def plain(batch, generator):
        seen["plain"].append((batch[0][0, 0].item(), torch.rand(1, generator=generator).item()))
        return batch

    arms = {
        "plain": an_arm(transform=plain),
        "shifted": an_arm(transform=shift, side_by_side=False),
    }
    run = experiment(toy, arms)()
    assert sorted(seen["plain"]) == sorted(seen["shifted"])
    assert len({number for _, number in seen["plain"]}) == 30, "one stream for each seed and step"
    assert run.notes == []
    own = experiment(
        toy, {"a": an_arm(), "b": an_arm(batch=lambda seed: batches(seed))}, seeds=[0]
    )()
    assert own.notes == ["Seeds: 1; a claim needs at least 5.", "Batches of their own: b."]


def test_recurrent_nets_train_one_after_the_other(toy):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.GRU(2, 1)

        def forward(self, x):
            return self.net(x)[0]

    run = experiment(toy, {"a": an_arm(make=Recurrent)}, seeds=[0, 1])()
    assert run.seeds == [0, 1]


def test_a_unit_is_the_same_when_it_is_trained_again():
    fresh = an_arm(make=lambda: nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)))
    once, again = (train(fresh, {}, [0])[0] for _ in "ab")
    assert once.losses == again.losses and len(train(fresh, {}, [0], limit=2)[0].losses) == 2
    assert fresh.groups([0, 1]) == [[0, 1]]
    assert an_arm(start=lambda model, seed: None).groups([0, 1]) == [[0], [1]]


def test_own_loops(toy):
    def evolve(seed, setting, limit):
        return None, [seed + 1.0, setting["rate"]], {"reward": [1.0, seed]}

    run = experiment(toy, {"a": Own(evolve, grid(rate=[0.5, 0.25, 0.75]))})()
    assert run.setting("a") == {"rate": 0.25} and run.values("a", "reward").shape == (5, 2)
    with pytest.raises(NotKept):
        run.model("a")
    with pytest.raises(ValueError, match="make: this arm does not say"):
        run.model("a", train=True)


def test_an_arm_starts_from_another_experiment(toy):
    first = experiment(toy, {"a": an_arm()}, keep=["a"])()

    def start(model, seed):
        model.load_state_dict(first.model("a", seed, train=True).state_dict())

    second = experiment(toy, {"a": an_arm(start=start)})()
    last = first.entry["arms"]["a"]["units"]["3"]["losses"][-1]
    assert second.entry["arms"]["a"]["units"]["3"]["first"][0] < last
    assert first.model("a", 1004, train=True).weight.shape == (1, 2), "a seed of the tuning, too"


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda model: float("nan"), "measure m: expected a finite number"),
        (lambda model: "good", "measure m: expected a finite number"),
        (lambda model: [], "measure m: expected a finite number"),
        (lambda model, seed: [0.0] * (seed + 1), "lines, arm a, seed 1: measured"),
    ],
)
def test_measures_are_numbers(toy, measure, message):
    with pytest.raises(ValueError, match=message):
        experiment(toy, {"a": an_arm()}, measure={"m": measure})()


# ---- models that are kept


def test_what_cannot_be_rebuilt_is_refused_before_training(toy):
    lost = experiment(toy, {"a": an_arm(make=lambda: nn.Linear(2, 1), batch=None)}, keep=["a"])
    with pytest.raises(ValueError, match="make: a kept model is made by functools.partial"):
        lost()


@pytest.mark.parametrize(
    ("chapter", "limit"), [("language/toy", "1,000,000"), ("language/bed", "2,000,000")]
)
def test_too_large_is_refused_before_training(toy, chapter, limit):
    wide = an_arm(make=functools.partial(nn.Linear, 2_000_000, 1), batch=None)
    large = experiment(toy, {"a": wide}, keep=["a"])
    large.claims.chapter = chapter
    with pytest.raises(ValueError, match=f"4,000,002 bytes, allowed are {limit}"):
        large()


def test_all_experiments_together_are_bounded(made, tmp_path):
    kept = read_kept(made.notebook)
    add = functools.partial(files.add_kept, tmp_path, made.notebook, "language/toy")
    entry = kept["experiments"]["lines"]
    add(
        "lines",
        entry,
        {"lines|together|0|weight": torch.zeros(1, 2), "lines|gone|0|w": torch.ones(1)},
    )
    add("lines", entry, {"lines|together|0|weight": torch.zeros(300_000).half()})
    before = [path.read_bytes() for path in files.kept_files(made.notebook, tmp_path)]
    assert list(load(before[1])) == ["lines|together|0|weight"], "what an earlier try kept goes"
    with pytest.raises(
        ValueError, match="weights of language/toy take 1,200,.* allowed are 1,000,000"
    ):
        add("circles", entry, {"circles|together|0|weight": torch.zeros(300_000).half()})
    assert before == [path.read_bytes() for path in files.kept_files(made.notebook, tmp_path)]


def test_again_is_no_parameter_of_an_experiment(toy):
    notebook = {"cells": [{"cell_type": "code", "metadata": {}, "source": "f('t', again, steps)"}]}
    assert files.depends_on(notebook, "t", USUAL)["parameters"] == {"steps": 25}


def test_checks_are_no_part_of_an_experiment(toy):
    cell = {"cell_type": "code", "metadata": {}, "source": "a = 1\nf('t', a)"}
    check = cell | {"source": "a = steps", "metadata": {"tags": ["checks"]}}
    alone, beside = ({"cells": cells} for cells in ([cell], [check, cell]))
    assert files.depends_on(alone, "t", USUAL) == files.depends_on(beside, "t", USUAL)


def test_main_stands_for_the_chapter():
    local = type(
        "Transformer", (Transformer,), {"__module__": "__main__", "__qualname__": "Transformer"}
    )
    make = functools.partial(local, TransformerConfig(16, 1, 2, max_len=4))
    recipe = files.recipe_of(make, "tfbench.nn.transformer")
    assert type(files.made(json.loads(json.dumps(recipe)))) is Transformer


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "tfbench.core:os.system",
        "tfbench.core:write_whole",
        "tfbench.study.kept:shutil.rmtree",
        "tfbench.study.kept:nn.Linear",
        "torch:load",
        "torch.nn:torch.load",
        "torch.nn.functional:relu",
        "tfbench.nowhere:Thing",
        "tfbench.nn.transformer:Transformer.__init__",
        "tfbench._modidx:d",
    ],
)
def test_recipes_call_only_models(name):
    for recipe in (
        {"call": name, "args": ["touch /tmp/evil"], "named": {}},
        {"call": "torch.nn:Identity", "args": [{"name": name}], "named": {}},
        {
            "call": "torch.nn:Identity",
            "args": [{"partial": {"call": name, "args": [], "named": {}}}],
            "named": {},
        },
    ):
        with pytest.raises(ValueError, match="is no public name|is no module|is not there"):
            files.made(recipe)


def test_load_kept(made, monkeypatch):
    monkeypatch.setattr(files, "find", lambda slug: SimpleNamespace(path=made.notebook))
    import tfbench

    assert tfbench.load_kept is load_kept
    model = load_kept("language/toy", "together")
    assert (
        isinstance(model, nn.Linear) and not model.training and model.weight.dtype == torch.float32
    )
    assert torch.equal(model.weight, run_toy(made.notebook)["run"].model("together").weight)
    for wrong in (("nowhere",), ("alone",), ("together", 7), ("together", 0, "circles")):
        with pytest.raises(KeptError, match="kept"):
            load_kept("language/toy", *wrong)
    monkeypatch.setattr("tfbench.study.experiment.find", files.find)
    assert kept_results("toy", "lines").mean("alone", "error.mean").n == 2
    with pytest.raises(ValueError, match="title: expected one of lines, got 'circles'"):
        kept_results("toy", "circles")


def test_importing_tfbench_is_cheap():
    code = "import sys, tfbench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- damaged files


def at(*path, value):
    "Damage: a value in the place of another."

    def damage(kept: dict):
        inner = kept
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        return kept

    return damage


def without(*path):
    def damage(kept: dict):
        inner = kept
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return kept

    return damage


def text(change):
    return lambda kept: change(files.kept_text(kept))


LINES = ("experiments", "lines")
ARM = (*LINES, "arms", "alone")
UNIT = (*ARM, "units", "1")
DAMAGES = {
    "older format": (at("format", value=0), "has the format 0, this library reads 1"),
    "newer format": (at("format", value=2), "has the format 2, this library reads 1"),
    "format as text": (at("format", value="1"), "has the format '1'"),
    "no format": (without("format"), "has the format None"),
    "half written": (text(lambda t: t[: len(t) // 2]), "cannot be read"),
    "empty": (text(lambda t: ""), "cannot be read"),
    "a list": (text(lambda t: "[]"), "has the format None"),
    "deep": (text(lambda t: "[" * 100_000), "cannot be read"),
    "a conflict": (text(lambda t: "<<<<<<< ours\n" + t), "cannot be read"),
    "NaN": (
        text(lambda t: t.replace('"seconds": ', '"seconds": NaN, "x": ', 1)),
        "NaN is not a number",
    ),
    "infinite": (at(*UNIT, "losses", value=[1e999]), "not a number|cannot be read"),
    "huge": (
        text(lambda t: t.replace('"steps": 25', '"steps": 1e999')),
        "steps is inf, not a int",
    ),
    "no experiments": (without("experiments"), "lacks experiments"),
    "no code": (without(*LINES, "code"), "lines lacks code"),
    "unknown key": (at(*LINES, "extra", value=1), "lines has an unknown extra"),
    "parameters a list": (at(*LINES, "parameters", value=[]), "parameters is .*, not a dict"),
    "no arms": (at(*LINES, "arms", value={}), "expected the same seeds in all arms"),
    "arm without a seed": (without(*UNIT), "expected the same seeds in all arms"),
    "seed of a name": (at(*ARM, "units", value={"x": None}), "units.x is None, not a dict"),
    "loss as text": (at(*UNIT, "first", value=["1.0"]), r"first\[0\] is '1.0', not a float"),
    "loss as bool": (at(*UNIT, "losses", value=[True]), r"losses\[0\] is True, not a float"),
    "no losses": (at(*UNIT, "first", value=[]), "0 first losses of 25 steps"),
    "losses too few": (at(*UNIT, "losses", value=[1.0]), "do not cover its steps"),
    "measured nothing": (at(*UNIT, "measured", value={}), "another seed of the arm"),
    "measured a text": (at(*UNIT, "measured", "error.mean", value="low"), "error.mean is 'low'"),
    "items lost": (at(*UNIT, "measured", "error.items", value=[1.0]), "another seed of the arm"),
    "other setting": (at(*ARM, "setting", value={"lr": 9}), "is none of those tried"),
    "tried too few": (
        at(*ARM, "tried", "losses", value=[1.0]),
        "expected one loss for each setting",
    ),
    "unknown seed": (at(*LINES, "arms", "together", "models", value=[7]), "unknown seed 7"),
    "no recipe": (at(*LINES, "arms", "together", "recipe", value=None), "without a recipe"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_json(made, name):
    damage, message = DAMAGES[name]
    path, _ = files.kept_files(made.notebook)
    found = damage(json.loads(path.read_text()))
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(KeptError, match=message) as error:
        run_toy(made.notebook)
    assert str(path) in str(error.value) and "tfbench refresh language/toy --again" in str(
        error.value
    )
    assert made.log() == [], "nothing was trained"
    if name in ("half written", "older format"):
        assert run_toy(made.notebook, again=True)["run"].seeds == [0, 1], "but it can be made anew"


NAME = "lines|together|0|weight"


def changed_tensors(change):
    "Damage that the JSON file knows the hash of: only the contents are wrong."

    def damage(data: bytes) -> bytes:
        tensors = load(data)
        change(tensors)
        return save(tensors)

    return damage


WEIGHTS = {
    "half written": (lambda d: d[: len(d) // 2], False, "cannot be read"),
    "no safetensors": (lambda d: b"PK\x03\x04 pickle", False, "cannot be read"),
    "gone": (None, False, "cannot be read"),
    "one bit": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), False, "is not the file that"),
    "tensor gone": (changed_tensors(lambda t: t.pop(NAME)), True, "weight is only in the model"),
    "tensor more": (
        changed_tensors(lambda t: t.update({NAME + "2": torch.ones(1)})),
        True,
        "only in the file",
    ),
    "other shape": (
        changed_tensors(lambda t: t.update({NAME: torch.ones(2, 2)})),
        True,
        r"weight of .*, got \(2, 2\)",
    ),
    "whole numbers": (changed_tensors(lambda t: t.update({NAME: t[NAME].long()})), True, "int64"),
    "NaN": (changed_tensors(lambda t: t[NAME].fill_(torch.nan)), True, "weight has NaN"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights(made, name):
    damage, known, message = WEIGHTS[name]
    beside, path = files.kept_files(made.notebook)
    data = damage(path.read_bytes()) if damage else b""
    path.write_bytes(data) if damage else path.unlink()
    if known:
        found = at("weights", value=hashlib.sha256(data).hexdigest())(
            json.loads(beside.read_text())
        )
        beside.write_text(files.kept_text(found))
    run = run_toy(made.notebook)["run"]
    assert run.table(), "the numbers can be read without the weights"
    with pytest.raises(KeptError, match=message) as error:
        run.model("together")
    assert str(path) in str(error.value)
    with pytest.raises(KeptError, match=message):
        check_kept(made.notebook)


def test_weights_of_nobody(made):
    beside, path = files.kept_files(made.notebook)
    data = save(load(path.read_bytes()) | {"circles|a|0|weight": torch.ones(1)})
    path.write_bytes(data)
    found = at("weights", value=hashlib.sha256(data).hexdigest())(json.loads(beside.read_text()))
    beside.write_text(files.kept_text(found))
    with pytest.raises(KeptError, match="circles|a|0|weight belongs to no kept model"):
        check_kept(made.notebook)


def test_a_recipe_that_was_tampered_with(made):
    beside, _ = files.kept_files(made.notebook)
    evil = {"call": "os:system", "args": [f"touch {made.folder}/evil"], "named": {}}
    found = at(*LINES, "arms", "together", "recipe", value=evil)(json.loads(beside.read_text()))
    beside.write_text(files.kept_text(found))
    with pytest.raises(KeptError, match="os:system is no public name of tfbench or torch.nn"):
        run_toy(made.notebook)["run"].model("together")
    assert not (made.folder / "evil").exists()


# ---- replay


def test_replay_passes_where_the_code_computes_the_same(made, monkeypatch):
    monkeypatch.setenv("TFBENCH_REPLAY", "1")
    write(made.folder, "x.sum(1) * 1.0", "(x[:, 0] + x[:, 1]) * 1.0")
    scope = run_toy(made.notebook)
    with pytest.raises(NotKept, match="lines: alone, seed 0 is not kept"):
        scope["run"].model("alone", 0, train=True)
    assert len(made.log()) in (1, 2) and scope["claims"].begun == [
        [{"id": "first", "rule": {"above": 0}}]
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("* 1.0", "* 1.01", "lines: (alone|together), seed 0, step 0: the loss is .*, kept is"),
        (".square().mean()", ".abs().mean()", "seed 0, step 0"),
        ("TrainConfig(steps)", "TrainConfig(steps, warmup=3)", "seed 0, step 1"),
        ("range(2)", "range(3)", "lines: it cannot be replayed: seeds"),
    ],
)
def test_replay_fails_where_it_does_not(made, monkeypatch, old, new, message):
    monkeypatch.setenv("TFBENCH_REPLAY", "1")
    write(made.folder, old, new)
    with pytest.raises(ReplayError, match=message):
        run_toy(made.notebook)


def test_replay_needs_something_kept(toy, monkeypatch):
    monkeypatch.setenv("TFBENCH_REPLAY", "1")
    with pytest.raises(ReplayError, match="lines: it cannot be replayed: nothing is kept of it"):
        run_toy(toy.notebook)


def test_replay_of_a_start_that_is_not_kept(toy, monkeypatch):
    "The arm gives way to the next; if there is none, the replay says so."
    more = """
def start(model, seed): claims.start(model, seed)
for name in STARTED:
    arms[name] = Arm(make, points(name), squared, config, grid(lr=rates), start=start)
"""

    def refuse(model, seed):
        raise NotKept("nothing to start from")

    monkeypatch.setattr(FakeClaims, "start", lambda self, model, seed: None, raising=False)
    for started, message in (
        ("['alone']", None),
        ("['alone', 'together']", "nothing to start from"),
    ):
        write(toy.folder, "MORE", more.replace("STARTED", started))
        toy.keep()
        with monkeypatch.context() as patch:
            patch.setenv("TFBENCH_REPLAY", "1")
            patch.setattr(FakeClaims, "start", lambda self, model, seed: refuse(model, seed))
            if message is None:
                run_toy(toy.notebook)
                assert set(toy.log()) == {"together 0", "together 1"}
            else:
                with pytest.raises(ReplayError, match=message):
                    run_toy(toy.notebook)


# ---- real processes


def child(notebook: str, environment: dict, parameters: dict) -> None:
    "The toy chapter in a process of its own; its table goes beside the notebook."
    os.environ.update(environment)
    run = run_toy(Path(notebook), **parameters)["run"]
    Path(environment["TOY_OUT"]).write_text(run.table())


@pytest.fixture(scope="session")
def context():
    "Processes that begin with the library loaded."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "accelerate", __name__])
    return context


@pytest.fixture
def process(context, toy):
    "`process(**environment)` starts the toy chapter; join it for its exit code."

    def start(name="out", parameters=None, **environment):
        names = ("TFBENCH_UNITS", "TOY_LOG")
        usual = {n: os.environ[n] for n in names} | {"TOY_OUT": str(toy.folder / name)}
        usual["TFBENCH_KEEP"] = str(toy.folder / "keep")
        started = context.Process(
            target=child, args=(str(toy.notebook), usual | environment, parameters or {})
        )
        started.start()
        return started

    def finish(*args, **environment):
        started = start(*args, **environment)
        started.join(600)
        return started.exitcode

    return SimpleNamespace(start=start, finish=finish)


def test_killed_and_continued(process, toy):
    "A SIGKILL inside a unit, then one between two: the next run trains what is missing only."
    assert process.finish(TOY_KILL="alone 1 3") == -signal.SIGKILL
    assert toy.log() == ["alone 1001", "alone 1001", "alone 0", "alone 1"]
    assert process.finish(TOY_KILL="together 0 0") == -signal.SIGKILL
    assert toy.log() == ["alone 1", "together 1001", "together 1001", "together 0"]
    assert not (toy.folder / "keep").exists(), "nothing is kept before all of it is there"
    assert process.finish() == 0
    assert toy.log() == ["together 0", "together 1"]
    done = (toy.folder / "out").read_text()
    assert adopt(toy.folder / "keep", toy.notebook) == ["lines"]
    assert not list((toy.folder / "units").iterdir())
    assert (
        process.finish("whole", parameters={"again": True}, TFBENCH_UNITS=str(toy.folder / "other"))
        == 0
    )
    assert (toy.folder / "whole").read_text() == done, "as if nobody had killed it"


def test_a_damaged_unit_is_trained_again(process, toy):
    assert process.finish(TOY_KILL="together 0 0") == -signal.SIGKILL
    units = sorted((toy.folder / "units").glob("*/*.safetensors"))
    assert len(units) == 6
    for unit in units[:2]:
        unit.write_bytes(unit.read_bytes()[:-5])
    units[2].write_bytes(save({"0|weight": torch.ones(1)}, {"notes": '[{"steps": 1}]'}))
    toy.log()
    assert process.finish() == 0
    assert len(toy.log()) == 3 + 2


def test_two_processes_at_once(process, toy):
    both = [process.start(name) for name in ("one", "two")]
    for one in both:
        one.join(600)
    assert [one.exitcode for one in both] == [0, 0]
    assert (toy.folder / "one").read_text() == (toy.folder / "two").read_text()
    assert check_kept(toy.notebook, toy.folder / "keep")["experiments"]["lines"]
    assert not list(toy.folder.rglob("*.part"))


def test_read_again_and_replayed_in_processes(process, made):
    assert process.finish() == 0 and made.log() == []
    assert process.finish("again", parameters={"again": True}) == 0 and len(made.log()) == 8
    assert (made.folder / "out").read_text() == (made.folder / "again").read_text()
    assert process.finish(TFBENCH_REPLAY="1") == 0
    write(made.folder, "* 1.0", "* 1.1")
    assert process.finish(TFBENCH_REPLAY="1") == 1
