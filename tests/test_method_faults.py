"""Faults of methods that were found by use: each right value, and a sibling of it."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


# sizes that may be zero


@pytest.mark.parametrize("causal", [False, True])
def test_longformer_without_global_tokens_is_its_window(causal):
    from tfbench.surveys.faster_atlas import attention

    q, k, v = (normal(1, 2, 32, 8, seed=s) for s in range(3))
    alone = attention("longformer", 2, 8, 32, w=4, g=0)
    window = attention("local", 2, 8, 32, w=4)
    assert torch.equal(alone(q, k, v, causal=causal), window(q, k, v, causal=causal))
    assert alone.cost(32) == window.cost(32)


@pytest.mark.parametrize(
    "name, size",
    [
        ("longformer", {"g": -1}),
        ("bigbird", {"b": 0}),
        ("lsh", {"rounds": 0}),
        ("strided", {"s": 0}),
        ("routing", {"c": 0}),
        ("nystrom", {"m": 0}),
        ("linformer", {"k": 0}),
        ("compressive", {"c": 0}),
    ],
)
def test_sizes_that_make_no_attention_are_refused(name, size):
    from tfbench.surveys.faster_atlas import attention

    (key,) = size
    with pytest.raises(ValueError, match=rf"{key}: expected at least"):
        attention(name, 2, 8, 32, **size)


@pytest.mark.parametrize("name, size", [("bigbird", {"r": 0, "g": 0}), ("local", {"w": 0})])
def test_sizes_of_zero_that_mean_none(name, size):
    from tfbench.surveys.faster_atlas import attention

    q, k, v = (normal(1, 2, 32, 8, seed=s) for s in range(3))
    assert torch.isfinite(attention(name, 2, 8, 32, **size)(q, k, v)).all()


@pytest.mark.parametrize("width", [1, 3, 4, 8])
def test_mlp_gate_of_a_narrow_head_reads_its_input(width):
    from tfbench.compression.quantizable import AttentionGate

    gate = AttentionGate(2, width, "mlp", std=1.0)
    gate.hidden_weight.data.abs_()
    x = normal(1, 5, 2 * width).abs()
    assert gate.hidden_weight.shape[1] == max(1, width // 4)
    assert gate(x).shape == (1, 2, 5, 1) and gate(x).unique().numel() == 10


@pytest.mark.parametrize("size", [[8, 12], (8, 12)])
def test_image_size_as_a_list(size):
    from tfbench.architectures.compact_transformers import cct_2_3x2, compact_config

    assert compact_config(2, size).size == (8, 12)
    assert cct_2_3x2(size, classes=3)(torch.zeros(1, 3, 8, 12)).shape == (1, 3)


@pytest.mark.parametrize("size", [[8], [8, 8, 3], 8.5, "8", [8, 0]])
def test_image_sizes_that_are_none(size):
    from tfbench.architectures.compact_transformers import compact_config

    with pytest.raises(ValueError, match="img_size: expected"):
        compact_config(2, size)


# bars


def test_mode_of_full_support_is_where_the_density_is_highest():
    from tfbench.in_context.prior_fitted import FullSupport

    dist = FullSupport(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    p = torch.tensor([[0.4, 0.35, 0.25], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    assert dist.mode(p.log()).tolist() == [1.5, 1.0, 2.0]
    y = torch.linspace(-3, 6, 9001)
    for row in p.log():
        density = dist.log_prob(row.expand(len(y), 3), y)
        near = dist.mode(row) + torch.tensor([-1e-4, 0.0, 1e-4])  # a border belongs to one side
        at = dist.log_prob(row.expand(3, 3), near)
        assert at.max() >= density.max() - 1e-5


def test_mode_of_bounded_bars_is_the_densest_bar():
    from tfbench.in_context.prior_fitted import Riemann

    p = torch.tensor([0.5, 0.3, 0.2])
    assert Riemann(torch.tensor([0.0, 5.0, 6.0, 7.0])).mode(p.log()) == 5.5


def test_labels_that_are_no_numbers_have_no_density():
    from tfbench.in_context.prior_fitted import Riemann

    with pytest.raises(ValueError, match="y: expected numbers from"):
        Riemann(torch.linspace(-2, 2, 5)).log_prob(torch.zeros(1, 4), torch.tensor([math.nan]))


# prior-fitted wrappers


@pytest.fixture
def rows():
    return normal(10, 3).numpy()


@pytest.fixture
def classifier():
    from tfbench.in_context.prior_fitted import PFN, PFNClassifier

    torch.manual_seed(0)
    return PFNClassifier(PFN(3, 1, 16, 2, 1).eval())


@pytest.fixture(params=["Riemann", "FullSupport"])
def regressor(request):
    from tfbench.in_context import prior_fitted as pf

    torch.manual_seed(0)
    bars = getattr(pf, request.param)(torch.linspace(-2, 2, 11))
    return pf.PFNRegressor(pf.PFN(3, 10, 16, 2, 1).eval(), bars)


def spoiled(rows, value=math.nan):
    rows = rows.copy()
    rows[4, 1] = value
    return rows


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39])
def test_what_is_not_finite_is_not_answered(classifier, regressor, rows, value):
    rows = rows.astype(np.float64)
    for estimator, labels in ((classifier, [0, 1] * 5), (regressor, rows[:, 0].clip(-2, 2))):
        with pytest.raises(ValueError, match="X: expected finite numbers, got 1"):
            estimator.fit(spoiled(rows, value), labels)
        estimator.fit(rows, labels)
        with pytest.raises(ValueError, match="X: expected finite numbers, got 1"):
            estimator.predict(spoiled(rows, value))


def test_labels_far_from_the_bars_are_not_answered(regressor, rows):
    with pytest.raises(ValueError, match="y: expected labels that the bars reach"):
        regressor.fit(rows, 100 + rows[:, 0])
    with pytest.raises(ValueError, match="y: expected finite numbers"):
        regressor.fit(rows, spoiled(rows)[:, 1])
    assert np.isfinite(regressor.fit(rows, rows[:, 0].clip(-2, 2)).predict(rows)).all()


def test_words_and_frames(classifier, rows):
    words = np.array(["cat", "dog"] * 5)
    named = classifier.fit(pd.DataFrame(rows), pd.Series(words))
    said, p = named.predict(pd.DataFrame(rows)), named.predict_proba(rows)
    assert (said == np.where(p[:, 1] > 0.5, "dog", "cat")).all()
    numbered = classifier.fit(torch.tensor(rows), torch.tensor([0, 1] * 5))
    np.testing.assert_array_equal(numbered.predict_proba(rows.tolist()), p)


@pytest.mark.parametrize(
    "labels, message",
    [
        (["a", None] * 5, "y: expected a label for each row"),
        ([0.0, math.nan] * 5, "y: expected a label for each row"),
        ([0, 1] * 4, "y: expected a label for each of the 10 rows, got 8"),
        (["a", "b", "c", "a", "b"] * 2, "y: expected two classes, got 3"),
    ],
)
def test_labels_that_are_none(classifier, rows, labels, message):
    with pytest.raises(ValueError, match=message):
        classifier.fit(rows, labels)


def test_tables_that_are_none(classifier, regressor, rows):
    with pytest.raises(ValueError, match="X: expected numbers"):
        classifier.fit(pd.DataFrame({"a": ["x", "y"]}), [0, 1])
    with pytest.raises(ValueError, match="X: expected 2 axes"):
        regressor.fit(rows[:, 0], rows[:, 0])
    for estimator in (classifier, regressor):
        with pytest.raises(ValueError, match=re.escape("call fit(X, y)")):
            estimator.predict(rows)


# what is not observed


@pytest.mark.parametrize("settings", [{}, {"enable_forecast_channel_mixing": True}])
@pytest.mark.parametrize("hidden", [1e6, math.nan, math.inf])
def test_forecasts_do_not_read_what_is_not_observed(settings, hidden):
    from tfbench.modalities.tiny_time_mixers import TTM, TTMConfig

    torch.manual_seed(0)
    small = dict(context_length=32, prediction_length=4, patch_length=8, num_input_channels=2)
    width = dict(d_model=16, decoder_d_model=8, num_layers=1, decoder_num_layers=1)
    model = TTM(TTMConfig(**small, **width, **settings)).eval()
    past = normal(3, 40, 2)
    observed = torch.ones_like(past, dtype=torch.bool)
    observed[:, [20, 39], 0] = False
    moved = past.masked_fill(~observed, hidden)
    a, b = (model(x, observed=observed) for x in (past.masked_fill(~observed, 0), moved))
    assert torch.equal(a.forecast, b.forecast) and torch.isfinite(b.forecast).all()
    assert torch.equal(model(past).forecast, model(past, observed=observed | True).forecast)
    with pytest.raises(ValueError, match="observed: expected the shape of past"):
        model(past, observed=observed[:, 8:])


# as published


def test_drift_of_two_directions_is_the_published_one():
    from tfbench.analysis.filter_db import drift_matrix

    first, second = (2 * torch.eye(9)[i].repeat(50, 1) for i in (0, 1))
    drifts, _ = drift_matrix({"first": first, "second": second}, bins=70)
    assert drifts.loc["first", "second"] == pytest.approx(39.69, abs=0.005)


def test_drift_is_the_published_one_written_out():
    from tfbench.analysis.filter_db import coefficients, drift_matrix, scale_filters

    groups = {"a": normal(500, 9), "b": normal(400, 9, seed=1) * torch.linspace(0.1, 1, 9) + 0.5}
    drifts, basis = drift_matrix(groups, bins=20)
    C = [coefficients(scale_filters(X), basis).numpy() for X in groups.values()]
    limits = min(c.min() for c in C), max(c.max() for c in C)
    total = 0.0
    for i, share in enumerate(basis.ratio.tolist()):
        p, q = (np.histogram(c[:, i], 20, limits, density=True)[0] for c in C)
        p, q = (np.where(h > 0, h, np.finfo(np.float32).eps) for h in (p, q))
        p, q = p / p.sum(), q / q.sum()
        total += share * ((p - q) * np.log(p / q)).sum()
    assert drifts.loc["a", "b"] == pytest.approx(total, rel=1e-9)


def test_sides_of_aligned_blocks_are_rounded():
    from tfbench.pretraining.gmml import coverage_cap, group_mask

    one = group_mask((4000, 1, 32, 32), 1e-6, 4, 0.3, seeded())[:, 0]  # a single block each
    sides = torch.cat([one.any(k).sum(1) for k in (1, 2)])
    assert set(sides.tolist()) == {4, 8}
    assert (sides == 8).float().mean().item() == pytest.approx(0.6, abs=0.02)
    assert coverage_cap(32, 32, 4, 0.3) == 1.0
    most = coverage_cap(32, 32, 4, 0.2)  # sides of 4 or 5, which is 4: the last four are out
    assert most == (28 / 32) ** 2
    full = group_mask((5, 1, 32, 32), most, 4, 0.2, seeded())
    assert full.float().mean((1, 2, 3)).tolist() == [most] * 5


@pytest.mark.parametrize("align, sides", [(1, {1, 2, 3, 4, 5, 6, 7, 8}), (2, {2, 4, 6, 8})])
def test_sides_of_blocks_by_their_alignment(align, sides):
    from tfbench.pretraining.gmml import group_mask

    one = group_mask((2000, 1, 32, 32), 1e-6, align, 0.3, seeded())[:, 0]
    assert set(one.any(1).sum(1).tolist()) == sides


# a grid that follows the posterior


@pytest.mark.parametrize("gap", [0.0, 13.4, 40.0, -5.0])
def test_posterior_of_many_pulls(gap):
    from tfbench.in_context.decision_pretraining import exact_action_posterior

    n = torch.full((1, 2), 50_000.0, dtype=torch.float64)
    total = torch.tensor([[25_000 + gap, 25_000]], dtype=torch.float64)
    right = torch.special.ndtr(torch.tensor(gap / 50_000 / (0.3 * math.sqrt(2 / 50_000)))).item()
    found = exact_action_posterior(n, total, 0.3)
    assert found[0, 0].item() == pytest.approx(right, abs=1e-4)
    if gap == 13.4:
        assert right == pytest.approx(0.5562, abs=1e-4)


def test_posterior_of_unequal_pulls():
    from tfbench.in_context.decision_pretraining import exact_action_posterior

    n, total = torch.tensor([[1e6, 0.0, 0.0]]), torch.tensor([[7e5, 0.0, 0.0]])
    found = exact_action_posterior(n.double(), total.double(), 0.3)
    torch.testing.assert_close(
        found, torch.tensor([[0.49, 0.255, 0.255]]).double(), atol=1e-4, rtol=0
    )


def test_posterior_of_rewards_outside_the_prior():
    from tfbench.in_context.decision_pretraining import exact_action_posterior

    n, total = torch.tensor([[36.0, 36.0]]), torch.tensor([[90.0, -30.0]])
    assert exact_action_posterior(n, total, 0.3)[0, 0] > 0.999


def test_decision_transformer_has_gpt2s_activation():
    from tfbench.in_context.decision_pretraining import DPT

    net = DPT(0, 3, 16, 1, 2)
    x = normal(2, 3, 16)
    half = net.body.blocks[0].feed_forward
    published = half.down(nn.functional.gelu(half.up(x), approximate="tanh"))
    torch.testing.assert_close(half(x), published)
