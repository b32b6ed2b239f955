"""What once gave wrong numbers or no message in `nn.convert`, `nn.adapters` and `interp`: each
right value with the input by which it was found, and with a sibling.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torch.utils.checkpoint import checkpoint

from tfbench.architectures import rmsnorm
from tfbench.interp import views
from tfbench.interp.capture import (
    Ablate,
    AttentionRecord,
    Patch,
    Scale,
    ablation_table,
    capture,
    capture_gradients,
    edit_attention,
    from_hf,
    load_record,
    save_record,
    to_bertviz,
)
from tfbench.interp.explorer import AttentionExplorer
from tfbench.interp.measures import (
    effective_attention,
    head_metrics,
    layer_maps,
    resting_places,
)
from tfbench.nn import adapters, attention, quantization
from tfbench.nn.convert import from_hugging_face
from tfbench.nn.transformer import Transformer, TransformerConfig, ViT

hf.logging.set_verbosity_error()
CAPTURE = sys.modules[capture.__module__]  # its name in the room is the function's
SIZES = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
IDS = torch.arange(3, 11)[None]


def gpt2(kind=hf.GPT2LMHeadModel, wide=0.0, **more):
    torch.manual_seed(0)
    model = kind(hf.GPT2Config(**SIZES, **more)).eval()
    for p in model.parameters():
        p.data += wide * torch.randn_like(p)
    return model


def bert(kind=hf.BertModel, **more):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    return kind(hf.BertConfig(vocab_size=64, max_position_embeddings=32, **sizes, **more)).eval()


# B6: what is put into a model takes over mode, device and dtype


@pytest.mark.parametrize("target", ["rms", "crms"])
def test_a_converted_model_answers_twice_alike(target):
    model = gpt2() if target == "rms" else gpt2(resid_pdrop=0, embd_pdrop=0)
    converted = rmsnorm.convert(model, target)
    with torch.no_grad():
        first, second = (converted(IDS).logits for _ in "ab")
        assert torch.equal(first, second)
        torch.testing.assert_close(first, model(IDS).logits)
    assert not any(m.training for m in converted.modules())


def test_ours_takes_over_mode_and_precision():
    ours = from_hugging_face(gpt2().to(torch.bfloat16).train())
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert all(m.training for m in ours.modules())


def test_what_was_frozen_stays_frozen():
    config = TransformerConfig(16, 1, 2)
    model = adapters.add_ssf(adapters.freeze(ViT(8, 4, 1, 3, config)).eval())
    assert adapters.trainable(model)[0] > 0
    assert adapters.trainable(adapters.merge_ssf(model))[0] == 0
    images = torch.randn(4, 1, 8, 8)
    frozen = adapters.freeze(ViT(8, 4, 1, 3, config)).eval()
    rounded = quantization.quantize_w8a8(frozen, [images])
    assert adapters.trainable(rounded)[0] == 0


# B7: what repeats or cuts a batch takes everything that belongs to it


def logit(output):
    return output.logits[0, -1, 5].item()


def one_by_one(model, metric, *inputs, **named):
    found = []
    for layer in range(2):
        for head in range(4):
            with torch.no_grad(), edit_attention(model, Ablate(layer, [head])):
                found.append(metric(model(*inputs, **named)))
    return found


def test_ablation_with_keyword_tensors():
    model = gpt2()
    plain = ablation_table(model, logit, IDS)
    masked = ablation_table(model, logit, IDS, attention_mask=torch.ones_like(IDS))
    named = ablation_table(model, logit, input_ids=IDS)
    assert plain.metric.tolist() == pytest.approx(one_by_one(model, logit, IDS), abs=1e-6)
    assert masked.metric.tolist() == pytest.approx(plain.metric.tolist(), abs=1e-6)
    assert named.metric.tolist() == pytest.approx(plain.metric.tolist(), abs=1e-6)


def test_ablation_with_padding_labels_and_a_square_mask():
    model, two = gpt2(), IDS.repeat(2, 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    named = dict(input_ids=two, attention_mask=mask, labels=two)
    table = ablation_table(model, lambda o: o.loss, **named)
    assert table.metric.tolist() == pytest.approx(
        one_by_one(model, lambda o: o.loss.item(), **named), abs=1e-6
    )
    ours, length = Transformer(TransformerConfig(16, 1, 2, vocab=64, max_len=8)).eval(), 8
    square = torch.ones(1, 1, length, length, dtype=torch.bool)
    ids = IDS.expand(length, -1)  # as many items as positions
    found = [
        ablation_table(ours, lambda o: o[0, -1, 5], ids, **more).metric.tolist()
        for more in ({}, {"mask": square})
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


# B10: padding does not count


@pytest.fixture(params=["sdpa", "eager"])
def padded(request):
    "A prompt with three pads before it: the model, its mask, and the ids with two kinds of pads."
    model = gpt2(wide=0.05)
    model.set_attn_implementation(request.param)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    others = IDS.masked_fill(mask == 0, 60)
    return model, mask, (IDS, others)


def test_loss_of_a_padded_prompt(padded):
    model, mask, both = padded
    found = []
    for ids in both:
        for given in ((ids,), ()):
            named = {"attention_mask": mask} if given else dict(input_ids=ids, attention_mask=mask)
            explorer = AttentionExplorer(model, *given, **named)
            heads = [[0, 1]] if model.config._attn_implementation == "sdpa" else []
            meta, _ = explorer.answer({"kind": "ablate", "heads": heads})
            found.append(meta["baseline"] + (meta["ablated"] or []))
    with torch.no_grad():
        logits = model(IDS, attention_mask=mask).logits
    right = F.cross_entropy(logits[0, 3:-1], IDS[0, 4:]).item()
    assert [f[0] for f in found] == pytest.approx([right] * 4, abs=1e-6)
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-6)


def test_measures_of_a_padded_prompt(padded):
    model, mask, both = padded
    wanted = dict(keep=("pattern", "v"), dtype=torch.float32, attention_mask=mask)
    records = [capture(model, ids, **wanted) for ids in both]
    assert [resting_places(r) for r in records] == [[3], [3]]
    live = records[0].visible(0)[0, 0].any(-1)
    assert live.tolist() == [False] * 3 + [True] * 5
    short = replaced(records[0], slice(3, None))
    for options in ({}, {"ids": IDS[:, :1].expand(1, 8)}):
        tables = [head_metrics(r, **options) for r in records]
        assert tables[0].drop(columns="layer").equals(tables[1].drop(columns="layer"))
    assert head_metrics(records[0]).entropy.tolist() == pytest.approx(
        head_metrics(short).entropy.tolist(), abs=1e-6
    )
    long, alone = (layer_maps(r, discard=0.5)[0] for r in (records[0], short))
    torch.testing.assert_close(long[:, 3:, 3:], alone)


@torch.no_grad()
def test_padding_of_one_item_is_not_that_of_another(padded):
    model, mask, (ids, _) = padded
    two = dict(input_ids=torch.cat([ids, ids + 20]), attention_mask=torch.cat([mask, mask | 1]))
    both = capture(model, dtype=torch.float32, **two)
    for item in (0, 1):
        alone = {name: t[item : item + 1] for name, t in two.items()}
        record = capture(model, dtype=torch.float32, **alone)
        for discard in (0.0, 0.5):
            maps = zip(layer_maps(both, discard=discard), layer_maps(record, discard=discard))
            for a, b in maps:
                torch.testing.assert_close(a[item : item + 1], b, atol=1e-6, rtol=1e-5)
        table = head_metrics(both, each=True)
        own = table[table["item"] == item].select_dtypes(float).to_numpy()
        right = head_metrics(record, each=True).select_dtypes(float).to_numpy()
        torch.testing.assert_close(*map(torch.tensor, (own, right)), equal_nan=True)
    assert resting_places(both) == [0, 3]


def test_hidden_values_do_not_matter():
    ids = torch.arange(20)[None]  # more positions than a head is wide
    record = capture(
        gpt2(), ids, keep=("pattern", "v"), attention_mask=(ids > 3).long(), dtype=torch.float32
    )
    plain = effective_attention(record).layer(0)
    for kept in record.kept.values():
        kept["v"][:, :, :4] = torch.randn_like(kept["v"][:, :, :4])
    torch.testing.assert_close(effective_attention(record).layer(0), plain)
    assert plain[..., :4].abs().max() < 1e-6


def replaced(record, part):
    "The record of some positions alone."
    patterns = {n: p[..., part, part] for n, p in record.patterns.items()}
    masks = {n: m[..., part, part] for n, m in record.masks.items()}
    return AttentionRecord(patterns, masks=masks)


# B11: weights and settings that convert does not know


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: gpt2(hf.GPT2DoubleHeadsModel), "multiple_choice_head"),
        (lambda: gpt2(add_cross_attention=True), "crossattention"),
        (lambda: gpt2(hf.GPT2ForSequenceClassification), "score"),
        (lambda: gpt2(scale_attn_weights=False), "scale_attn_weights"),
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
        (lambda: bert(hf.BertForMaskedLM), "cls"),
        (lambda: bert(is_decoder=True), "is_decoder"),
        (lambda: hf.ViTModel(hf.ViTConfig(image_size=8, patch_size=4, **VIT)), "classifier.weight"),
        (lambda: hf.T5EncoderModel(hf.T5Config(**T5)), "lm_head.weight"),
        (lambda: llama(attention_bias=True), "attention_bias"),
        (lambda: llama(mlp_bias=True), "mlp_bias"),
        (lambda: llama(head_dim=16), "head_dim = 16"),
    ],
)
def test_what_has_no_place_in_ours_is_refused(make, says):
    with pytest.raises(ValueError, match=f"model: .*{says}"):
        from_hugging_face(make())


VIT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
T5 = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def llama(**more):
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, intermediate_size=64, **more))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_head_of_its_own_is_not_the_embedding(make, tied):
    model = make(tie_word_embeddings=tied).eval()
    with torch.no_grad():
        torch.testing.assert_close(from_hugging_face(model)(IDS), model(IDS).logits)


def test_a_model_without_head_is_still_converted():
    model = gpt2(hf.GPT2Model)
    with torch.no_grad():
        theirs = model(IDS).last_hidden_state
        torch.testing.assert_close(from_hugging_face(model)(IDS), theirs, atol=1e-5, rtol=1e-5)


NO_DROPOUT = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


@pytest.mark.parametrize("target", ["rms", "crms"])
@pytest.mark.parametrize(
    "kind, more, given",
    [
        (hf.GPT2DoubleHeadsModel, {}, dict(input_ids=IDS[None], mc_token_ids=torch.tensor([[7]]))),
        (
            hf.GPT2LMHeadModel,
            dict(add_cross_attention=True),
            dict(input_ids=IDS, encoder_hidden_states=torch.randn(1, 5, 32)),
        ),
        (hf.GPT2LMHeadModel, {}, dict(inputs_embeds=torch.randn(1, 8, 32))),
    ],
    ids=["two heads", "cross-attention", "vectors"],
)
@torch.no_grad()
def test_every_reader_of_the_stream_is_converted(kind, more, given, target):
    model = gpt2(kind, wide=0.1, **NO_DROPOUT, **more)
    there, here = model(**given), rmsnorm.convert(model, target)(**given)
    for name in ("logits", "mc_logits"):
        if name in there:
            torch.testing.assert_close(here[name], there[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrap", [dict, hf.BatchEncoding])
def test_equivalence_of_what_a_tokenizer_gives(wrap):
    model = gpt2(wide=0.1)
    given = wrap({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    gap = rmsnorm.check_equivalence(model, rmsnorm.convert(model), given)
    assert gap == rmsnorm.check_equivalence(model, rmsnorm.convert(model), IDS)
    assert gap["max_abs"] < 1e-6
    other = gpt2(wide=0.2)
    assert rmsnorm.check_equivalence(model, other, given)["max_abs"] > 0.1


@pytest.mark.parametrize("name", ["d_model", "layers", "heads", "d_ff", "kv_heads"])
def test_a_zero_is_no_default(name):
    sizes = dict(d_model=8, layers=1, heads=2, d_ff=8, kv_heads=1)
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more, got 0"):
        TransformerConfig(**sizes | {name: 0})


# B15: an ablation that is none


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_a_batch_of_one_has_no_mean(how):
    model = gpt2()
    with pytest.raises(ValueError, match="how: .*batch"):
        ablation_table(model, logit, IDS, how=how)
    table = ablation_table(model, logit, torch.cat((IDS, IDS + 20)), how=how)
    assert table.change.abs().min() > 0


def test_a_layer_is_not_counted_from_the_end():
    model = gpt2()
    with pytest.raises(ValueError, match="from 0 on, got -1"), edit_attention(model, Ablate(-1)):
        model(IDS)
    with pytest.raises(ValueError, match="from 0 on, got -1"):
        capture(model, IDS, layers=[-1])


def test_a_patch_of_another_batch_is_refused():
    model, z = gpt2(), torch.zeros(3, 4, 8, 8)
    with pytest.raises(ValueError, match="z: expected shape"), edit_attention(model, Patch(0, z=z)):
        model(IDS.repeat(2, 1))


# C27: convert in half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convert_in_half_precision(dtype):
    model = gpt2().to(dtype)
    for converted in (rmsnorm.convert(model), from_hugging_face(model)):
        assert {p.dtype for p in converted.parameters()} == {dtype}
        with torch.no_grad():
            found, right = converted(IDS), model(IDS).logits
        found = getattr(found, "logits", found)
        assert (found - right).abs().max() < 0.05 * right.abs().max() + 0.01


# C28: gradient checkpointing


class Checkpointed(nn.Module):
    "A block of somebody's own that is run a second time for the gradients."

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        def part(x):
            return self.attention(x, x, x, need_weights=False)[0]

        return checkpoint(part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(reentrant):
    model = gpt2(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0).train()

    def gradients():
        record = capture_gradients(model, lambda o: o.logits.exp().mean(), IDS)
        return [k["gradient"] for k in record.kept.values()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for a, b in zip(plain, gradients(), strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)
    assert model.is_gradient_checkpointing


def test_an_edit_stays_under_checkpointing():
    model = gpt2(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0).train()

    def slope():
        model.zero_grad()
        with edit_attention(model, Scale(0, [1], 3.0)):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        return model.transformer.wte.weight.grad.clone()

    plain = slope()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(slope(), plain)


@pytest.mark.parametrize("reentrant, says", [(False, "checkpointing"), (True, "reentrant")])
def test_checkpoints_of_ones_own_are_refused_in_words(reentrant, says):
    x = torch.randn(1, 5, 16, requires_grad=True)
    with pytest.raises(ValueError, match=f"model: .*{says}"):
        capture_gradients(Checkpointed(reentrant), lambda out: out.exp().sum(), x)


# C29: attention sinks


def with_sinks(kind, config, **more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    experts = dict(num_local_experts=2, num_experts_per_tok=1)
    return kind(config(**sizes, **heads, **experts, pad_token_id=0, **more)).eval()


@pytest.mark.parametrize("name", ["GptOss", "OpenAIPrivacyFilter"])
def test_sinks_are_no_positions(name):
    model = with_sinks(getattr(hf, f"{name}Model"), getattr(hf, f"{name}Config"))
    record = capture(model, IDS, tokens=list("abcdefgh"), dtype=torch.float32)
    theirs = model(IDS, output_attentions=True).attentions
    assert record.layer(0).shape == (1, 4, 8, 8)
    for a, b in zip(record.patterns.values(), theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert record.layer(0).sum(-1).max() < 1, "the rest went to the sink"
    assert "sink" in record.note
    assert "blocks of 2" in (note := capture(model, IDS, max_bytes=400).note) and "sink" in note
    slopes = capture_gradients(model, lambda o: o.last_hidden_state.exp().sum(), IDS)
    assert slopes.kept[slopes.layers[0]]["gradient"].abs().max() > 0
    assert views.head(record) is not None


# C30: what capture cannot see is refused at its first use


def longformer(**more):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    config = hf.LongformerConfig(
        **sizes, vocab_size=64, attention_window=4, max_position_embeddings=64, **more
    )
    return hf.LongformerModel(config).eval()


@pytest.mark.parametrize("length", [12, 4])  # 4 tokens and 4 heads cannot be told by their number
@pytest.mark.parametrize("use", [capture, lambda m, x: capture_gradients(m, None, x)])
def test_patterns_of_another_layout_are_refused(length, use, monkeypatch):
    monkeypatch.setattr(CAPTURE, "_FITS", set())
    with pytest.raises(ValueError, match="model: LongformerModel has in .* heads of"):
        use(longformer(), torch.arange(3, 3 + length)[None])


def test_heads_folded_into_the_batch_are_unfolded():
    sizes = dict(d_model=32, ffn_dim=32, num_layers=2, attention_heads=4, vocab_size=64)
    torch.manual_seed(0)
    model, ids = hf.XGLMModel(hf.XGLMConfig(**sizes)).eval(), IDS.repeat(2, 1)
    record = capture(model, ids, dtype=torch.float32)
    theirs = model(ids, output_attentions=True).attentions
    for a, b in zip(record.patterns.values(), theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_scores_in_blocks_are_refused():
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    model = hf.LongT5EncoderModel(hf.LongT5Config(**sizes)).eval()
    with pytest.raises(ValueError, match="LocalSelfAttention scores of 5 axes"):
        capture(model, IDS)


def test_a_pattern_that_is_not_the_models_is_refused(monkeypatch):
    monkeypatch.setattr(CAPTURE, "_FITS", set())
    right = attention.attention_weights

    def flat(q, k, mask=None, scale=None):
        return right(q, k, mask, 0.5 * q.shape[-1] ** -0.5)

    monkeypatch.setattr(CAPTURE, "attention_weights", flat)
    for model, x in ((gpt2(wide=0.3), IDS), (nn.MultiheadAttention(16, 2), None)):
        inputs = (x,) if x is not None else 3 * (torch.randn(5, 1, 16),)
        with pytest.raises(ValueError, match="says something else by"):
            capture(model, *inputs)


def test_the_check_is_made_once_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr(CAPTURE, "_FITS", set())
    model = gpt2().train()
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    cache = hf.DynamicCache(config=model.config)
    capture(model, IDS, past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == IDS.shape[1], "the model's own pass alone went in"
    assert len(runs) == 3 and model.training
    states = []
    for run in (model, lambda x: capture(model, x)):
        CAPTURE._FITS.clear()
        torch.manual_seed(1)
        run(IDS)
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "dropout draws the same numbers afterwards"
    runs.clear()
    capture(model, IDS[:, :5])
    assert len(runs) == 1


class Pooled(nn.Module):
    "Queries or keys that are not the tokens of the input."

    def __init__(self, how):
        super().__init__()
        self.how, self.embedding = how, nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.learned = nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, ids):
        x = self.embedding(ids)
        learned = self.learned.expand(len(ids), -1, -1)
        if self.how == "prefix":
            keys = torch.cat((learned, x), 1)
            return self.attention(x, keys, keys)[0]
        return self.attention(learned[:, : 1 if self.how == "one" else 4], x, x)[0]


@pytest.mark.parametrize("how, shape", [("pool", (4, 7)), ("one", (1, 7)), ("prefix", (7, 11))])
def test_queries_and_keys_need_not_be_the_tokens(how, shape):
    record = capture(Pooled(how), torch.randint(20, (2, 7)))
    assert record.layer(0).shape == (2, 2, *shape)


class FoldedAttention(nn.Module):
    "Heads in the batch: batch first, or heads first."

    num_heads = 2

    def __init__(self, order):
        super().__init__()
        self.order, self.map = order, nn.Linear(8, 16)

    def forward(self, x):
        q, k = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.map(x).chunk(2, -1))
        if self.order == "heads first":
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        self.pattern = (q.flatten(0, 1) @ k.flatten(0, 1).mT).softmax(-1)
        return self.pattern


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", ["heads first", "batch first"])
def test_the_order_of_folded_heads_is_looked_at(batch, order, monkeypatch):
    monkeypatch.setattr(CAPTURE, "_FITS", set())
    model = FoldedAttention(order)
    if order == "heads first" and batch > 1:
        with pytest.raises(ValueError, match="folds .* its heads into the batch in another order"):
            capture(model, torch.randn(batch, 5, 8))
        return
    record = capture(model, torch.randn(batch, 5, 8), dtype=torch.float32)
    torch.testing.assert_close(record.layer(0).flatten(0, 1), model.pattern)


def test_a_cache_with_gradients_is_not_copied(monkeypatch):
    monkeypatch.setattr(CAPTURE, "_FITS", set())
    model = gpt2()
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    record = capture(model, IDS[:, 4:], past_key_values=cache, use_cache=True)
    assert record.layer(0).shape == (1, 4, 4, 8) and cache.get_seq_length() == 8


class Drawing(Pooled):
    "It draws from a generator of its own, so that no two passes agree."

    def __init__(self):
        super().__init__("pool")
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, ids):
        return super().forward(ids) + torch.randn(1, generator=self.generator)


def test_a_model_that_never_repeats_itself_is_no_other_model():
    assert capture(Drawing(), torch.randint(20, (2, 7))).layer(0).shape == (2, 2, 4, 7)


@pytest.mark.parametrize("config", [{"n_heads": 9}, "small", object(), 3])
def test_a_configuration_of_another_kind_says_nothing(config):
    model = Pooled("pool")
    model.config = config
    assert capture(model, torch.randint(20, (2, 7))).layer(0).shape == (2, 2, 4, 7)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_picture_of_a_few_heads(most):
    explorer = AttentionExplorer(gpt2(), IDS)
    assert explorer.static(layers=most, heads=most) is not None
    with pytest.raises(ValueError, match="heads: expected 1 or more, got 0"):
        explorer.static(heads=0)


def test_vectors_in_the_place_of_tokens_have_no_loss():
    model = gpt2()
    given = dict(attention_mask=torch.ones_like(IDS), inputs_embeds=model.transformer.wte(IDS))
    assert list(AttentionExplorer(model, **given).trial.baseline) == ["output moved by"]


@pytest.mark.parametrize("frozen", ["weight", "bias", "neither"])
def test_a_merged_part_keeps_what_of_it_trains(frozen):
    model = ViT(8, 4, 3, 2, TransformerConfig(8, 1, 2))
    adapters.add_ssf(model)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith(frozen))
    trains = {n.split(".")[-1]: p.requires_grad for n, p in model.named_parameters()}
    merged = adapters.merge_ssf(model)
    for name, p in merged.named_parameters():
        if name.endswith(("weight", "bias")):
            assert p.requires_grad == trains[name.split(".")[-1]], name


# C35: labels that are no text


@pytest.mark.parametrize(
    "tokens",
    [list(range(8)), IDS[0], IDS[0].numpy(), list(IDS[0]), list(IDS[0].numpy()), tuple("abcdefgh")],
)
def test_labels_of_any_kind(tokens, tmp_path):
    record = capture(gpt2(), IDS, tokens=tokens, roles=["x", "y"] * 4)
    first, second = list(tokens)[:2]
    pooled = record.pool(2)
    assert pooled.tokens[0] == f"{int_or(first)} {int_or(second)}"
    save_record(record, tmp_path / "record.npz")
    assert load_record(tmp_path / "record.npz").tokens == record.tokens
    assert len(to_bertviz(record)["tokens"]) == 8
    assert len(head_metrics(record)) == 8
    assert views.head(pooled) is not None


def int_or(token):
    return token if isinstance(token, str) else int(token)


@pytest.mark.parametrize("block", [0, -2, 1.5, "2"])
def test_pool_says_what_a_block_is(block):
    with pytest.raises(ValueError, match="block: expected a whole number"):
        from_hf([torch.eye(4)[None, None]], tokens=list("abcd")).pool(block)


# D36: a picture of all heads can be read


def made(layers, heads, length, **more):
    "A record of so many heads that look at random."
    generator = torch.Generator().manual_seed(0)
    return AttentionRecord(
        {
            f"layers.{i}": torch.rand(1, heads, length, length, generator=generator)
            for i in range(layers)
        },
        **more,
    )


@pytest.mark.parametrize(
    "draw, shown",
    [
        (lambda: AttentionExplorer(made(6, 12, 95)).static(), (6, 8)),
        (lambda: AttentionExplorer(made(30, 9, 16)).static(), (6, 8)),
        (lambda: AttentionExplorer(made(1, 1, 9)).static(), (1, 1)),
        (lambda: views.grid(made(6, 12, 95)), (6, 12)),
        (lambda: views.grid(made(32, 32, 60)), (32, 32)),
        (lambda: views.grid(made(61, 128, 10)), (61, 128)),
    ],
)
def test_heads_are_squares_with_names_apart(draw, shown):
    figure = draw()
    FigureCanvasAgg(figure).draw()
    ax = figure.axes[0]
    rows, cols = shown
    box = ax.get_window_extent()
    assert box.width / cols == pytest.approx(box.height / rows, rel=0.02), "squares"
    for axis, side in ((ax.xaxis, "x"), (ax.yaxis, "y")):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        spans = sorted(getattr(b, f"interval{side}").tolist() for b in boxes)
        assert all(a[1] < b[0] for a, b in zip(spans, spans[1:])), "names overlap"
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        inside = text.get_window_extent()
        assert 0 <= inside.x0 and inside.x1 <= figure.bbox.width + 1, text.get_text()
    if max(shown) <= 12:
        assert box.width / cols > 40, "pixels for each head"


def test_layers_of_different_windows_share_a_sheet():
    record = made(1, 2, 4)
    record.patterns["wide"] = torch.rand(1, 3, 6, 9)
    sheet = views.grid(record).axes[0].images[0].get_array()
    assert sheet.shape == (14, 30)
