"""Faults of methods that were found by use: each right value, and a sibling of it."""

import copy
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


@pytest.mark.parametrize(
    "name, size",
    [("bigbird", {"r": 0, "g": 0}), ("local", {"w": 0}), ("performer", {"orthogonal": False})],
)
def test_sizes_of_zero_that_mean_none(name, size):
    from tfbench.surveys.faster_atlas import attention

    q, k, v = (normal(1, 2, 32, 8, seed=s) for s in range(3))
    assert torch.isfinite(attention(name, 2, 8, 32, **size)(q, k, v)).all()


@pytest.mark.parametrize("width", [1, 3, 4, 8])
def test_mlp_gate_of_a_narrow_head_reads_its_input(width):
    from tfbench.compression.quantizable import AttentionGate

    gate = AttentionGate(2, width, "mlp", std=1.0)
    gate.hidden_weight.data.abs_()
    x = normal(1, 5, 2 * width).abs() / 10
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
        (pd.array(["a", pd.NA] * 5), "y: expected a label for each row"),
        (np.array([1, "a"] * 5, dtype=object), "y: expected labels of one kind"),
        (3, "y: expected one label for each row"),
        ([[0], [1]] * 5, r"y: expected one label for each row, got shape \(10, 1\)"),
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


# what is reported as rounded is rounded


def few_levels(weight, bits):
    "Every row of a matrix holds at most 2^bits numbers."
    return max(row.unique().numel() for row in weight.detach()) <= 2**bits


def pairs(wrap):
    layers = [nn.Sequential(wrap(nn.Linear(16, 16)), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*layers)


@pytest.fixture
def wrapped():
    torch.manual_seed(0)
    return pairs(torch.nn.utils.parametrizations.weight_norm)


def test_parametrized_layers_are_rounded(wrapped):
    from tfbench.compression.gptq import WeightGrid, quantize_model, rtn_model
    from tfbench.nn.quantization import quantize_w8a8

    x, before = normal(64, 16), wrapped(normal(64, 16)).detach()
    w8a8 = quantize_w8a8(wrapped, [x], weight_bits=4, bits=None)
    assert w8a8[0][0].weight.unique().numel() <= 16
    assert torch.equal(wrapped(x), before), "quantize_w8a8 rounds a copy"
    report = quantize_model(wrapped, [x], WeightGrid(2))
    assert list(report.layer) == ["0.0", "1.0"] and report.attrs["left_out"] == {}
    assert all(few_levels(wrapped[i][0].weight, 2) for i in (0, 1))
    assert not torch.equal(wrapped(x), before)
    nearest = rtn_model(pairs(torch.nn.utils.parametrizations.orthogonal), WeightGrid(2))
    assert all(few_levels(nearest[i][0].weight, 2) for i in (0, 1))


def test_models_with_a_stream_without_mean_are_rounded():
    from tfbench.architectures.rmsnorm import PreNormTransformer
    from tfbench.compression.gptq import WeightGrid, quantize_model
    from tfbench.nn.quantization import linear_layers
    from tfbench.nn.transformer import TransformerConfig

    torch.manual_seed(0)
    model = PreNormTransformer(TransformerConfig(16, 2, 2, vocab=20, max_len=8), "rms").eval()
    ids = torch.randint(20, (4, 8), generator=seeded())
    quantize_model(model, [ids], WeightGrid(2))
    layers = linear_layers(model.blocks)
    assert len(layers) >= 12 and all(few_levels(m.weight, 2) for m in layers.values())


def test_layers_that_work_their_weight_out_are_refused():
    from tfbench.compression.gptq import WeightGrid, quantize_model
    from tfbench.nn.quantization import quantize_w8a8

    with pytest.warns(FutureWarning):
        model = pairs(torch.nn.utils.weight_norm)
    with pytest.raises(ValueError, match="worked out anew at every call"):
        quantize_model(model, [normal(8, 16)], WeightGrid(2))
    with pytest.raises(ValueError, match="worked out anew at every call"):
        quantize_w8a8(model, [normal(8, 16)])


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(config).eval()


def test_experts_are_rounded_and_the_rest_is_named():
    from tfbench.compression.gptq import WeightGrid, quantize_model, rtn_model

    model, nearest, full = mixtral(), mixtral(), mixtral()
    ids = torch.randint(64, (4, 32), generator=seeded())
    with pytest.warns(UserWarning, match=r"left in full precision: .*mlp.gate.weight \(128"):
        report = quantize_model(model, [ids[:2], ids[2:]], WeightGrid(3))
    with pytest.warns(UserWarning, match="left in full precision"):
        rtn_model(nearest, WeightGrid(3))
    for m in (model, nearest):
        for layer in m.model.layers:
            experts = layer.mlp.experts
            stacks = [*experts.gate_up_proj, *experts.down_proj]
            assert all(few_levels(w, 3) for w in stacks)
    experts = report[report.layer.str.contains("experts")]
    assert len(experts) == 16 and (experts.tokens > 0).all()
    assert (experts.loss_gptq < experts.loss_rtn).all()
    assert report.weights.sum() + sum(report.attrs["left_out"].values()) == sum(
        p.numel() for p in model.parameters() if p.ndim > 1
    )
    assert model.config._experts_implementation == full.config._experts_implementation
    logits = [m(ids).logits for m in (full, model, nearest)]
    assert (logits[1] - logits[0]).norm() < (logits[2] - logits[0]).norm()


def test_an_expert_is_solved_on_what_is_routed_to_it():
    from tfbench.compression.gptq import (
        HessianAccumulator,
        WeightGrid,
        gptq_quantize,
        quantize_model,
    )

    class Experts(nn.Module):
        def __init__(self, transposed):
            super().__init__()
            self.is_transposed = transposed
            w = normal(2, 6, 6)
            self.weights = nn.Parameter(w.transpose(1, 2).contiguous() if transposed else w)

        def forward(self, x):
            out, chosen = torch.zeros_like(x), x[..., 0] > 0
            for i, own in enumerate((chosen, ~chosen)):
                w = self.weights[i]
                out[own] = x[own] @ w if self.is_transposed else nn.functional.linear(x[own], w)
            return out

    x, before = normal(50, 6, seed=1), normal(2, 6, 6)
    for transposed in (False, True):
        model = nn.Sequential(nn.Sequential(Experts(transposed)), nn.Sequential(Experts(False)))
        quantize_model(model, [x[:20], x[20:]], WeightGrid(3))
        found = model[0][0].weights
        for i, own in enumerate((x[:, 0] > 0, x[:, 0] <= 0)):
            right = gptq_quantize(
                before[i], HessianAccumulator(6).update(x[own]).H, WeightGrid(3)
            ).Q
            torch.testing.assert_close(found[i].T if transposed else found[i], right)


class OwnExperts(nn.Module):
    "Two experts of somebody's own, each used by one half of the tokens."

    def __init__(self, use):
        super().__init__()
        self.w, self.use = nn.Parameter(normal(2, 16, 16)), use

    def forward(self, x):
        return torch.cat([self.use(part, w) for part, w in zip(x.chunk(2), self.w)])


EXPERTS = {
    "by name": (lambda x, w: torch.nn.functional.linear(x, weight=w), False),
    "times": (lambda x, w: x @ w, True),
    "times by name": (lambda x, w: torch.matmul(x, other=w), True),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_ones_own_say_how_they_lie(name):
    from tfbench.compression.gptq import WeightGrid, quantize_model

    use, transposed = EXPERTS[name]
    block = nn.Sequential(OwnExperts(use))
    batches = [normal(64, 16)]
    if transposed:
        with pytest.raises(ValueError, match="expected is_transposed = True on the module"):
            quantize_model(block, batches, WeightGrid(3), blocks=[block])
    block[0].is_transposed = transposed
    report = quantize_model(block, batches, WeightGrid(3), blocks=[block])
    assert report.tokens.tolist() == [32, 32]
    assert (report.loss_gptq < report.loss_rtn).all()


def test_a_convolution_among_experts_is_no_stack():
    from tfbench.nn.quantization import stacked_weights

    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Conv1d(4, 8, 3)])})
    assert stacked_weights(model) == {}


def test_experts_of_w8a8():
    from tfbench.nn.quantization import quantize_w8a8

    ids = torch.randint(64, (2, 16), generator=seeded())
    rounded = quantize_w8a8(mixtral(), [ids], weight_bits=4, skip="lm_head")
    for w in rounded.model.layers[0].mlp.experts.gate_up_proj:
        assert w.unique().numel() <= 16


def test_two_lists_of_blocks_are_ambiguous():
    from transformers import T5Config, T5ForConditionalGeneration

    from tfbench.nn.blocks import find_blocks

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match=r"several lists .*decoder\.block and encoder\.block"):
        find_blocks(T5ForConditionalGeneration(config))
    one = nn.ModuleDict({"deep": nn.ModuleList(nn.Linear(9, 9) for _ in range(9))})
    one["small"] = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    assert find_blocks(one) == list(one["deep"])


def test_padding_does_not_count_in_the_hessian():
    from transformers import BertConfig, BertModel

    from tfbench.compression.gptq import WeightGrid, quantize_model

    torch.manual_seed(5)
    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    alone = BertModel(BertConfig(**sizes, num_attention_heads=4)).double().eval()
    together = copy.deepcopy(alone)
    ids, lengths = torch.randint(1, 60, (4, 24), generator=seeded()), (24, 10, 17, 5)
    mask = torch.arange(24) < torch.tensor(lengths)[:, None]
    rows = [{"input_ids": row[None, :n]} for row, n in zip(ids, lengths)]
    quantize_model(alone, rows, WeightGrid(4))
    padded = {"input_ids": ids * mask, "attention_mask": mask.long()}
    quantize_model(together, [padded], WeightGrid(4))
    for a, b in zip(alone.parameters(), together.parameters()):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


def test_transposed_layers_are_rounded_by_output():
    from transformers import GPT2Config, GPT2LMHeadModel

    from tfbench.compression.gptq import WeightGrid, quantize_model, rtn, rtn_model

    torch.manual_seed(5)
    sizes = dict(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    solved, full = copy.deepcopy(model), model.transformer.h[0].mlp.c_fc.weight.T.clone()
    found = rtn_model(model, WeightGrid(3)).transformer.h[0].mlp.c_fc.weight.T
    torch.testing.assert_close(found, rtn(full, WeightGrid(3)))
    report = quantize_model(solved, [torch.randint(60, (4, 24), generator=seeded())], WeightGrid(3))
    assert len(report) == 8 and report.loss_gptq.sum() < report.loss_rtn.sum()


# half precision where it reaches


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1.0, 1e7])
@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 3}, {"bits": 2, "ternary": True}])
def test_packing_costs_little_more_than_rounding(size, settings):
    from tfbench.compression.gptq import QuantLinear, WeightGrid, gptq_quantize

    W = size * normal(16, 32)
    result = gptq_quantize(W, torch.eye(32), WeightGrid(**settings))
    packed = QuantLinear(result)
    lost, rounded = ((w - W).norm() for w in (packed.weight, result.Q))
    assert lost < 1.01 * rounded and packed.nbytes == result.nbytes
    assert packed.scales.dtype == (torch.float16 if size == 1.0 else torch.float32)


def test_filters_that_half_precision_does_not_reach():
    from tfbench.analysis.filter_db import FilterDB, extract_filters

    small, large, plain = (size * normal(4, 2, 3, 3) for size in (1e-9, 1e7, 1.0))
    db = FilterDB([extract_filters({"plain": plain}), extract_filters({"a": small, "b": large})])
    for row, w in zip(db.layers.itertuples(), (plain, small, large)):
        torch.testing.assert_close(db.of(row), w, rtol=1e-3, atol=1e-3 * w.abs().max().item())
    assert extract_filters({"plain": plain}).filters.dtype == torch.float16


# calibration data of any kind


def test_batches_from_a_loader_or_a_generator(wrapped):
    from torch.utils.data import DataLoader, TensorDataset

    from tfbench.compression.gptq import WeightGrid, quantize_model
    from tfbench.nn.quantization import quantize_w8a8

    x = normal(64, 16)
    listed, loaded, made = (pairs(lambda m: m) for _ in range(3))
    for net in (loaded, made):
        net.load_state_dict(listed.state_dict())
    quantize_model(listed, list(x.split(16)), WeightGrid(3))
    quantize_model(loaded, DataLoader(TensorDataset(x), 16), WeightGrid(3))
    quantize_model(made, (part for part in x.split(16)), WeightGrid(3))
    for a, b, c in zip(listed.parameters(), loaded.parameters(), made.parameters()):
        assert torch.equal(a, b) and torch.equal(a, c)
    quantize_w8a8(wrapped, (part for part in x.split(16)))


@pytest.mark.parametrize("batches", [torch.ones(8, 16), {"x": 1}, 3, None, []])
def test_batches_that_are_none(wrapped, batches):
    from tfbench.compression.gptq import WeightGrid, quantize_model
    from tfbench.nn.quantization import quantize_w8a8

    with pytest.raises(ValueError, match="batches: expected"):
        quantize_model(wrapped, batches, WeightGrid(2))
    with pytest.raises(ValueError, match="batches: expected"):
        quantize_w8a8(wrapped, batches)


def test_models_without_weights_are_refused():
    from tfbench.compression.gptq import WeightGrid, quantize_model
    from tfbench.nn.quantization import quantize_w8a8

    with torch.device("meta"):
        model = pairs(lambda m: m)
    for quantize in (quantize_w8a8, lambda m, x: quantize_model(m, x, WeightGrid(2))):
        with pytest.raises(ValueError, match="model: expected weights .* on the meta"):
            quantize(model, [normal(4, 16)])


@pytest.mark.parametrize("bits", [3.0, "3", True, 9])
def test_bits_are_whole_numbers(bits):
    from tfbench.compression.gptq import WeightGrid
    from tfbench.nn.quantization import FakeQuant

    for make in (WeightGrid, FakeQuant):
        with pytest.raises(ValueError, match="bits: expected"):
            make(bits)


def test_symmetric_grid_of_the_white_paper():
    from tfbench.nn.quantization import FakeQuant

    x = torch.tensor([-1, 0.25, 0.6, 1])
    right = torch.tensor([-1, 2 / 7, 4 / 7, 1])
    torch.testing.assert_close(FakeQuant(4, True).observe(x)(x), right)
    torch.testing.assert_close(FakeQuant(8, True).observe(-x)(-x)[3], torch.tensor(-1.0))


# padding is no text


def mixture(**options):
    from tfbench.language.ul2 import MixtureOfDenoisers, ul2_mixture

    return MixtureOfDenoisers(ul2_mixture(8), range(100, 140), 1, **options)


@pytest.mark.parametrize("pad", [slice(20, None), slice(0, 12), slice(5, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_denoisers_hide_text_alone(pad, seed):
    from tfbench.data.tokens import restore
    from tfbench.language.ul2 import to_prefix_lm

    full = torch.randint(200, 300, (64, 32), generator=seeded(1))
    rows = full.clone()
    rows[::4, pad] = 0
    before, batch = (mixture()(r, seeded(seed)) for r in (full, rows))
    for i, row in enumerate(rows):
        x, y = (t[i][t[i] != 0] for t in batch[:2])
        assert torch.equal(restore(x, y, range(100, 140)), row[row != 0])
        if i % 4:
            was = [t[i][t[i] != 0] for t in before[:2]]
            assert torch.equal(x, was[0]) and torch.equal(y, was[1])
        width = len(x)
        assert (batch.inputs[i, :width] != 0).all() and (batch.inputs[i, width:] == 0).all()
    assert torch.equal(batch.mode, before.mode)
    ids, _, _ = to_prefix_lm(*batch[:2])
    assert ids.shape[0] == 64


def test_short_rows_lose_their_own_share():
    from tfbench.language.ul2 import Denoiser, MixtureOfDenoisers

    rows = torch.randint(200, 300, (50, 64), generator=seeded(1))
    rows[:, 20:] = 0
    half = MixtureOfDenoisers([Denoiser("half", 2, 0.5)], range(100, 140), 1)
    _, targets, _ = half(rows, seeded())
    assert ((targets >= 200).sum(1) == 10).all()
    with pytest.raises(ValueError, match="rows: expected at least 2 tokens .*, got one with 1"):
        half(rows.masked_fill(torch.arange(64) > 0, 0), seeded())


# the walk through the blocks


class Routed(nn.Module):
    "Three layers, each for the tokens that are its own."

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        own = (x[..., 0].abs() * 97).long() % 3
        out = x.clone()
        for i, part in enumerate(self.parts):
            if (own == i).any():
                out[own == i] = part(x[own == i])
        return out


class Ordered(nn.Module):
    "Two layers, one after the other, or side by side."

    def __init__(self, order):
        super().__init__()
        self.a, self.b, self.order = nn.Linear(8, 8), nn.Linear(8, 8), order

    def forward(self, x):
        if self.order == "side by side":
            return x + self.a(x) + self.b(x)
        first, then = (self.a, self.b) if self.order == "a first" else (self.b, self.a)
        return x + then(first(x).tanh())


def rounded(model, batches, **options):
    from tfbench.compression.gptq import WeightGrid, quantize_model

    report = quantize_model(model, batches, WeightGrid(3), compare=False, **options)
    return report.set_index("layer")


@pytest.mark.parametrize("true_sequential", [False, True])
def test_layers_that_the_first_batch_does_not_reach(true_sequential):
    batches = [normal(32, 8, seed=s) for s in range(6)]
    own = (batches[0][:, 0].abs() * 97).long() % 3
    batches.insert(0, batches[0][own != 0])
    model = nn.Sequential(Routed(), Routed())
    report = rounded(model, batches, true_sequential=true_sequential)
    for block in "01":
        tokens = [report.tokens[f"{block}.parts.{i}"] for i in range(3)]
        assert sum(tokens) == sum(map(len, batches)) and min(tokens) > 0


@pytest.mark.parametrize("orders", [("a first", "b first"), ("side by side", "a first")])
def test_blocks_whose_layers_run_in_another_order(orders):
    from tfbench.compression.gptq import HessianAccumulator, WeightGrid, gptq_quantize

    model = nn.Sequential(*map(Ordered, orders))
    before, batches = copy.deepcopy(model), [normal(2, 16, 8, seed=s) for s in range(3)]
    report = rounded(model, batches)
    assert (report.tokens == 96).all()
    last, x = before[1], model[0](torch.cat(batches))  # as the rounded first block gives it
    first, then = (last.a, last.b) if orders[1] == "a first" else (last.b, last.a)
    for layer, inputs in ((first, x), (then, first(x).tanh())):
        (name,) = (n for n, m in last.named_children() if m is layer)
        right = gptq_quantize(layer.weight, HessianAccumulator(8).update(inputs).H, WeightGrid(3))
        assert (getattr(model[1], name).weight - right.Q).abs().max() < 1e-5


class Twice(nn.Module):
    "One layer that is called twice, and one beside it that sees its first input alone."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.a(self.a(x).tanh()) + self.b(x)


def test_a_layer_that_is_called_twice_counts_once():
    from tfbench.compression.gptq import HessianAccumulator, WeightGrid, gptq_quantize

    model, x = nn.Sequential(Twice(), Twice()), normal(64, 8)
    before = copy.deepcopy(model[0])
    report = rounded(model, [x[:40], x[40:]])
    assert report.tokens.to_dict() == {"0.a": 128, "0.b": 64, "1.a": 128, "1.b": 64}
    both = torch.cat([x, before.a(x).tanh()])
    right = gptq_quantize(before.a.weight, HessianAccumulator(8).update(both).H, WeightGrid(3))
    assert (model[0].a.weight - right.Q).abs().max() < 1e-5


class Overwriting(Twice):
    def forward(self, x):
        y = x.clone()
        out = self.a(y)
        return out + self.b(y.mul_(torch.arange(8.0)))


def test_a_tensor_that_is_changed_in_place_is_another():
    from tfbench.nn.blocks import BlockChain, block_layers

    model = nn.Sequential(Overwriting(), Overwriting())
    with torch.no_grad():
        chain = BlockChain(model, list(model), [normal(4, 8)])
        assert chain.shared_inputs(model[0], block_layers(model[0])) == [["a"], ["b"]]


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("shared", ["block", "layer", "weight"])
def test_blocks_that_share_weights_are_refused(method, shared):
    from tfbench.compression.gptq import WeightGrid, rtn_model

    first, last = Ordered("a first"), Ordered("a first")
    if shared == "layer":
        last.b = first.a
    if shared == "weight":
        last.b.weight = first.a.weight
    model = nn.Sequential(first, first if shared == "block" else last)
    with pytest.raises(ValueError, match="^blocks: .* of block 1 has the weights of"):
        if method == "gptq":
            rounded(model, [normal(4, 8)])
        else:
            rtn_model(model, WeightGrid(3))


def test_layers_that_are_called_by_name():
    class Named(Twice):
        def forward(self, x):
            return x + self.a(input=x) + self.b(input=x)

    report = rounded(nn.Sequential(Named(), Named()), [normal(4, 8)])
    assert (report.tokens == 4).all()


def test_blocks_in_another_order_are_refused():
    model = nn.Sequential(Ordered("a first"), Ordered("a first"))
    with pytest.raises(ValueError, match="^blocks: expected them in the order of their calls"):
        rounded(model, [normal(4, 8)], blocks=[model[1], model[0]])


def small(kind, **more):
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, initializer_range=0.5)
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, pad_token_id=0, **more)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def t5(**more):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, **more)).eval()


def some_ids(*shape, seed=0):
    return torch.randint(1, 50, shape, generator=seeded(seed))


def test_arguments_that_differ_between_blocks_in_later_batches():
    from tfbench.nn.blocks import BlockChain

    kinds = ["full_attention", "sliding_attention"]
    model = small("Qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=4)
    model.config.use_cache = False
    batches, blocks = [some_ids(2, 3), some_ids(2, 12)], model.model.layers
    with torch.no_grad():
        chain = BlockChain(model, list(blocks), batches)
        for block in blocks:
            chain.advance(block)
        for hidden, ids in zip(chain.hidden, batches):
            right = model.model(ids).last_hidden_state
            assert (model.model.norm(hidden) - right).abs().max() < 1e-5


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return self.inner(input_ids=ids, use_cache=None)


@pytest.mark.parametrize("where", ["wrapper", "decoder", "batch"])
def test_no_cache_while_the_data_walk(where):
    ids = [some_ids(2, 8, seed=s) for s in range(2)]
    if where == "decoder":
        model, plain = t5(), t5()
        plain.decoder.config.use_cache = False
        batches = [dict(input_ids=i, decoder_input_ids=i) for i in ids]
        blocks, right = model.decoder.block, plain.decoder.block
    else:
        model, plain = small("Llama"), small("Llama", use_cache=False)
        batches, blocks, right = ids, model.model.layers, plain.model.layers
    calm = batches
    if where == "wrapper":
        model = Wrapped(model)
    if where == "batch":
        batches = [dict(input_ids=i, use_cache=True) for i in ids]
    report = rounded(model, batches, blocks=list(blocks), true_sequential=True)
    rounded(plain, calm, blocks=list(right), true_sequential=True)
    for a, b in zip(blocks.parameters(), right.parameters()):
        torch.testing.assert_close(a, b)
    assert (report.tokens == 32).all()
    caches = [m.config.use_cache for m in blocks.modules() if hasattr(m, "config")]
    assert all(caches), "as before"


def test_the_cache_is_on_again_after_an_error():
    from tfbench.nn.quantization import inference

    model = Wrapped(small("Llama")).train()
    with pytest.raises(KeyError):
        with inference(model):
            assert not model.inner.config.use_cache and not model.training
            raise KeyError
    assert model.inner.config.use_cache and all(m.training for m in model.modules())


def test_a_cache_that_a_batch_brings_is_refused():
    from transformers import DynamicCache

    batch = dict(input_ids=some_ids(2, 8), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="^batches: expected no key-value cache"):
        rounded(small("Llama"), [batch])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_padding_of_an_encoder_is_none_of_its_decoder(side, masked):
    model, ids = t5(), some_ids(2, 8)
    batch = dict(input_ids=ids, decoder_input_ids=ids, attention_mask=torch.ones(2, 8))
    batch["attention_mask"][0, 3:] = 0  # 11 tokens
    own = 16
    if masked:
        batch["decoder_attention_mask"] = torch.ones(2, 8)
        batch["decoder_attention_mask"][1, 5:] = 0
        own = 13
    report = rounded(model, [batch], blocks=list(getattr(model, side).block))
    if side == "encoder":
        assert (report.tokens == 11).all()
    else:
        cross = report.index.str.contains("EncDecAttention.[kv]$")
        assert (report.tokens[cross] == 11).all() and cross.sum() == 4
        assert (report.tokens[~cross] == own).all()


def test_a_decoder_that_is_given_what_an_encoder_says():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=True)).eval()
    batch = dict(input_ids=some_ids(2, 8), encoder_hidden_states=normal(2, 8, 16))
    batch["attention_mask"] = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    batch["encoder_attention_mask"] = (torch.arange(8) < torch.tensor([[2], [7]])).long()
    tokens = rounded(model, [batch]).tokens
    cross = tokens.index.str.endswith("crossattention.c_attn")
    assert (tokens[cross] == 9).all() and (tokens[~cross] == 13).all()


def test_layers_that_no_data_reach_are_named():
    class Skipping(Ordered):
        def forward(self, x):
            return x + self.a(x)

    model = nn.Sequential(Skipping("a first"), Skipping("a first"))
    with pytest.warns(UserWarning, match=r"no calibration data .*: 0\.b, 1\.b$"):
        report = rounded(model, [normal(4, 8)])
    assert report.tokens.tolist() == [4, 0, 4, 0]


def test_all_experts_in_one_product_are_named():
    class ExpertsAtOnce(OwnExperts):
        def forward(self, x):
            return torch.bmm(x.view(2, -1, 16), self.w).view(x.shape)

    block = nn.Sequential(ExpertsAtOnce(None))
    with pytest.warns(UserWarning, match=r"no calibration data .*: .*0\.w\.0, .*0\.w\.1"):
        rounded(nn.Sequential(block), [normal(64, 16)], blocks=[block])


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_times_their_transpose(transposed):
    block = nn.Sequential(OwnExperts(lambda x, w: torch.mm(x, mat2=w.T)))
    block[0].is_transposed = transposed
    if transposed:
        with pytest.raises(ValueError, match="expected is_transposed = False"):
            rounded(block, [normal(64, 16)], blocks=[block])
    else:
        assert rounded(block, [normal(64, 16)], blocks=[block]).tokens.tolist() == [32, 32]


# numbers and arguments of GPTQ


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_large_weights_in_half_precision_are_finite(kind):
    from tfbench.compression.gptq import WeightGrid, gptq_quantize, obq_reference, rtn

    W, H, grid = torch.full((2, 4), 4e4, dtype=kind), torch.eye(4, dtype=kind) * 3e4, WeightGrid(3)
    for Q in (rtn(W, grid), gptq_quantize(W, H, grid).Q, obq_reference(W, H, grid)):
        assert (Q / W - 1).abs().max() < 0.01
    wide = rtn(torch.tensor([[6e4, -6e4, 0]], dtype=kind), grid)
    assert wide.isfinite().all() and (wide - torch.tensor([[6e4, -6e4, 0]])).abs().max() < 9e3
    w = normal(3, 8).to(kind)
    assert (rtn(w, WeightGrid(16)) - w).abs().max() < 1e-3


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.uint8])
def test_masks_of_zeros_and_ones(kind):
    from tfbench.compression.gptq import HessianAccumulator

    x, mask = normal(2, 5, 4), torch.arange(5) < torch.tensor([[3], [5]])
    right = HessianAccumulator(4).update(x, mask)
    found = HessianAccumulator(4).update(x, mask.to(kind))
    assert found.n == 8 and torch.equal(found.H, right.H)


@pytest.mark.parametrize("training", [False, True])
def test_packed_layers_train_as_those_before(training):
    model = nn.Sequential(Ordered("a first"), Ordered("a first")).train(training)
    model[1].requires_grad_(False)
    rounded(model, [normal(16, 8)], pack=True)
    assert all(m.training == training for m in model.modules())
    assert model[0].a.bias.requires_grad and not model[1].a.bias.requires_grad


def boom(*_):
    raise AssertionError("the data went through")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"damp": "x"}, "damp: expected a finite share"),
        ({"damp": math.inf}, "damp: expected a finite share"),
        ({"block_size": 2.5}, "block_size: expected a whole number"),
        ({"group_size": 0}, "group_size: expected"),
        ({"group_sise": 8}, "options: .*'group_sise'"),
        ({"blocks": []}, "blocks: expected"),
        ({"blocks": 3}, "blocks: expected"),
        ({"blocks": [nn.Linear(8, 8)]}, "blocks: expected"),
        ({"layers": ["a", "typo"]}, "layers: .*'typo'"),
    ],
)
def test_arguments_are_judged_before_the_data_go_through(given, message):
    model = nn.Sequential(Ordered("a first"), Ordered("a first"))
    model.register_forward_pre_hook(boom)
    with pytest.raises(ValueError, match=f"^{message}"):
        rounded(model, [normal(4, 8)], **given)


def test_a_grid_is_no_number():
    from tfbench.compression.gptq import rtn_model

    with pytest.raises(ValueError, match="^grid: expected a WeightGrid"):
        rtn_model(nn.Sequential(Ordered("a first"), Ordered("a first")), 3)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_that_are_not_finite_are_found_before_any_is_rounded(method):
    from tfbench.compression.gptq import WeightGrid, rtn_model

    model = nn.Sequential(Ordered("a first"), Ordered("a first"))
    model[1].b.weight.data[0, 0] = math.nan
    before = model[0].a.weight.clone()
    with pytest.raises(ValueError, match="^model: expected finite weights, b of block 1"):
        if method == "gptq":
            rounded(model, [normal(4, 8)])
        else:
            rtn_model(model, WeightGrid(3))
    assert torch.equal(model[0].a.weight, before)


def test_a_stack_of_which_one_expert_is_rounded_is_left_in_part():
    from tfbench.compression.gptq import WeightGrid, quantize_model

    block = nn.Sequential(OwnExperts(lambda x, w: nn.functional.linear(x, w)))
    report = quantize_model(block, [normal(64, 16)], WeightGrid(3), blocks=[block], layers="w.1")
    assert report.attrs["left_out"] == {"0.w": 256}


# hidden pixels


@pytest.mark.parametrize("shape", [(200, 3, 32, 64), (200, 3, 128, 32), (50, 3, 32, 32)])
def test_a_block_of_one_is_one_patch(shape):
    from tfbench.pretraining.gmml import block_of_one

    hidden = block_of_one(shape, 0.01, 8, seeded()).sum((1, 2, 3))
    assert (hidden == 64).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.float16])
def test_a_loss_in_half_precision_is_finite(kind):
    from tfbench.pretraining.gmml import masked_l1

    x = torch.zeros(4, 3, 160, 160, dtype=torch.float16)
    loss = masked_l1(x + 1, x, torch.ones(4, 1, 160, 160, dtype=kind))
    assert loss == 1


@pytest.mark.parametrize(
    "recon, mask, name",
    [
        ((2, 3, 8, 8), (2, 3, 8, 8), "mask"),
        ((2, 3, 8, 8), (1, 1, 8, 8), "mask"),
        ((2, 1, 8, 8), (2, 1, 8, 8), "recon"),
        ((1, 3, 8, 8), None, "recon"),
    ],
)
def test_losses_of_other_shapes_are_refused(recon, mask, name):
    from tfbench.pretraining.gmml import masked_l1

    mask = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"^{name}: expected shape"):
        masked_l1(torch.zeros(recon), torch.zeros(2, 3, 8, 8), mask)
