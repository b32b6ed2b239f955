"Intervals cover what they promise, seen by simulation with fixed seeds; bad input is refused."

import numpy as np
import pytest
import torch

from tfbench.study.statistics import (
    Interval,
    band,
    benjamini_hochberg,
    bootstrap,
    crossed,
    detectable,
    difference,
    interval,
    p_value,
    ratio,
)


def covers(found: list, truth: float) -> float:
    "The share of intervals that hold the truth."
    return float(np.mean([i.low <= truth <= i.high for i in found]))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def answers(seed: int, n_seeds: int, n_items: int, spreads, skewed=False, repeats=1000):
    "Repeats of seeds x items with mean zero and these spreads of seeds, items and the rest."
    rng = np.random.default_rng(seed)
    items = (repeats, 1, n_items)
    b = rng.exponential(size=items) - 1 if skewed else rng.normal(size=items)
    a, e = rng.normal(size=(repeats, n_seeds, 1)), rng.normal(size=(repeats, n_seeds, n_items))
    return spreads[0] * a + spreads[1] * b + spreads[2] * e


# Coverage


def test_five_normal_values():
    assert 0.94 < covers([interval(row) for row in normal(0, 4000, 5)], 0) < 0.96
    assert 0.94 < covers([bootstrap(row) for row in normal(1, 1000, 5)], 0) < 0.97
    assert 0.88 < covers([interval(row, level=0.9) for row in normal(2, 4000, 5)], 0) < 0.92


def test_differences_of_five_pairs():
    shared, a, b = normal(3, 2000, 5) * 10, normal(4, 2000, 5), normal(5, 2000, 5)
    found = [difference(*pair) for pair in zip(shared + a, shared + b, strict=True)]
    assert 0.94 < covers(found, 0) < 0.96
    assert np.mean([i.high - i.low for i in found]) < 5, "what the pairs share falls out"


def test_ratios_of_five_log_normal_pairs():
    shared, a, b = (np.exp(normal(seed, 2000, 5)) for seed in (6, 7, 8))
    found = [ratio(*pair) for pair in zip(3 * shared * a, shared * b, strict=True)]
    assert 0.94 < covers(found, 3) < 0.96


@pytest.mark.parametrize("n_seeds", [3, 4, 5, 8])
@pytest.mark.parametrize("n_items", [20, 200])
def test_crossed_with_the_spread_of_seeds_a_quarter_of_that_of_items(n_seeds, n_items):
    runs = answers(n_seeds, n_seeds, n_items, spreads=(0.25, 1, 0.5))
    assert 0.94 < covers([crossed(v) for v in runs], 0) < 0.99
    assert covers([interval(v.ravel()) for v in runs], 0) < 0.9, "pooled: what it is good for"
    assert covers([interval(v.mean(1)) for v in runs], 0) < 0.96


@pytest.mark.parametrize("spreads", [(1, 0, 0), (1, 1, 1), (0, 1, 0.1), (0, 0, 1), (0.05, 1, 0)])
def test_crossed_whatever_varies(spreads):
    runs = answers(9, 5, 50, spreads, repeats=2000)
    assert 0.94 < covers([crossed(v) for v in runs], 0) < 0.98


@pytest.mark.parametrize(("n_items", "least"), [(10, 0.88), (30, 0.92), (200, 0.94)])
def test_crossed_with_skewed_items(n_items, least):
    runs = answers(10, 5, n_items, spreads=(0.25, 1, 0.5), skewed=True)
    assert covers([crossed(v) for v in runs], 0) > least


def test_items_drawn_anew_for_each_seed():
    rng = np.random.default_rng(11)
    runs = 0.1 * rng.normal(size=(2000, 5, 1)) + rng.normal(size=(2000, 5, 50))
    found = [crossed(v, shared=False) for v in runs]
    assert 0.94 < covers(found, 0) < 0.96
    widths = [i.high - i.low for i in found]
    assert np.mean(widths) < np.mean([i.high - i.low for i in map(crossed, runs)])


@pytest.mark.parametrize(("n_seeds", "n_items"), [(3, 50), (5, 100), (8, 100)])
def test_ratios_of_seeds_and_skewed_items(n_seeds, n_items):
    "Losses: items differ in difficulty, which both methods share, and in what the method does."
    rng = np.random.default_rng(n_seeds)
    hard = rng.lognormal(size=(1000, 1, n_items))
    effect = rng.lognormal(0, 0.4, size=(1000, 1, n_items))
    a = hard * effect * np.exp(answers(12, n_seeds, n_items, (0.1, 0, 0.2)))
    b = hard * np.exp(answers(13, n_seeds, n_items, (0.1, 0, 0.2)))
    pairs = list(zip(a, b, strict=True))
    found = covers([ratio(*pair) for pair in pairs], np.exp(0.4**2 / 2))
    alone = covers([ratio(x.mean(1), y.mean(1)) for x, y in pairs], np.exp(0.4**2 / 2))
    assert found > 0.92 and alone < found - 0.03


@pytest.mark.parametrize(
    ("draw", "mean", "least"),
    [("normal", 0, 0.91), ("exponential", 1, 0.9), ("lognormal", np.exp(0.5), 0.86)],
)
def test_bootstrap_of_fifty(draw, mean, least):
    values = getattr(np.random.default_rng(14), draw)(size=(300, 50))
    assert covers([bootstrap(v, resamples=300) for v in values], mean) > least


def test_bootstrap_of_other_statistics():
    rng = np.random.default_rng(15)
    for n in (12, 60):  # the jackknife and BCa
        pairs = rng.normal(size=(80, n, 2)) @ [[1, 0.6], [0, 0.8]]
        found = [bootstrap(v, lambda v: np.corrcoef(v.T)[0, 1], resamples=300) for v in pairs]
        assert covers(found, 0.6) > 0.88
    few = bootstrap(np.arange(5.0), lambda v: v.mean() ** 2)
    assert few.estimate == 4 and few.low < 4 < few.high and few.n == 5


def test_bands():
    runs = normal(16, 5, 4000)
    mean, low, high = band(runs)
    assert 0.94 < np.mean((low <= 0) & (0 <= high)) < 0.96
    one = interval(runs[:, 7])
    assert np.allclose((mean[7], low[7], high[7]), (one.estimate, one.low, one.high))


# What must be equal


def test_limits_of_crossed():
    seeds, items = normal(17, 5, 1), normal(18, 1, 30)
    for runs, one in ((seeds + 0 * items, seeds), (0 * seeds + items, items)):
        found, wanted = crossed(runs), interval(one.ravel())
        assert np.allclose((found.low, found.high), (wanted.low, wanted.high)) and found.n == 5
    single = crossed(items)
    assert (single.low, single.n) == (None, 1), "one seed decides nothing, with any number of items"


def test_turning_pairs_round():
    a, b = np.exp(normal(19, 5, 20)), np.exp(normal(20, 5, 20))
    there, back = ratio(a, b), ratio(b, a)
    assert np.allclose((there.estimate * back.estimate, there.low * back.high), 1)
    assert np.allclose(difference(a, b).low, -difference(b, a).high)
    assert np.allclose(ratio(2 * a, b).high, 2 * there.high)
    assert ratio(a[:, 0], 2.0) == ratio(a[:, 0], np.full(5, 2.0))


def test_collections():
    wanted = interval([1.0, 2.0, 4.0])
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    for same in (values, list(values), (1, 2, 4), {"a": 1, "b": 2, "c": 4}.values()):
        assert interval(same) == wanted
    assert interval(values.bfloat16()) == wanted
    assert interval(torch.tensor([True, False])).estimate == 0.5


def test_words():
    assert str(Interval(1.23456, 1.0, 1.5, 5)) == "1.235 [1, 1.5]"
    assert str(interval([2.0])) == "2" and str(Interval(2.0, 2.0, 2.0, 5)) == "2"


# Power, and many claims


@pytest.mark.parametrize("n", [3, 5, 20])
def test_detectable_is_seen_as_often_as_it_says(n):
    draws = normal(n, 4000, n)
    for power in (0.5, 0.8):
        found = [interval(v + detectable(1.0, n, power)) for v in draws]
        assert abs(np.mean([i.low > 0 for i in found]) - power) < 0.03


def test_detectable_from_an_interval():
    values = normal(21, 5)
    found = detectable(interval(values))
    assert np.isclose(found, detectable(values.std(ddof=1), 5))
    assert np.isclose(detectable(interval(values), 20), detectable(values.std(ddof=1), 20))
    assert detectable(interval([1.0, 1.0])) == 0


def test_p_values():
    found = [interval(row) for row in normal(22, 2000, 5)]
    p = np.array([p_value(i, 0) for i in found])
    assert ((p < 0.05) == [not i.low <= 0 <= i.high for i in found]).all()
    assert abs(np.mean(p < 0.3) - 0.3) < 0.03, "uniform where nothing is to be found"
    skewed = ratio([2.0, 3.0, 2.5, 8.0, 5.0], 1.0)
    assert np.isclose(p_value(skewed, skewed.low), 0.05)
    assert np.isclose(p_value(skewed, skewed.high), 0.05)
    assert p_value(interval([1.0]), 0) == 1
    assert p_value(interval([1.0, 1.0]), 0) == 0 and p_value(interval([1.0, 1.0]), 1) == 1


def test_benjamini_hochberg():
    p = [0.001, 0.012, 0.03, 0.035, 0.9]  # 0.03 is no 3/5 of 5 %, but 0.035 is under 4/5
    assert benjamini_hochberg(p).tolist() == [True, True, True, True, False]
    assert benjamini_hochberg(p[::-1]).tolist() == [False, True, True, True, True]
    assert not benjamini_hochberg([0.04, 0.5]).any() and benjamini_hochberg([0.04]).all()
    from scipy.stats import false_discovery_control

    many = np.random.default_rng(23).beta(0.4, 2, 200)
    assert (benjamini_hochberg(many, 0.1) == (false_discovery_control(many) <= 0.1)).all()


# What is refused


@pytest.mark.parametrize("bad", [[], [0.1, float("nan")], [float("inf")], [[1.0]], ["a"], None, 3])
def test_bad_values(bad):
    with pytest.raises(ValueError, match="values: expected a list of finite numbers, got"):
        interval(bad)


@pytest.mark.parametrize(
    "bad", [[1.0], [[1.0], [1.0, 2.0]], [[]], [[np.nan, 1.0]], np.ones((2, 2, 2))]
)
def test_bad_tables(bad):
    with pytest.raises(ValueError, match="values: expected a table of finite numbers, got"):
        crossed(bad)
    with pytest.raises(ValueError, match="runs: expected a table of finite numbers, got"):
        band(bad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossed([[1.0], [2.0]]), "values: one item"),
        (lambda: band([[1.0, 2.0]]), "runs: one run"),
        (lambda: difference([1.0, 2.0], [1.0]), r"b: expected the shape of a, \(2,\), got \(1,\)"),
        (lambda: difference([[1.0, 2.0]], [1.0, 2.0]), "b: expected the shape of a"),
        (lambda: difference([1.0, 2.0], float("nan")), "b: expected"),
        (lambda: ratio([1.0, 2.0], [1.0, 0.0]), "a, b: a ratio takes positive"),
        (lambda: ratio([1.0, -2.0], 1.0), "a, b: a ratio takes positive"),
        (lambda: interval([1.0, 2.0], level=95), "level: expected a share"),
        (lambda: bootstrap([]), "values: expected"),
        (lambda: detectable(1.0), "n: expected two or more seeds, got None"),
        (lambda: detectable(1.0, 0), "n: expected two or more seeds, got 0"),
        (lambda: detectable(interval([1.0]), 5), "interval: one value has none"),
        (lambda: detectable(1.0, 5, power=80), "power: expected a share"),
        (lambda: benjamini_hochberg([]), "p: expected"),
        (lambda: benjamini_hochberg([0.5, 1.2]), "p: expected numbers from 0 to 1"),
    ],
)
def test_other_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_import_is_cheap():
    import subprocess
    import sys

    heavy = "scipy, torch, pandas, matplotlib".split(", ")
    code = f"import sys, tfbench.study.statistics; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.strip() == "[]", said.stderr
