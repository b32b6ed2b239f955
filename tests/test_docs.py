"""The static site: it builds without a warning, every page opens in a browser without a network,
every internal link leads somewhere, search finds things.
"""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import NOTEBOOKS, ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


class Page(HTMLParser):
    "The links, the places to link to, and what a page loads."

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.places, self.loads = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.places.add(attributes["id"])
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        for name in ("src", "href"):
            if tag in ("script", "img", "link", "iframe") and attributes.get(name):
                self.loads.append(attributes[name])


def test_site(site, browser):
    pages = {p: Page(p) for p in site.rglob("*.html") if "_static" not in p.parts}
    for path in NOTEBOOKS:
        assert (site / path.relative_to(ROOT)).with_suffix(".html") in pages
    broken = []
    for path, page in pages.items():
        assert not [u for u in page.loads if re.match(r"(https?:)?//", u) and "rel" not in u], (
            f"{path.name} loads something from the network"
        )
        broken += [
            f"{path.relative_to(site)}: {u}"
            for u in page.loads
            if not urlsplit(u).scheme and not (path.parent / unquote(urlsplit(u).path)).exists()
        ]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].places
            ):
                broken.append(f"{path.relative_to(site)}: {link} has no such place")
    assert broken == []
    context = browser.new_context(offline=True)
    tab, errors = context.new_page(), []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.on("requestfailed", lambda r: errors.append(r.url))
    for path in pages:
        if path.name == "search.html":
            continue  # below
        tab.goto(path.as_uri())
        tab.locator("article h1").first.wait_for(state="visible", timeout=20_000)
    assert errors == []
    tab.goto((site / "nbs" / "nn" / "01_attention.html").as_uri())
    tab.wait_for_selector("mjx-container", timeout=20_000)
    tab.goto((site / "search.html").as_uri() + "?q=perplexity")
    tab.wait_for_selector("#search-results li a", timeout=20_000)
    tab.locator("#search-results li a").first.click()
    tab.locator("article h1").first.wait_for(state="visible", timeout=20_000)
    context.close()
