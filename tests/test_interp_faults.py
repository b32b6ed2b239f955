"What use has found in views of models: right values, and the siblings of each fault."

import pytest
import torch
import transformers as T

from tfbench.architectures.rmsnorm import convert
from tfbench.interp.capture import Ablate, ablation_table, edit_attention

IDS = torch.arange(3, 11)[None]


def gpt2(kind=T.GPT2LMHeadModel, **more):
    torch.manual_seed(0)
    usual = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return kind(T.GPT2Config(**usual, bos_token_id=0, eos_token_id=0, **more)).eval()


def logit(out) -> float:
    return out.logits[0, -1, 5].item()


def test_ablation_repeats_keyword_tensors():
    "A mask of ones is no mask, and ids may come by name."
    model, ones = gpt2(), torch.ones_like(IDS)
    plain = ablation_table(model, logit, IDS).metric.tolist()
    for named in (dict(attention_mask=ones), dict(position_ids=torch.arange(8)[None])):
        assert ablation_table(model, logit, IDS, **named).metric.tolist() == pytest.approx(plain)
        by_name = ablation_table(model, logit, input_ids=IDS, **named)
        assert by_name.metric.tolist() == pytest.approx(plain)


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
def test_ablation_of_padded_rows_is_an_edit_of_each_head(how):
    model, two = gpt2(), torch.cat((IDS, IDS + 20))
    mask = torch.ones_like(two)
    mask[0, :3] = 0
    table = ablation_table(model, logit, two, how=how, attention_mask=mask)
    for row in table.itertuples():
        with torch.no_grad(), edit_attention(model, Ablate(row.layer, [row.head], how)):
            assert row.metric == pytest.approx(logit(model(two, attention_mask=mask)), abs=1e-6)


@pytest.mark.parametrize("how", ["mean", "resample"])
def test_an_ablation_that_is_none_is_refused(how):
    with pytest.raises(ValueError, match="this batch has one"):
        ablation_table(gpt2(), logit, IDS, how=how)
    model = gpt2()
    with pytest.raises(ValueError, match="this batch has one"):
        with edit_attention(model, Ablate(0, [1], how)):
            model(IDS)


def test_a_converted_model_takes_over_mode_and_dtype():
    converted = convert(gpt2(), "rms")
    assert not converted.training and torch.equal(converted(IDS).logits, converted(IDS).logits)
    assert convert(gpt2().train(), "rms").training
    half = convert(gpt2().to(torch.bfloat16), "rms")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_other_readers_of_the_stream_are_converted():
    "A second head, and embeddings in the place of ids."
    model = gpt2(T.GPT2DoubleHeadsModel)
    told = dict(mc_token_ids=torch.tensor([[7]]))
    there, here = (m(IDS[None], **told).mc_logits for m in (model, convert(model, "rms")))
    assert torch.allclose(there, here, atol=1e-6)
    model = gpt2()
    embedded = model.transformer.wte(IDS)
    there, here = (m(inputs_embeds=embedded).logits for m in (model, convert(model, "rms")))
    assert torch.allclose(there, here, atol=1e-6)
