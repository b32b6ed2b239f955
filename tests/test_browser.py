"""The explorer in a real browser: in JupyterLab with a live kernel, and as a saved page without
a network.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from tfbench.interp.explorer import AttentionExplorer, _shipped, encode
from tfbench.workbench.runs import notebook_text

HOSTILE = [
    "</script><img src=x onerror=\"document.title='broken'\">",
    "<script>document.title='broken'</script>",
    "<b>bold</b>",
    "&amp;",
    "\u202eabc",
    "${1}`'\"\\",
    "",
    " a\n",
]
CANVAS, READ = ".tfx-stage canvas", ".tfx-read"
PATIENCE = 300_000  # milliseconds; only stops what hangs

# what the notebook in JupyterLab and the tests both make
SETUP = """import torch
from tfbench.interp.explorer import AttentionExplorer
from tfbench.nn.transformer import Transformer, TransformerConfig
def explorer(T, tokens=None):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(32, 2, 4, vocab=60, max_len=T)).eval()
    for block in model.blocks: block.attention.q.weight.data.mul_(40)
    ids = torch.randint(60, (1, T), generator=torch.Generator().manual_seed(1))
    tokens = tokens or [f"w{i}" for i in range(T)]
    return AttentionExplorer(model, ids, tokens=tokens, roles=["x", "y"] * (T // 2), title="small")
"""
made = {}
exec(SETUP, made)


def saved(tab, explorer, folder, **options):
    "A tab without a network that shows the saved page."
    explorer.save(folder / "explorer.html", **options)
    page = tab(offline=True)
    page.goto((folder / "explorer.html").as_uri())
    page.wait_for_selector(CANVAS)
    settle(page)
    return page


def settle(page):
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => "
        "setTimeout(done, 30))))"
    )


def pixels(root) -> str:
    return root.locator(CANVAS).evaluate("canvas => canvas.toDataURL()")


def changed(root, before: str):
    "Wait until the canvas is another than before."
    end = time.monotonic() + 20
    while pixels(root) == before:
        if time.monotonic() > end:
            raise AssertionError("the canvas stays as it was")
        time.sleep(0.05)


def thumbnail(root, layer: int, head: int, heads: int = 4) -> dict:
    step = (root.locator(CANVAS).bounding_box()["width"] - 58) / heads
    return {"x": 58 + (head + 0.4) * step, "y": 34 + (layer + 0.4) * step}


def hover_and_read(root, page, x: float, y: float) -> tuple:
    "(query, key, weight) in the read-out for a place of the canvas."
    box = root.locator(CANVAS).bounding_box()
    root.locator(CANVAS).hover(position={"x": x * box["width"], "y": y * box["height"]})
    settle(page)
    said = root.locator(READ).inner_text()
    query, key, weight = re.search(
        r"query .*? #(\d+).* key .*? #(\d+)[^#]*\s(\S+)$", said.split(" · ")[0]
    ).groups()
    return int(query), int(key), float(weight)


def walk_a_head(root, page, explorer, layer=1, head=2):
    "Hover and open a head; weights in the read-out are those of the record."
    before = pixels(root)
    root.locator(CANVAS).hover(position=thumbnail(root, layer, head))
    changed(root, before)
    assert f"layer {layer} · head {head}" in root.locator(READ).inner_text()
    before = pixels(root)
    root.locator(CANVAS).click(position=thumbnail(root, layer, head))
    changed(root, before)
    root.locator(".tfx-title", has_text=f"layer {layer} · head {head}").wait_for()
    root.locator(READ, has_text="Hover: weight of a cell").wait_for()
    pattern, texts = explorer.views.record.layer(layer)[0, head].float(), set()
    for x, y in ((0.3, 0.6), (0.5, 0.7), (0.4, 0.45)):
        before = pixels(root)
        query, key, weight = hover_and_read(root, page, x, y)
        changed(root, before)
        texts.add((query, key))
        assert abs(weight - pattern[query, key].item()) <= pattern[:, 1:].max().item() / 255 + 1e-3
    assert len(texts) == 3


def tick_a_head(root, explorer, layer=1, head=2):
    "The metric of the model without one head, as the page shows it, is the model's own."
    root.locator(f'[data-head="{layer},{head}"]').check()
    table = root.locator(".tfx-metric")
    table.wait_for()
    wanted = explorer.answer({"kind": "ablate", "heads": [[layer, head]]})[0]
    for row, name in enumerate(wanted["names"]):
        shown = table.locator("tr").nth(row + 1).locator("td").all_inner_texts()
        assert shown[0] == name and float(shown[1]) == pytest.approx(
            wanted["baseline"][row], rel=5e-3
        )
        assert (
            float(shown[2]) == pytest.approx(wanted["ablated"][row], rel=5e-3)
            and float(shown[3]) != 0
        )


@pytest.mark.parametrize("signed, code", [(False, "linear"), (False, "log"), (True, "linear")])
def test_page_decodes_what_python_encodes(tab, signed, code):
    weights = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weights = weights - weights.mean() if signed else weights
    q, scales = encode(weights, signed, code)
    page = tab()
    back = page.evaluate(
        """async ([source, bytes, columns, scales, options]) => {
        const module = await import("data:text/javascript;base64," + source);
        return Array.from(module.weights(Uint8Array.from(bytes), columns, scales, options)); }""",
        [
            base64.b64encode(_shipped("explorer.js").encode()).decode(),
            q.flatten().tolist(),
            40,
            scales.tolist(),
            {"signed": signed, "code": code},
        ],
    )
    error = (torch.tensor(back).view(30, 40) - weights).abs()
    bound = (
        0.02 * weights + scales.max() * 1e-4
        if code == "log"
        else scales.max() / (127 if signed else 255) * 0.51
    )
    assert (error <= bound).all()


def test_saved_page(tab, tmp_path):
    explorer = made["explorer"](12)
    page = saved(tab, explorer, tmp_path)
    tick_a_head(page, explorer)
    page.get_by_role("button", name="Clear").click()
    walk_a_head(page, page, explorer)
    page.locator(CANVAS).click(position={"x": 150, "y": 250})
    page.locator(".tfx-words").wait_for()
    assert (
        page.locator(".tfx-words span").count() == 12 and page.locator(".tfx-bars i").count() == 10
    )
    for control in ("log color", "hide first column", "lines"):
        before = pixels(page)
        page.get_by_label(control).check()
        changed(page, before)
        page.get_by_label(control).uncheck()
    before = pixels(page)
    page.get_by_label("threshold").fill("50")
    changed(page, before)
    page.keyboard.press("Escape")


def test_saved_page_modes_groups_and_keys(tab, tmp_path):
    explorer = made["explorer"](12)
    page = saved(tab, explorer, tmp_path)
    for label, options in (
        ("show", ("rollout", "value-weighted", "weights")),
        ("by", ("roles", "tokens")),
    ):
        for option in options:
            before = pixels(page)
            page.get_by_label(label).select_option(label=option)
            changed(page, before)
    page.locator(CANVAS).focus()
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.locator(".tfx-title", has_text="layer 1 · head 1").wait_for()
    settle(page)
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.locator("h4", has_text="What “w1” #1 looks at").wait_for()
    assert re.search(r"query w1 #1 \(y\) → key w1 #1", page.locator(READ).inner_text())
    before = pixels(page)
    page.keyboard.press("+")
    changed(page, before)
    for _ in range(3):
        page.keyboard.press("Escape")
    page.locator(".tfx-title", has_text="small").wait_for()
    page.keyboard.press("x")
    page.locator(".tfx-metric").wait_for()


def test_lens_in_a_page(tab, tmp_path):
    "What the model would answer after each layer, one line a layer."
    explorer = made["explorer"](12)
    explorer.trial.lens = lambda answer: (
        f"<{int(answer.argmax())}>",
        float(answer.softmax(-1).max()),
    )
    page = saved(tab, explorer, tmp_path)
    page.locator(CANVAS).focus()
    page.keyboard.press("Enter")
    page.locator(READ, has_text="Hover").wait_for()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    rows = page.locator(".tfx-lens tr")
    rows.first.wait_for()
    for row, (text, share) in zip(
        rows.all(),
        explorer.answer({"kind": "lens", "heads": [], "query": 2})[0]["said"],
        strict=True,
    ):
        shown = row.locator("td").all_inner_texts()
        assert (
            shown[0] == text
            and float(shown[1]) == pytest.approx(share, rel=5e-3)
            and row.bounding_box()["height"] < 30
        )


def test_difference_of_two_records(tab, tmp_path):
    one, two = made["explorer"](12).views.record, made["explorer"](12)
    with torch.no_grad():
        two.trial.model.blocks[0].attention.o.weight.mul_(30)
    explorer = AttentionExplorer(
        one,
        other=AttentionExplorer(two.trial.model, *two.trial.inputs, tokens=one.tokens).views.record,
    )
    page = saved(tab, explorer, tmp_path)
    page.locator(CANVAS).click(position=thumbnail(page, 1, 0))
    page.locator(READ, has_text="Hover").wait_for()
    query, key, weight = hover_and_read(page, page, 0.3, 0.6)
    wanted = explorer.views.patterns("difference", "tokens", 1)[0]
    assert abs(weight - wanted[query, key].item()) <= wanted.abs().max().item() / 127 + 1e-3
    assert page.locator(".tfx-boxes").count() == 0


def test_hostile_tokens_are_text(tab, tmp_path):
    explorer = made["explorer"](8, HOSTILE)
    explorer.title = HOSTILE[0]
    page = saved(tab, explorer, tmp_path)
    assert page.title() == HOSTILE[0]
    page.locator(CANVAS).click(position=thumbnail(page, 0, 0))
    page.locator(READ, has_text="Hover").wait_for()
    page.locator(CANVAS).focus()
    for key in ("ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.locator(".tfx-words").wait_for()
    assert page.locator(".tfx-words bdi").all_inner_texts()[:4] == HOSTILE[:4]
    assert HOSTILE[0] in page.locator(READ).inner_text()
    assert (
        page.locator("img").count() == 0
        and page.locator("script").count() == 3
        and page.title() == HOSTILE[0]
    )


def test_a_thousand_tokens_in_a_page(tab, tmp_path):
    explorer = made["explorer"](1024)
    page = saved(tab, explorer, tmp_path, max_bytes=2_000_000)
    page.locator(CANVAS).click(position=thumbnail(page, 1, 3))
    page.locator(READ, has_text="positions a cell").wait_for()
    before = pixels(page)
    box = page.locator(CANVAS).bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 320, box["y"] + 330, steps=4)
    page.mouse.up()
    changed(page, before)


# ---- JupyterLab ----------------------------------------------------------------------------------
# -----------------------------


def notebook(folder: Path, *sources: str) -> Path:
    "A notebook folder with one notebook `toys/look`."

    def cell(id, source, kind="code"):
        return {"id": id, "cell_type": kind, "source": source, "metadata": {}} | (
            {"outputs": [], "execution_count": None} if kind == "code" else {}
        )

    cells = [
        cell("title", "# Look\n> Explorers.", "markdown"),
        cell("setup", SETUP),
        *(cell(f"see-{i}", s) for i, s in enumerate(sources)),
    ]
    (folder / "nbs" / "toys").mkdir(parents=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (folder / "nbs" / "toys" / "01_look.ipynb").write_text(
        notebook_text({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    return folder / "nbs"


def _served(folder: Path) -> dict | None:
    "What the server says of itself, once it has written all of it and answers."
    for path in folder.glob("jpserver-*.json"):
        try:
            server = json.loads(path.read_text())
            with urllib.request.urlopen(f"{server['url']}api", timeout=5):
                return server
        except (ValueError, OSError):
            return None


@pytest.fixture
def lab(tmp_path):
    """`lab(*cells)` starts `tfbench lab` on a notebook with these cells and gives its address;
    without cells, on the front page of the checkout."""
    started = []

    def start(*sources, theme="JupyterLab Light"):
        settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        text = json.dumps({"theme": theme})
        settings.joinpath("themes.jupyterlab-settings").write_text(text)
        environment = {
            "TFBENCH_NBS": str(notebook(tmp_path, *sources) if sources else ROOT / "nbs"),
            "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
            "OMP_NUM_THREADS": "1",
        }
        environment |= {
            f"JUPYTER{n}": str(tmp_path / n)
            for n in ("_RUNTIME_DIR", "_CONFIG_DIR", "_DATA_DIR", "LAB_WORKSPACES_DIR")
        }
        with open(tmp_path / "lab.log", "w") as log:
            started.append(
                subprocess.Popen(
                    [
                        str(Path(sys.executable).with_name("tfbench")),
                        "lab",
                        "look" if sources else "index",
                        "--no-browser",
                        "--ServerApp.port=0",
                        "--allow-root",
                    ],
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
            )
        end = time.monotonic() + 120
        while not (server := _served(tmp_path / "_RUNTIME_DIR")):
            if started[-1].poll() is not None or time.monotonic() > end:
                raise AssertionError((tmp_path / "lab.log").read_text()[-3000:])
            time.sleep(0.2)
        assert server["token"] and server["url"].startswith(
            ("http://127.0.0.1", "http://localhost")
        )
        page = "toys/01_look.ipynb" if sources else "index.ipynb"
        return f"{server['url']}lab/tree/nbs/{page}?token={server['token']}"

    yield start
    for process in started:  # the command, the server it started, and the server's kernels
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
        end = time.monotonic() + 20
        while time.monotonic() < end and list((tmp_path / "_RUNTIME_DIR").glob("jpserver-*.json")):
            time.sleep(0.1)  # which goes when the server does


def run_all(page, address: str, ready: str = CANVAS):
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.locator(".jp-Notebook").wait_for()
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(ready).first.wait_for()


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_front_page_in_jupyterlab(lab, tab, theme):
    "At the first visit the picture shows, and nothing is asked."
    page = tab()
    page.set_default_timeout(PATIENCE)
    page.goto(lab(theme=theme))
    picture = page.locator(".jp-RenderedMarkdown img").first
    picture.wait_for()
    size = "img => img.decode().then(() => [img.naturalWidth, img.naturalHeight])"
    assert picture.evaluate(size) == [760, 290]
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").wait_for()
    page.wait_for_timeout(2_000)  # a question would come a moment after the page
    assert page.locator(".jp-Dialog, .Toastify__toast").count() == 0
    assert page.get_by_text("news", exact=False).count() == 0
    if folder := os.environ.get("TFBENCH_SHOTS"):
        page.screenshot(path=Path(folder) / f"lab-{theme.split()[-1]}.png")


def test_jupyterlab(lab, tab):
    address = lab("explorer(12)", f"hostile = explorer(8, {HOSTILE!r}); hostile", "explorer(1024)")
    page = tab()
    run_all(page, address)
    explorer = made["explorer"](12)
    page.locator(".tfx").nth(2).wait_for(timeout=60_000)
    first, second, third = (page.locator(".tfx").nth(i) for i in range(3))
    tick_a_head(first, explorer)
    first.locator('[data-head="0,1"]').check()  # two at once: only a kernel can
    both = explorer.answer({"kind": "ablate", "heads": [[0, 1], [1, 2]]})[0]["ablated"][0]
    first.locator(".tfx-metric th", has_text="without 2").wait_for()
    assert float(
        first.locator(".tfx-metric tr").nth(1).locator("td").nth(2).inner_text()
    ) == pytest.approx(both, rel=5e-3)
    walk_a_head(first, page, explorer)
    before = pixels(first)
    first.get_by_label("show").select_option(label="rollout")
    changed(first, before)
    second.locator(CANVAS).click(position=thumbnail(second, 0, 0))
    second.locator(READ, has_text="Hover").wait_for()
    second.locator(CANVAS).click(position={"x": 250, "y": 250})
    second.locator(".tfx-words").wait_for()
    assert second.locator(".tfx-words bdi").all_inner_texts()[:4] == HOSTILE[:4]
    assert second.locator("img, script").count() == 0 and page.title() != "broken"
    a_thousand_tokens(third, page)


def a_thousand_tokens(root, page):
    "One head of 1024 tokens in blocks, then a part of it cell by cell."
    root.locator(CANVAS).click(position=thumbnail(root, 1, 3))
    root.locator(READ, has_text="2 × 2 positions a cell").wait_for()
    root.locator(CANVAS).focus()
    for key in ("ArrowRight", "+", "+"):
        before = pixels(root)
        page.keyboard.press(key)
        changed(root, before)
    settle(page)
    query, key, weight = hover_and_read(root, page, 0.3, 0.6)
    pattern = made["explorer"](1024).views.record.layer(1)[0, 3].float()
    assert abs(weight - pattern[query, key].item()) <= pattern.max().item() / 255 + 1e-3


def test_jupyterlab_shows_what_goes_wrong(lab, tab):
    "A metric that fails says so in the page, and the explorer goes on."
    page = tab()
    run_all(
        page,
        lab(
            "e = explorer(12)\ndef broken(output): raise RuntimeError('no metric "
            "today')\ne.trial.metric = broken\ne"
        ),
    )
    root = page.locator(".tfx")
    root.locator('[data-head="0,0"]').check()
    root.locator("p", has_text="RuntimeError: no metric today").wait_for()
    walk_a_head(root, page, made["explorer"](12))


ROWS = """from tfbench.workbench.front import scoreboard_widget
row = dict(chapter="a/b", family="a", title="<b>T</b>", id="1", claim="first", paper="",
           here="1", n=3, kind="exact", verdict="holds", expected=True, data="digits",
           profile="laptop", seconds=5.0, stale=False, note="", headline=True, survives=True,
           post_hoc=None)
second = {"claim": "second", "verdict": "contradicted", "headline": False}
third = {"claim": "third", "family": "c", "data": "text"}
scoreboard_widget([row, row | second, row | third])"""


def test_scoreboard_filters_itself(lab, tab):
    page = tab()
    run_all(page, lab(ROWS), ".widget-dropdown select")
    table = page.locator(".widget-html table").last
    assert "<b>T</b>" in table.inner_text() and page.get_by_text("3 claims").is_visible()
    page.locator(".widget-dropdown", has_text="verdict").locator("select").select_option(
        "contradicted"
    )
    page.get_by_text("1 claim", exact=True).wait_for()
    assert "second" in table.inner_text() and "first" not in table.inner_text()
    page.locator(".widget-dropdown", has_text="verdict").locator("select").select_option("any")
    page.get_by_text("3 claims").wait_for()  # the kernel has answered
    page.locator(".widget-text", has_text="data").locator("input").fill("text")
    page.get_by_text("1 claim", exact=True).wait_for()
    assert "third" in table.inner_text()
    page.locator(".widget-text", has_text="data").locator("input").fill("")
    page.get_by_text("3 claims").wait_for()
    page.get_by_label("headlines alone").check()
    page.get_by_text("2 claims", exact=True).wait_for()
    assert "second" not in table.inner_text() and "holds ✓" in table.inner_text()


PICTURE = """from tfbench.study.figures import explore, figure, use_style
use_style()
def draw(slope, color):
    fig, ax = figure(height=1.5)
    ax.plot([0, 1], [0, slope], color=color)
    return fig
explore(draw, alt="A line.", slope=[1, 2, 3_000_000], color=["red", "blue"])"""


def test_explore_draws_again_when_a_control_moves(lab, tab):
    """The picture of a chapter's widget follows its sliders; the last value asks for wider
    labels, and so for a new layout."""
    page = tab()
    run_all(page, lab(PICTURE), ".widget-hslider")
    picture, seen = page.locator("img.widget-image"), set()
    for row, key, value in (
        (0, "ArrowRight", "2"),
        (0, "ArrowRight", "3000000"),
        (1, "ArrowRight", "blue"),
        (0, "ArrowLeft", "2"),
    ):
        seen.add(before := picture.get_attribute("src"))
        slider = page.locator(".widget-hslider").nth(row)
        slider.locator(".noUi-handle").focus()
        page.keyboard.press(key)
        slider.locator(".widget-readout", has_text=value).wait_for()
        page.wait_for_function(
            "before => document.querySelector('img.widget-image').src !== before", arg=before
        )
        assert picture.evaluate("i => i.decode().then(() => i.naturalWidth)") == 700
    assert len(seen) == 4 and picture.get_attribute("title") == "A line."
