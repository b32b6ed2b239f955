"Checks stop at what is wrong and say what; two models part where they were made to part."

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tfbench.study.checks import check, checks, expect_error, first_difference, max_error


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        (1, 3, 2),
        ([], [], 0),
        (torch.tensor([1.0, -torch.inf]), torch.tensor([1.5, -torch.inf]), 0.5),
        (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), np.inf),
        (torch.tensor([True, False]), np.array([1, 1]), 1),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), np.ones(2), 0),
        (np.array([1 + 1j]), np.array([1 - 1j]), 2),
        (torch.tensor([1 << 40]), torch.tensor([(1 << 40) + 1]), 1),
    ],
)
def test_max_error(a, b, error):
    assert max_error(a, b) == error


def test_what_is_no_number_never_passes():
    nan = max_error([np.nan, 1.0], [np.nan, 1.0])
    assert np.isnan(nan)
    for error in (nan, np.inf, 1.1):
        with pytest.raises(AssertionError, match="odd: error"):
            check("odd", error, 1.0)
    with pytest.raises(ValueError, match=r"b: expected the shape of a, \(2,\), got \(1, 2\)"):
        max_error([1, 2], [[1, 2]])


def test_expected_errors(capsys):
    with expect_error(ValueError, "wrong"):
        raise ValueError("something wrong")
    assert capsys.readouterr().out == "ValueError: something wrong\n"
    with pytest.raises(AssertionError, match="no ValueError was raised"):
        with expect_error(ValueError):
            pass
    with pytest.raises(AssertionError, match="the message lacks 'right': something wrong"):
        with expect_error(ValueError, "right"):
            raise ValueError("something wrong")
    with pytest.raises(KeyError):
        with expect_error(ValueError):
            raise KeyError("another kind")


def test_a_section_prints_one_line(capsys):
    with checks("limits") as section:
        section("near", 2e-14, 1e-12)
        section("nearer", 1e-15, 1e-12)
        section.true("order", True)
        with section.raises(ValueError, "bad"):
            raise ValueError("bad")
    assert capsys.readouterr().out == "limits: 4 checks, largest error 2e-14\n"
    with checks("one") as section:
        section.true("order", True)
    assert capsys.readouterr().out == "one: 1 check\n"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda s: s("far", 0.5, 0.1), "limits: far: error 0.5 is above 0.1"),
        (lambda s: s("nan", float("nan"), 0.1), "limits: nan: error nan"),
        (lambda s: s.true("order", False), "limits: order does not hold"),
        (lambda s: s.raises(ValueError).__enter__() and None, "limits: nothing was checked"),
    ],
)
def test_a_section_stops_at_the_first_failure(bad, message, capsys):
    with pytest.raises(AssertionError, match=message):
        with checks("limits") as section:
            bad(section)
    assert capsys.readouterr().out == ""


# Where two models part


def pair() -> tuple:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in "abc"))
    return model, copy.deepcopy(model), {str(i): str(i) for i in range(3)}, torch.randn(2, 4)


def test_the_first_layer_is_found_in_the_order_of_running():
    ours, theirs, names, x = pair()
    assert first_difference(ours, theirs, names | {"": ""}, x) is None
    theirs[1][0].bias.data += 0.5
    found = first_difference(ours, theirs, dict(reversed(names.items())), x)
    assert found.names == ("1", "1") and found.run == 0
    assert abs(found.error - 0.5) < 1e-6 and torch.allclose(found.b, found.a + 0.5)
    assert "1 and 1 differ by 0.5" in str(found)
    assert first_difference(ours, theirs, {"0": "0"}, x) is None


def test_models_are_given_back_as_they_were():
    ours, theirs, names, x = pair()
    ours[1].eval()
    modes = [m.training for m in ours.modules()]
    first_difference(ours, theirs, names, x)
    with pytest.raises(RuntimeError):
        first_difference(ours, theirs, names, x[:, :2])
    assert [m.training for m in ours.modules()] == modes
    assert not any(m._forward_hooks for model in (ours, theirs) for m in model.modules())


def test_layers_that_run_twice_and_shapes_and_nan():
    class Twice(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.layer, self.second = nn.Identity(), second

        def forward(self, x):
            return self.layer(self.second(self.layer(x)))

    ours, x = Twice(lambda x: x + 1), torch.zeros(3)
    found = first_difference(ours, Twice(lambda x: x + 2), {"layer": "layer"}, x)
    assert (found.run, found.error) == (1, 1)
    shapes = first_difference(ours, Twice(lambda x: x[:2]), {"layer": "layer"}, x)
    assert (shapes.run, shapes.error) == (1, float("inf"))
    nan = first_difference(ours, Twice(lambda x: x / 0), {"layer": "layer"}, x)
    assert np.isnan(nan.error)


def test_what_is_added_in_place_later_does_not_count():
    class InPlace(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.layer, self.by = nn.Linear(2, 2), by

        def forward(self, x):
            return self.layer(x).add_(self.by)

    ours, theirs = InPlace(0), InPlace(1)
    theirs.load_state_dict(ours.state_dict())
    names = {"layer": "layer", "": ""}
    assert first_difference(ours, theirs, names, torch.ones(1, 2)).names == ("", "")


def test_hugging_face_models():
    transformers = pytest.importorskip("transformers")
    size = dict(vocab_size=16, n_embd=8, n_layer=3, n_head=2, n_positions=8)
    ours = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))  # in training mode
    theirs = copy.deepcopy(ours)
    blocks = [f"transformer.h.{i}{part}" for i in range(3) for part in (".attn", ".mlp", "")]
    names = {name: name for name in [*blocks, "transformer", ""]}
    ids = torch.arange(6)[None]
    mask = torch.ones_like(ids)
    assert first_difference(ours, theirs, names, ids, attention_mask=mask) is None
    theirs.transformer.h[1].attn.c_proj.bias.data += 0.1
    found = first_difference(ours, theirs, names, ids, attention_mask=mask)
    assert found.names[0] == "transformer.h.1.attn" and found.a.shape == (1, 6, 8)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"1.O": "1"}, "model_a has no module '1.O'; did you mean 1."),
        ({"1": "head"}, "model_b has no module 'head'"),
        ({"1": "spare"}, "'1' and 'spare' run 1 and 0 times"),
    ],
)
def test_bad_names(names, message):
    ours, theirs, _, x = pair()
    theirs.spare = nn.Identity()
    theirs.forward = lambda x: theirs[2](theirs[1](theirs[0](x)))
    with pytest.raises(ValueError, match=message):
        first_difference(ours, theirs, names, x)
