"Claims are declared, judged by their rule, found out where they are post hoc, and kept as JSON."

import json
import re

import numpy as np
import pytest
import torch

from tfbench.study.claims import (
    ClaimFailed,
    Claims,
    at_a_glance,
    claim_rule,
    claim_verdict,
    claims_table,
    measured_text,
    rule_text,
    surviving,
)
from tfbench.study.statistics import Interval, detectable, interval
from tfbench.workbench.records import MIME, ChapterError

RECORD = (
    "chapter profile parameters code_sha256 library seconds versions kept timings measurements "
    "mutants claims"
).split()
CLAIM = (
    "id headline statement kind rule paper measured detectable scale verdict expected post_hoc note"
).split()
FIVE = [0.9, 1.0, 1.1, 1.0, 1.2]  # 1.04 [0.898, 1.182]


@pytest.fixture
def begin(tmp_path, monkeypatch):
    "`begin(profile, **parameters)` is a run of a toy chapter."
    path = tmp_path / "toys" / "01_coin.ipynb"
    path.parent.mkdir()
    sources = {
        "parameters": "throws: int = 1000  # throws a seed [1..]\nseed: int = 0  # first seed",
        "profiles": "profiles = {'test': {'throws': 10}}",
    }
    cells = [dict(cell_type="markdown", id="title", source=["# Coin\n> It is fair."], metadata={})]
    for tag, source in sources.items():
        metadata = dict(tags=[tag])
        cell = dict(cell_type="code", id=tag, source=[source], metadata=metadata, outputs=[])
        cells.append(cell)
    path.write_text(json.dumps(dict(cells=cells)))

    def begin(profile="laptop", **parameters):
        monkeypatch.setenv("TFBENCH_NOTEBOOK", str(path))
        monkeypatch.setenv("TFBENCH_PROFILE", profile)
        usual = dict(throws=10 if profile == "test" else 1000, seed=0)
        return Claims("toys/coin", usual | parameters)

    return begin


@pytest.fixture
def shown(monkeypatch):
    "What reports display: the table, then the short table for the top of the chapter."
    seen = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: seen.append(data))
    return seen


# Rules and verdicts


@pytest.mark.parametrize(
    ("ends", "rule", "verdict"),
    [
        ((1, 2), dict(above=0.9), "holds"),
        ((1, 2), dict(above=1), "undecided"),
        ((1, 2), dict(above=1.5), "undecided"),
        ((1, 2), dict(above=2), "contradicted"),
        ((1, 2), dict(above=3), "contradicted"),
        ((1, 2), dict(below=2.1), "holds"),
        ((1, 2), dict(below=2), "undecided"),
        ((1, 2), dict(below=1), "contradicted"),
        ((1, 2), dict(within=(1, 2)), "holds"),
        ((1, 2), dict(within=(1.1, 3)), "undecided"),
        ((1, 2), dict(within=(0, 1.9)), "undecided"),
        ((1, 2), dict(within=(1.4, 1.6)), "undecided"),
        ((1, 2), dict(within=(2, 3)), "undecided"),
        ((1, 2), dict(within=(2.1, 3)), "contradicted"),
        ((1, 2), dict(within=(-1, 0.9)), "contradicted"),
        ((0, 0), dict(above=0), "contradicted"),
        ((0, 0), dict(within=(-1, 1)), "holds"),
        ((None, None), dict(above=0), "untested"),
        ((None, None), dict(within=(0, 9)), "untested"),
    ],
)
def test_verdicts(ends, rule, verdict):
    assert claim_verdict(Interval(1.5, *ends, 5), claim_rule(**rule)) == verdict


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "exactly one"),
        (dict(above=0, below=1), "exactly one"),
        (dict(within=(1, 1)), "within: expected .low, high. with low < high"),
        (dict(within=(2, 1)), "within"),
        (dict(within=(1, 2, 3)), "within"),
        (dict(above=float("nan")), "finite"),
        (dict(above="much"), "finite"),
        (dict(within=(0, float("inf"))), "finite"),
    ],
)
def test_bad_rules(rule, message, begin):
    with pytest.raises(ValueError, match=message):
        claim_rule(**rule)
    with pytest.raises(ValueError, match=message):
        begin().declare("a", "A holds", **rule)


# Declared, judged, reported


def test_a_whole_run(begin, shown):
    claims = begin()
    claims.declare(
        "gain", "It gains", above=0.5, paper=(2, "Table 1"), headline=True, asked=True, axis="steps"
    )
    claims.declare("same", "It is as good", within=(0.5, np.float64(1.5)))
    claims.declare("count", "It has 780 weights", within=(779.5, 780.5))
    claims.declare("large", "It does so at scale", below=torch.tensor(3.0))
    claims.begin(None)
    claims.kept["coin"] = dict(seconds=3.0, when="2026-01-01", read=False)
    claims.judge("same", torch.tensor(FIVE))
    claims.judge("gain", FIVE, note="by seed")
    claims.judge("count", Interval(780, 780, 780, 1))
    claims.untested("large", "it would take a GPU")
    claims.scale(here=dict(parameters=1e6, steps=10), paper=dict(parameters=1e9, steps=1000))
    claims.measure(loss=np.float32(0.5), many=torch.ones(2), odd=float("nan"), path=claims.notebook)
    claims.time(fit=12.345, speeds=dict(ours=98765, theirs=np.float64(0.001234)))
    claims.report()

    record = shown[0][MIME]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record) == RECORD and all(list(c) == CLAIM for c in record["claims"])
    gain, same, count, large = record["claims"]
    assert [c["verdict"] for c in record["claims"]] == ["holds", "holds", "holds", "untested"]
    assert [c["kind"] for c in (gain, same, count)] == ["statistical", "statistical", "exact"]
    assert (gain["headline"], gain["expected"], same["headline"], same["expected"]) == (
        True,
        True,
    ) + (
        False,
        False,
    )
    assert gain["rule"] == {"above": 0.5} and same["rule"] == {"within": [0.5, 1.5]}
    assert gain["paper"] == dict(value=2, source="Table 1")
    assert gain["measured"]["n"] == 5 and np.isclose(gain["measured"]["estimate"], 1.04)
    assert np.isclose(gain["detectable"], detectable(interval(FIVE)))
    assert gain["note"] == "could break along: steps; by seed"
    assert count["detectable"] is None and large["detectable"] is None
    assert gain["scale"] == dict(parameters=1e-3, data=None, steps=0.01)
    assert large["measured"] == dict(estimate=None, low=None, high=None, n=0)
    assert large["note"] == "it would take a GPU"
    assert record["timings"] == dict(fit=12.0, speeds=dict(ours=99000.0, theirs=0.0012))
    assert record["measurements"]["many"] == [1.0, 1.0] and record["measurements"]["odd"] is None
    assert record["kept"]["coin"]["seconds"] == 3.0 and record["mutants"] is None
    assert record["parameters"] == dict(throws=1000, seed=0) and record["profile"] == "laptop"


def test_what_experiments_read(begin):
    claims = begin("test", seed=3)
    assert (claims.chapter, claims.profile, claims.changed) == ("toys/coin", "test", [])
    assert claims.notebook.name == "01_coin.ipynb" and claims.kept == {} and claims.timings == {}
    assert claims.parameters == dict(throws=10, seed=3) and re.fullmatch(
        "[0-9a-f]{64}", claims.code_sha256
    )
    assert begin("test", throws=11).changed == ["throws"]
    with pytest.raises(ChapterError, match="throws"):
        begin(throws=0)


@pytest.mark.parametrize(
    ("profile", "parameters", "fails"),
    [
        ("laptop", {}, True),
        ("laptop", dict(seed=7), True),
        ("laptop", dict(throws=999), False),
        ("test", {}, False),
    ],
)
@pytest.mark.parametrize("above", [1.0, 2.0])
def test_asked_claims(begin, shown, profile, parameters, fails, above):
    claims = begin(profile, **parameters)
    claims.declare("gain", "It gains", above=above, asked=True)
    claims.declare("other", "It gains more", above=3)
    claims.judge("gain", FIVE)
    claims.judge("other", FIVE)
    verdict = "undecided" if above == 1 else "contradicted"
    assert claims.items[0]["verdict"] == verdict and claims.items[0]["expected"] == fails
    if fails:
        with pytest.raises(ClaimFailed, match=f"gain {verdict} .1.04 .*n = 5., > {above:g}"):
            claims.report()
    else:
        claims.report()
    assert len(shown) == 2, "both tables are shown in any case"


def test_one_seed_confirms_nothing(begin, shown):
    claims = begin()
    claims.declare("gain", "It gains", above=0, asked=True)
    claims.judge("gain", [1.0])
    with pytest.raises(ClaimFailed, match="gain untested"):
        claims.report()


def test_the_axis_stands_beside_what_holds(begin):
    claims = begin()
    claims.declare("no", "It gains", above=3, axis="steps")
    claims.judge("no", FIVE)
    assert claims.items[0]["note"] == ""


def test_what_is_refused(begin, shown):
    claims = begin()
    claims.declare("first", "First", above=0)
    for call, message in (
        (lambda: claims.declare("late", "Late", above=0, headline=True), "headline: 'late' comes"),
        (lambda: claims.declare("first", "Again", above=0), "'first' exists already"),
        (lambda: claims.declare("paper", "Paper", above=0, paper=3), "paper: expected .value, sou"),
        (lambda: claims.judge("other", FIVE), "'other' was not declared; declared are first"),
        (lambda: claims.untested("other", "no time"), "'other' was not declared"),
        (lambda: claims.judge("first", []), "values: expected a list of finite numbers"),
        (lambda: claims.judge("first", [FIVE, FIVE]), "values: expected a list of finite numbers"),
        (lambda: claims.report(), "neither judged nor untested: first"),
        (lambda: claims.scale(dict(steps=1), dict(data=1)), "paper: expected"),
        (lambda: claims.scale(dict(width=1), dict(width=1)), "here: expected"),
        (lambda: claims.scale(dict(steps=1), dict(steps=0)), "paper: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert shown == [] and [c["id"] for c in claims.items] == ["first"]
    claims.judge("first", FIVE)
    with pytest.raises(ValueError, match="'first' is judged already"):
        claims.judge("first", FIVE)
    with pytest.raises(ValueError, match="'first' is judged already"):
        claims.untested("first", "on second thoughts")
    for i in range(7):
        claims.declare(f"claim{i}", "Another", above=0)
    with pytest.raises(ValueError, match="more than 8 claims"):
        claims.declare("ninth", "One too many", above=0)


# Post hoc


def test_declared_after_an_experiment_began(begin):
    claims = begin()
    claims.declare("before", "Before", above=0)
    claims.begin(None)
    claims.declare("after", "After", above=0)
    claims.begin(None)  # a second experiment does not make it better
    claims.judge("before", FIVE)
    claims.judge("after", FIVE)
    assert [c["post_hoc"] for c in claims.items] == [False, True]
    assert "holds, post hoc" in claims_table(claims.record())


def test_against_what_is_kept(begin):
    first = begin()
    for id, rule in (("same", dict(within=(0, 2))), ("moved", dict(above=1.5))):
        first.declare(id, "A claim", **rule)
    kept = json.loads(json.dumps(first.declared()))
    assert kept[0] == dict(id="same", rule=dict(within=[0, 2]))
    claims = begin()
    claims.declare("same", "A claim in other words", within=(0.0, 2.0))
    claims.declare("moved", "A claim", above=0.5)
    claims.declare("new", "A claim", above=0.5)
    claims.begin(kept)
    for id in ("same", "moved", "new"):
        claims.judge(id, FIVE)
    assert [c["post_hoc"] for c in claims.items] == [False, True, True]


def test_several_experiments(begin):
    "A claim has to be older than all of those whose results were known when it is judged."
    claims = begin()
    for id in "abc":
        claims.declare(id, "A claim", above=0)
    rules = claims.declared()
    claims.begin(rules[:2])
    claims.begin(None)
    claims.begin(rules[1:])
    for id in "abc":
        claims.judge(id, FIVE)
    assert [c["post_hoc"] for c in claims.items] == [True, False, True]


def test_without_experiments_nothing_is_post_hoc(begin):
    claims = begin()
    claims.declare("a", "A claim", above=0)
    claims.judge("a", FIVE)
    assert claims.items[0]["post_hoc"] is False


# The old form


def test_old_calls(begin, shown):
    claims = begin()
    claims.exact("bits", "Bits a weight", 780, equal=780)
    claims.exact("size", "Size", 20.5, tolerance=0.6, paper=(20, "abstract"), note="rounded")
    claims.statistical("up", "Up", FIVE, above=0.5, paper=(1, "Fig. 1"))
    claims.statistical("open", "Open", FIVE, below=1, expected_in=(), note="by seed")
    claims.statistical("down", "Down", interval(FIVE), below=0.5, expected_in=("paper",))
    claims.statistical("one", "One", [1.0], above=0, expected_in=())
    claims.untested("gpu", "It is faster", "no GPU", paper=(3, "Table 2"))
    claims.measure(loss=1.0)
    claims.report()
    record = shown[0][MIME]
    assert list(record) == RECORD and all(list(c) == CLAIM for c in record["claims"])
    assert json.loads(json.dumps(record)) == record
    found = {c["id"]: c for c in record["claims"]}
    assert {k: c["verdict"] for k, c in found.items()} == dict(
        bits="holds",
        size="holds",
        up="holds",
        open="undecided",
        down="contradicted",
        one="untested",
        gpu="untested",
    )
    assert [k for k, c in found.items() if c["expected"]] == ["bits", "size", "up"]
    assert [found[k]["kind"] for k in ("bits", "up")] == ["exact", "statistical"]
    assert rule_text(found["bits"]) == "= 780" and rule_text(found["size"]) == "= 20 ± 0.6"
    assert found["size"]["note"] == "rounded" and found["open"]["note"] == "by seed"
    assert found["gpu"]["note"] == "no GPU" and found["gpu"]["paper"]["value"] == 3
    assert {c["post_hoc"] for c in found.values()} == {None}
    with pytest.raises(ValueError, match="exists already"):
        claims.exact("bits", "Again", 1, equal=1)
    with pytest.raises(ValueError, match="exactly one"):
        claims.statistical("both", "Both", FIVE, above=0, below=1)


@pytest.mark.parametrize("profile", ["laptop", "test"])
def test_an_old_exact_claim_is_always_expected(begin, shown, profile):
    claims = begin(profile, throws=7)
    claims.exact("bits", "Bits a weight", float("nan"), equal=780)
    with pytest.raises(ClaimFailed, match="bits contradicted"):
        claims.report()


# Reading


def test_tables(begin, shown):
    claims = begin()
    claims.declare("a", "It gains | a lot", above=0.5, paper=(1234, "Table 1"), headline=True)
    claims.declare("b", "It is as good", within=(-0.5, 1.5))
    claims.declare("c", "It is large", below=3)
    claims.begin(None)
    claims.judge("a", FIVE)
    claims.judge("b", FIVE)
    claims.untested("c", "it would take a GPU")
    claims.scale(here=dict(data=1), paper=dict(data=8))
    record = claims.record()
    assert claims_table(record).splitlines()[2:] == [
        r"| It gains \| a lot | 1,234 (Table 1) | 1.04 [0.8984, 1.182] (n = 5) | holds | > 0.5 |",
        "| It is as good |  | 1.04 [0.8984, 1.182] (n = 5) | holds | in [-0.5, 1.5] |",
        "| It is large |  | – | untested | < 3; it would take a GPU |",
    ]
    glance = at_a_glance(record)
    assert r"| **It gains \| a lot** | 1,234 (Table 1) | 1.04 [0.8984, 1.182]" in glance
    assert "| within [-0.5, 1.5] | holds |" in glance
    assert "95 % interval, over n independent repetitions" in glance
    assert glance.endswith("\n\nScale beside the paper: 0.12 of its data.")
    assert at_a_glance(begin().record()).count("\n") == 1
    claims.report()
    assert [data["text/markdown"] for data in shown] == [claims_table(record), glance]
    claims.scale(here=dict(data=3), paper=dict(data=5210))
    assert at_a_glance(claims.record()).endswith("1/1,700 of its data.")
    point = dict(measured=dict(estimate=2.0, low=None, high=None, n=1))
    assert measured_text(point) == "2 (n = 1)"


def test_surviving(begin):
    rng = np.random.default_rng(0)
    claims = begin()
    claims.exact("exact", "Exact", 1, equal=1)
    claims.untested("gpu", "It is faster", "no GPU")
    for i in range(3):
        claims.statistical(f"true{i}", "True", rng.normal(5, 1, 10), above=0, expected_in=())
    for i in range(20):
        claims.statistical(f"none{i}", "None", rng.normal(0, 1, 10), above=0, expected_in=())
    claims.declare("within", "As good", within=(-9, 9))
    claims.judge("within", rng.normal(0, 1, 10))
    found = surviving(claims.record()["claims"])
    assert found[:5] == [None, None, True, True, True] and found[-1] is True
    assert not any(found[5:-1])
    assert surviving([]) == [] and surviving(claims.items[:1]) == [None]
