"""Exported functions follow the device and the dtype of their inputs.

Each call below runs with its modules and tensors on a second device: the stand-in of elsewhere.py,
`meta` where no value decides what happens next, and the accelerator where there is one. `fit` and
the modules that are put into a model are tested further down.
"""

import pytest
import torch
from elsewhere import HERE, DevicesMixed, Elsewhere, travelling
from torch import nn
from torch.utils._pytree import tree_iter

from tfbench.adaptation import class_incremental as cil
from tfbench.analysis import filter_db
from tfbench.architectures import compact_transformers as compact
from tfbench.architectures import rmsnorm
from tfbench.compression import gptq, quantizable
from tfbench.icl import baselines, curves, internals, learners
from tfbench.interp.capture import capture
from tfbench.nn import adapters, attention, quantization, transformer
from tfbench.pretraining import gmml
from tfbench.surveys import faster_atlas
from tfbench.train import vision
from tfbench.train.ensemble import Ensemble
from tfbench.train.loop import TrainConfig, fit

G = torch.Generator().manual_seed(0)
X = torch.randn(4, 12, 3, generator=G)  # prompts B K X
Y = (X[..., 0] > 0).float()
Q = torch.randn(2, 2, 40, 8, generator=G)  # B H T K
H = torch.randn(2, 40, 16, generator=G)  # B T D
WORDS = torch.randint(11, (2, 10), generator=G)
PICTURES = torch.rand(4, 3, 16, 16, generator=G)
HIDDEN = torch.rand(4, 1, 16, 16, generator=G) < 0.3
CLASSES = torch.tensor([0, 1, 0, 1])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def decoder(layers=1, vocab=11, **more):
    config = transformer.TransformerConfig(16, layers, 2, vocab=vocab, max_len=40, **more)
    return transformer.Transformer(config).eval()


def vit():
    return transformer.ViT(16, 4, 3, 2, transformer.TransformerConfig(16, 1, 2)).eval()


def variant(name, causal):
    return lambda: (faster_atlas.attention(name, 2, 8, 40).eval(), Q, Q, Q, None, causal)


def baseline(made):
    return lambda: (lambda x, y: made.predict(x, y), X, Y)


def on_pictures(function, *more, **named):
    return lambda: (lambda x: function(x, *more, **named), PICTURES)


CALLS = {  # name: () -> (function or module, *inputs)
    "attention.rotate_both": lambda: (lambda q: attention.rotate_both(q, q, 1e4), Q),
    "attention.scaled_dot_product": lambda: (
        lambda q: attention.scaled_dot_product(q, q, q, causal=True, need_weights=True),
        Q,
    ),
    "attention.MultiHeadAttention": lambda: (attention.MultiHeadAttention(16, 2), H),
    "transformer.ViT": lambda: (vit(), PICTURES),
    "transformer.generate": lambda: (
        lambda m, ids: transformer.generate(m, ids, 3, 1.0, seeded()),
        decoder(),
        WORDS,
    ),
    "adapters.add_adapters": lambda: (adapters.add_adapters(vit()), PICTURES),
    "adapters.add_ssf": lambda: (adapters.add_ssf(vit()), PICTURES),
    "adapters.add_prompts": lambda: (adapters.add_prompts(vit(), deep=True), PICTURES),
    "quantization.quantize_w8a8": lambda: (
        lambda m, x: quantization.quantize_w8a8(m, [x])(x),
        vit(),
        PICTURES,
    ),
    "vision.random_resized_crop": on_pictures(vision.random_resized_crop, 8, generator=G),
    "vision.light_augment": on_pictures(vision.light_augment, generator=G),
    "vision.mean_fill": lambda: (vision.mean_fill, PICTURES, HIDDEN),
    "vision.harmonic_fill": lambda: (vision.harmonic_fill, PICTURES, HIDDEN),
    "vision.mask_depth": lambda: (vision.mask_depth, HIDDEN),
    "vision.features": lambda: (vision.features, vit(), PICTURES),
    "vision.knn_accuracy": lambda: (
        lambda h, y: vision.knn_accuracy(h, y, h, y, 2),
        H[0, :4],
        CLASSES,
    ),
    "vision.few_shot": lambda: (lambda y: vision.few_shot(y, 1), CLASSES),
    "Ensemble": lambda: (Ensemble(decoder, (0, 1)).eval(), torch.stack((WORDS, WORDS))),
    "baselines.OLS": baseline(baselines.OLS()),
    "baselines.Ridge": baseline(baselines.Ridge()),
    "baselines.Lasso": baseline(baselines.Lasso(0.1)),
    "baselines.KNN": baseline(baselines.KNN(3)),
    "baselines.Averaging": baseline(baselines.Averaging()),
    "baselines.GD": baseline(baselines.GD(3)),
    "baselines.SGD": baseline(baselines.SGD()),
    "baselines.NewtonSchulz": baseline(baselines.NewtonSchulz(3)),
    "baselines.GP": baseline(baselines.GP(baselines.rbf(), noise=0.1)),
    "baselines.NearestCentroid": baseline(baselines.NearestCentroid()),
    "baselines.MajorityLabel": baseline(baselines.MajorityLabel()),
    "baselines.Logistic": baseline(baselines.Logistic()),
    "learners.outputs": lambda: (
        lambda m, x, y: m.outputs(x, y),
        learners.SequenceLearner(decoder(vocab=None), "interleaved", 3, width=16),
        X,
        Y,
    ),
    "curves.sensitivity": lambda: (
        lambda m, x, y: curves.sensitivity(m, x, y, [3, 5]),
        learners.SequenceLearner(decoder(vocab=None), "interleaved", 3, width=16),
        X,
        Y,
    ),
    "internals.fit_probe": lambda: (
        lambda h, y: internals.fit_probe(h, y).r2,
        X.flatten(0, 1),
        Y.flatten(),
    ),
    "internals.code_length": lambda: (
        lambda h, y: internals.code_length(h, y),
        X.flatten(0, 1),
        Y.flatten(),
    ),
    "capture": lambda: (
        lambda m, ids: capture(m, ids).patterns,
        decoder(),
        WORDS,
    ),
    "compact.cct_2_3x2": lambda: (compact.cct_2_3x2(16).eval(), PICTURES),
    "compact.random_shift": on_pictures(compact.random_shift, 2, G),
    "compact.resize_positions": lambda: (lambda p: compact.resize_positions(p, 25), H[:1, :16]),
    "rmsnorm.convert": lambda: (
        lambda m, ids: rmsnorm.convert(m, "crms")(ids),
        decoder(tie=False),
        WORDS,
    ),
    "rmsnorm.widen": lambda: (
        lambda m, ids: rmsnorm.widen(rmsnorm.convert(m))(ids),
        decoder(tie=False),
        WORDS,
    ),
    "gptq.quantize_model": lambda: (
        lambda m, ids: (gptq.quantize_model(m, [ids], gptq.WeightGrid(4), pack=True), m(ids))[1],
        decoder(tie=False, layers=2),
        WORDS,
    ),
    "gptq.obq_reference": lambda: (
        lambda w: gptq.obq_reference(w, w.T @ w, gptq.WeightGrid(4)),
        H[0, :, :6],
    ),
    "quantizable.refit": lambda: (
        lambda m, ids: quantizable.refit(m)(ids),
        decoder(),
        WORDS,
    ),
    "filter_db.fit_basis": lambda: (
        lambda x: filter_db.coefficients(x, filter_db.fit_basis(x)),
        H[0, :, :9],
    ),
    "filter_db.sparsity": lambda: (filter_db.sparsity, PICTURES[:, :, :3, :3]),
    "filter_db.orthogonality": lambda: (filter_db.orthogonality, PICTURES[:, :, :3, :3]),
    "class_incremental.CosineHead": lambda: (cil.CosineHead(16, 3), H),
    "class_incremental.embed": lambda: (cil.embed, vit(), PICTURES),
    "class_incremental.SimpleCIL": lambda: (
        lambda m, x, y: _learned(cil.SimpleCIL(m), x, y).predict(x),
        vit(),
        PICTURES,
        CLASSES,
    ),
    "class_incremental.herding": lambda: (lambda z: cil.herding(z, 2), H[0, :6]),
    "gmml.GMMLCorruption": lambda: (
        lambda x: tuple(gmml.GMMLCorruption(drop_types=("noise", "zeros", "shuffle"))(x, seeded())),
        PICTURES,
    ),
    **{
        f"atlas.{name}": variant(name, made.causality == "only")
        for name, made in faster_atlas.ATTENTIONS.items()
    },
    "atlas.full, causal": variant("full", True),
    "atlas.fused, causal": variant("fused", True),
    "atlas.bigbird, causal": variant("bigbird", True),
    "atlas.lsh, causal": variant("lsh", True),
    "atlas.EarlyExitEncoder": lambda: (
        faster_atlas.EarlyExitEncoder([nn.Identity()] * 2, [_Pooled(), _Pooled()]),
        H,
        0.69,
    ),
    "atlas.ACT": lambda: (faster_atlas.ACT(nn.Linear(16, 16), 16, 3), H),
}
READ = (  # a value decides what comes next, so that meta cannot follow
    "quantization.quantize_w8a8",  # refuses weights that are not there
    "vision.mask_depth",
    "vision.harmonic_fill",
    "vision.knn_accuracy",
    "vision.few_shot",
    "baselines.",
    "learners.",
    "curves.",
    "internals.",
    "capture",
    "rmsnorm.",
    "gptq.",
    "filter_db.",
    "class_incremental.SimpleCIL",
    "class_incremental.herding",
    "atlas.fused",
    "atlas.EarlyExitEncoder",
)


class _Pooled(nn.Linear):
    def __init__(self):
        super().__init__(16, 2)

    def forward(self, h):
        return super().forward(h.mean(1))


def _learned(method, x, y):
    method.learn((x, y))
    return method


def placed(name, place):
    "The function and its inputs, with `place(nest)` applied to modules and tensors."
    torch.manual_seed(0)
    function, *inputs = CALLS[name]()
    parts = [place(p) if isinstance(p, (nn.Module, torch.Tensor)) else p for p in inputs]
    return (place(function) if isinstance(function, nn.Module) else function), parts


def tensors(out):
    return [t for t in tree_iter(out) if torch.is_tensor(t)]


@pytest.mark.parametrize("name", CALLS)
def test_on_the_stand_in(name):
    where = Elsewhere()

    def place(part):
        return where.put(part if isinstance(part, nn.Module) else part.clone())

    function, inputs = placed(name, place)
    with where:
        out = function(*inputs)
    assert all(where.of(t) != HERE for t in tensors(out)), "the output follows the inputs"


@pytest.mark.parametrize("name", [n for n in CALLS if not n.startswith(READ)])
def test_on_meta(name):
    function, inputs = placed(name, lambda part: part.to("meta"))
    assert all(t.device.type == "meta" for t in tensors(function(*inputs)))


ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)


@pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")
@pytest.mark.parametrize("name", CALLS)
def test_on_an_accelerator(name):
    function, inputs = placed(name, lambda part: part.to(ACCELERATOR))
    assert all(t.device.type == ACCELERATOR.type for t in tensors(function(*inputs)))


OWN = {"capture", "filter_db.fit_basis", "gptq.obq_reference"}  # have a precision of their own


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(CALLS.keys() - OWN))
def test_in_another_precision(name, dtype):
    def place(part):
        return part.to(dtype) if isinstance(part, nn.Module) or part.is_floating_point() else part

    function, inputs = placed(name, place)
    out = [t for t in tensors(function(*inputs)) if t.is_floating_point()]
    assert {t.dtype for t in out} <= {dtype}


def points(step):
    return (torch.randn(8, 2, generator=seeded(step)),)


def test_the_stand_in_sees_what_a_device_would():
    away, config = travelling(fit), TrainConfig(steps=3)
    kept, data = [], torch.randn(64, 2)

    def good(model, batch):
        return model(batch[0]).square().mean()

    def mixes(model, batch):
        return (model(batch[0]) + torch.ones(8, 1)).mean()

    def leaks(model, batch):
        kept.append(model(batch[0]).detach())
        return good(model, batch)

    def stays(model):
        return {"mean": model(data).mean()}

    def follows(model):
        return {"mean": model(data.to(model.weight.device)).mean()}

    straight, travelled = nn.Linear(2, 1), nn.Linear(2, 1)
    travelled.load_state_dict(straight.state_dict())
    losses = fit(straight, points, good, config).losses
    assert away(travelled, points, good, config, follows).losses == losses
    for loss, evaluate in ((mixes, None), (leaks, None), (good, stays)):
        with pytest.raises(DevicesMixed):
            away(nn.Linear(2, 1), points, loss, config, evaluate)


@pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")
def test_fit_on_an_accelerator(tmp_path):
    "There and back, and a checkpoint of one device continues on the other."

    def loss(model, batch):
        assert batch[0].device.type == model.weight.device.type
        return model(batch[0]).square().mean()

    path = str(tmp_path / "there.safetensors")
    model, config = nn.Linear(2, 1), TrainConfig(steps=6, ema=0.9, checkpoint=path)
    history = fit(model, points, loss, config, device=ACCELERATOR)
    assert {t.device.type for t in (model.weight, *history.ema_model.parameters())} == {"cpu"}
    again = fit(nn.Linear(2, 1), points, loss, config, device="cpu")
    assert again.started == 6 and again.losses == history.losses
    own = nn.Linear(2, 1, device=ACCELERATOR)
    fit(own, points, loss, TrainConfig(steps=1))
    assert own.weight.device.type == ACCELERATOR.type, "a model on an accelerator stays there"


def gpt2():
    import transformers

    sizes = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


@pytest.mark.parametrize("target", ["rms", "crms"])
def test_a_converted_model_in_eval_mode_does_not_drop(target):
    model, ids = gpt2(), torch.arange(3, 11)[None]
    if target == "crms":
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
    changed = rmsnorm.convert(model, target)
    assert not any(m.training for m in changed.modules())
    torch.testing.assert_close(changed(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(changed(ids).logits, changed(ids).logits)


INSERTS = {
    "adapters": adapters.add_adapters,
    "ssf": adapters.add_ssf,
    "prompts": lambda m: adapters.add_prompts(m, deep=True),
    "w8a8": lambda m: quantization.quantize_w8a8(m, [PICTURES.to(m.class_token)]),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", INSERTS)
def test_a_module_that_is_put_in_takes_over_mode_and_dtype(name, training):
    model = vit().to(torch.bfloat16).train(training)
    changed = INSERTS[name](model)
    mode = training and name != "w8a8"  # a rounded copy is for use
    assert {m.training for m in changed.modules()} == {mode}
    assert {p.dtype for p in changed.parameters()} == {torch.bfloat16}


def test_packed_layers_and_gates_take_over_the_mode():
    model = decoder(layers=2, tie=False)
    gptq.quantize_model(model, [WORDS], gptq.WeightGrid(4), pack=True)
    assert not any(m.training for m in model.modules())
    assert not any(m.training for m in quantizable.refit(decoder()).modules())
