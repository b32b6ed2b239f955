"""What capture sees of every architecture of the installed transformers that builds from a small
configuration without a download; the table is nbs/interp/architectures.csv, and the notebook on
capture shows it.

`python tests/test_architectures.py` writes the table anew, for another version of transformers.
"""

import csv
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from tfbench.interp.capture import capture

TABLE = Path(__file__).parents[1] / "nbs/interp/architectures.csv"
LARGEST = 6_000_000  # weights
BASIC = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=32,
    vocab_size=64,
    max_position_embeddings=64,
    num_local_experts=2,
    num_experts=2,
    num_experts_per_tok=1,
    n_routed_experts=2,
    moe_intermediate_size=16,
    image_size=32,
    patch_size=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SIZES = (  # tried in this order
    BASIC | dict(num_key_value_heads=2, head_dim=8),
    BASIC | dict(num_key_value_heads=4, rotary_dim=8),
    BASIC | dict(num_key_value_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
)
OWN = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


def found() -> list:
    "Rows of the table: architecture, what came out, and by how much or why."
    hf.logging.set_verbosity(hf.logging.CRITICAL)
    names = [n for n in CONFIG_MAPPING if n in MODEL_MAPPING._model_mapping]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(name, *_of(name)) for name in sorted(names)]


def _of(name: str) -> tuple:
    why = ""
    for sizes in SIZES:
        model, said = _built(name, sizes)
        if model is None:
            why = why or said
            continue
        inputs = _inputs(model)
        if inputs is None:
            return "not tried", f"its input is {model.main_input_name}"
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:
            why = "does not run with small sizes and one input alone"
            continue
        return _captured(model, inputs)
    return "not tried", why


def _built(name: str, sizes: dict) -> tuple:  # (model or None, why not)
    try:
        config = CONFIG_MAPPING[name](**sizes)
        if config.sub_configs:
            return None, "its parts need configurations of their own"
        with torch.device("meta"):
            model = hf.AutoModel.from_config(config)
        if model.num_parameters() > LARGEST:
            return None, f"more than {LARGEST:,} weights with small sizes"
        torch.manual_seed(0)
        return hf.AutoModel.from_config(config).eval(), ""
    except ImportError:
        return None, "needs another package"
    except Exception:
        return None, "does not build from small sizes"


def _inputs(model) -> dict | None:
    kind = getattr(model, "main_input_name", "input_ids")
    if kind == "pixel_values":
        return {kind: torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    if kind != "input_ids":
        return None
    ids = torch.arange(3, 15)[None]
    decoder = getattr(model.config, "is_encoder_decoder", False)
    return {kind: ids} | ({"decoder_input_ids": ids[:, :7]} if decoder else {})


def _captured(model, inputs: dict) -> tuple:
    try:
        torch.manual_seed(0)  # ViT-MAE hides patches at random
        ours = list(capture(model, **inputs, dtype=torch.float32).patterns.values())
    except ValueError as error:
        return "refused", str(error).removeprefix("model: ").partition(";")[0]
    try:
        model.set_attn_implementation("eager")
        plain, out = _run(model, inputs), _run(model, inputs | {"output_attentions": True})
    except Exception:
        return "seen", "it does not show its own"
    if _gap(plain[0], out[0]) > 1e-3:
        return "seen", "asked for its own, it answers something else"
    theirs = [a for name in OWN for a in getattr(out, name, None) or () if torch.is_tensor(a)]
    gaps = [min((_gap(a, b) for b in ours), default=9.0) for a in theirs]
    if not gaps or max(gaps) == float("inf"):
        return "seen", "what it shows itself has other shapes" if gaps else "shows none itself"
    return "seen", f"{max(gaps):.0e}"


@torch.no_grad()
def _run(model, inputs: dict):
    torch.manual_seed(0)
    return model(**inputs)


def _gap(theirs, ours) -> float:
    return (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")


def written() -> list:
    with open(TABLE, encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


def test_table_of_architectures():
    (_, version, _), _, *rows = written()
    if version != hf.__version__:
        pytest.skip(f"the table is of transformers {version}: python tests/test_architectures.py")
    now = {name: (verdict, detail) for name, verdict, detail in found()}
    before = {name: (verdict, detail) for name, verdict, detail in rows}
    assert {n: v for n, (v, _) in now.items()} == {n: v for n, (v, _) in before.items()}
    gaps = {n: float(d) for n, (v, d) in now.items() if v == "seen" and d[:1].isdigit()}
    assert len(gaps) > 100
    assert {n: g for n, g in gaps.items() if g > 1e-4} == {}


if __name__ == "__main__":
    with open(TABLE, "w", encoding="utf-8", newline="") as file:
        rows = [("transformers", hf.__version__, ""), ("architecture", "capture", "gap or reason")]
        csv.writer(file, lineterminator="\n").writerows(rows + found())
