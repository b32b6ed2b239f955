"""The explorer beside bertviz's model view, in one browser: seconds from the call to the first
picture, bytes sent to the page, bytes of a saved page.

Both show all heads of 6 layers x 12 heads. bertviz loads three scripts from a network; give a
folder with d3.min.js, jquery.min.js and require.js (`TFBENCH_BERTVIZ_JS`) to serve them from
disk, which favors it. Without the folder or without bertviz (pip install --no-deps
bertviz==1.4.1: what it uses is here, what it requires besides fits no pin of ours) ours is
measured alone.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
LAYERS, HEADS, PATIENCE = 6, 12, 90


def attentions(T: int) -> list:
    "Patterns like a language model's: causal, some of them sharp."
    g = torch.Generator().manual_seed(T)
    hidden = torch.ones(T, T).triu(1).bool()
    return [
        (4 * torch.randn(1, HEADS, T, T, generator=g)).masked_fill(hidden, -torch.inf).softmax(-1)
        for _ in range(LAYERS)
    ]


def open_page(html: str, ready: str, scripts: dict) -> float:
    "When a browser shows what `ready` selects; scripts of the network come from disk."
    from conftest import FLAGS, browser_path
    from playwright.sync_api import sync_playwright

    def answer(route):
        found = [path for name, path in scripts.items() if name in route.request.url]
        if found:
            route.fulfill(path=found[0])
        elif route.request.url.startswith("http"):
            route.abort()
        else:
            route.continue_()

    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        page = browser.new_page()
        page.route("**/*", answer)
        path = Path(folder) / "page.html"
        path.write_text(html)
        begin = time.perf_counter()
        page.goto(path.as_uri(), wait_until="commit")
        page.wait_for_selector(ready, state="attached", timeout=PATIENCE * 1000)
        page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        took = time.perf_counter() - begin
        browser.close()
    return took


def ours(patterns, tokens):
    from tfbench.interp.capture import from_hf
    from tfbench.interp.explorer import AttentionExplorer, _about, _shipped, grid, page

    begin = time.perf_counter()
    explorer = AttentionExplorer(from_hf(patterns, tokens=tokens))
    meta, thumbs = grid(explorer.views)
    first = time.perf_counter() - begin  # what a notebook waits for before the page draws
    sent = (
        len(json.dumps(_about(explorer, first=meta)))
        + len(thumbs)
        + len(_shipped("explorer.js"))
        + len(_shipped("explorer.css"))
    )
    html = page(explorer)
    return {
        "first picture": first + open_page(html, ".tfx-stage canvas", {}),
        "sent": sent,
        "saved page": len(html),
    }


def theirs(patterns, tokens, scripts):
    from bertviz import model_view

    begin = time.perf_counter()
    html = model_view(patterns, tokens, html_action="return").data
    made = time.perf_counter() - begin
    return {
        "first picture": made
        + open_page(
            "<!doctype html><html><body>" + html + "</body></html>",
            "#vis svg, [id^=bertviz] svg",
            scripts,
        ),
        "sent": len(html),
        "saved page": len(html),
    }


def main():
    folder, scripts = os.environ.get("TFBENCH_BERTVIZ_JS"), {}
    if folder:
        scripts = {
            n: str(Path(folder) / f)
            for n, f in (
                ("d3.min", "d3.min.js"),
                ("jquery.min", "jquery.min.js"),
                ("require.min", "require.js"),
            )
        }
    print(
        f"\nexplorer and bertviz's model view, {LAYERS} layers x {HEADS} heads: seconds to the "
        "first picture, bytes sent, bytes of a saved page"
    )
    for T in (32, 128, 512, 1024):
        patterns, tokens = attentions(T), [f"t{i}" for i in range(T)]
        found = {"explorer": ours(patterns, tokens)}
        try:
            found |= {"bertviz": theirs(patterns, tokens, scripts)} if scripts else {}
        except ImportError:
            print("  bertviz is missing: pip install --no-deps bertviz==1.4.1")
        except Exception as error:
            print(
                f"  {T:4} tokens, bertviz : no picture within {PATIENCE} s "
                f"({type(error).__name__})",
                flush=True,
            )
        for name, f in found.items():
            print(
                f"  {T:4} tokens, {name:8}: {f['first picture']:6.2f} s, {f['sent'] / 1e6:7.2f} MB "
                f"sent, {f['saved page'] / 1e6:7.2f} MB saved",
                flush=True,
            )


if __name__ == "__main__":
    main()
