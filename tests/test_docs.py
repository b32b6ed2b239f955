"""The front page and its picture, the changelog, and the static site: it builds without a warning,
every page opens in a browser without a network, every internal link leads somewhere, search finds
things.
"""

import configparser
import importlib
import importlib.util
import io
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from conftest import CHAPTERS, NOTEBOOKS, ROOT
from filelock import FileLock
from PIL import Image

from tfbench.workbench.chapters import find_chapters
from tfbench.workbench.front import WORDS, found


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 8_000
    pictures = re.findall(r"!\[([^]]+)\]\((\S+)\)", text)
    assert len(pictures) == 1 and (ROOT / pictures[0][1]).stat().st_size <= 300_000
    assert {p.name for p in (ROOT / "images").iterdir()} == {Path(pictures[0][1]).name}


def frames(picture) -> np.ndarray:
    "All frames of an animation, as shares of full brightness."
    image = Image.open(picture)
    shown = []
    for i in range(image.n_frames):
        image.seek(i)
        shown.append(np.asarray(image.convert("RGB"), dtype=float) / 255)
    return np.stack(shown)


def test_picture_is_what_its_code_makes():
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    committed, made = frames(picture.PICTURE), frames(io.BytesIO(picture.picture()))
    assert committed.shape == made.shape and len(made) == picture.LAYERS + 1
    off = np.abs(committed - made).mean((1, 2, 3))
    moved = np.abs(np.diff(committed, axis=0)).mean((1, 2, 3))
    assert off.max() < moved.min() / 4, "run python docs/picture.py"


def test_what_was_found_is_short():
    for chapter in find_chapters():
        assert 3 <= len(found(chapter).removesuffix(" …").split()) <= WORDS
        assert len(chapter.front.get("found", "").split()) <= WORDS, f"{chapter.slug}: found"


def test_changelog_names_what_is_there():
    "Every module, and every name in a module, of the table of what moved."
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `foundations\.\w+` \| (.+) \|$", text, re.M)
    assert len(rows) > 30
    for row in rows:
        place, *parts = row.split("; ")
        for part in [place, *parts]:
            names, _, module = part.rpartition(" in ")
            where = re.findall(r"`([a-z_.]+)`", module) if names else re.findall("`(.+)`", place)
            for path in where:
                loaded = importlib.import_module(f"tfbench.{path}")
                for name in re.findall(r"`(\w+)`", names):
                    assert hasattr(loaded, name), f"tfbench.{path} has no {name}"


def test_nbdev_3_reads_the_same():
    "What nbdev 3 reads in pyproject.toml is what nbdev 2 reads in settings.ini."
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    ini, toml = ini["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert ini["git_url"] == toml["project"]["urls"]["Repository"]
    assert {"nbs_path", "lib_path", "readme_nb", "recursive"} <= set(toml["tool"]["nbdev"])
    for name, value in toml["tool"]["nbdev"].items():
        if isinstance(value, bool):
            assert ini.getboolean(name) == value, name
        elif isinstance(value, list):
            assert ini[name].split() == value, name
        else:
            assert ini[name] == value, name


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    "The site, built once for all processes of a test run."
    shared = tmp_path_factory.getbasetemp()
    shared = shared if worker_id == "master" else shared.parent
    folder = shared / "site"
    with FileLock(shared / "site.lock"):
        if not (folder / "done").exists():
            done = subprocess.run(
                [sys.executable, str(ROOT / "docs" / "build.py"), str(folder)],
                capture_output=True,
                text=True,
                timeout=1200,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "done").touch()
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


def test_site_is_laid_out_for_readers(site):
    front = (site / "nbs" / "index.html").read_text(encoding="utf-8")
    captions = re.findall(r'class="caption-text">([^<]+)<', front)
    assert captions[:4] == ["Results", "Families", "Project", "Library"]
    for path in NOTEBOOKS:
        html = (site / path.relative_to(ROOT)).with_suffix(".html").read_text(encoding="utf-8")
        code = re.findall(r'<div class="highlight-ipython3.*?</pre>', html, re.S)
        assert not [c for c in code if "#|" in re.sub("<[^>]+>", "", c)], f"{path}: a directive"
        assert not re.search(r"^(<p>)?\|.*\|$", html, re.M), f"{path}: a table that is none"
    for path in CHAPTERS:
        html = (site / path.relative_to(ROOT)).with_suffix(".html").read_text(encoding="utf-8")
        begin = html.rindex("<h1>")  # the first one stands in the contents for printers
        top = html[begin : html.index("<h2>", begin)]
        assert "arxiv.org/abs/" in top and "<li>" not in top, f"{path}: front matter"
        stems = sorted(p.stem for p in CHAPTERS if p.parent == path.parent)
        place = stems.index(path.stem)
        beside = stems[max(place - 1, 0) : place] + stems[place + 1 : place + 2]
        assert all(f'href="{stem}.html"' in top for stem in [*beside, "index"]), path
        folded = re.findall(r'class="cell[^"]*tag_hide-input', html)
        assert len(folded) >= 4, f"{path}: parameters, profiles, set-up and checks are folded"


def test_pictures_of_the_site_have_their_texts(site):
    page = (site / "nbs" / "language" / "01_ul2.html").read_text(encoding="utf-8")
    assert 'alt="One sentence four times' in page


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
    tab.set_default_timeout(300_000)
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.on("requestfailed", lambda r: errors.append(r.url))
    for path in pages:
        if path.name == "search.html":
            continue  # below
        tab.goto(path.as_uri())
        tab.locator("article h1").first.wait_for(state="visible")
    assert errors == []
    tab.goto((site / "nbs" / "nn" / "01_attention.html").as_uri())
    tab.wait_for_selector("mjx-container")
    tab.goto((site / "search.html").as_uri() + "?q=perplexity")
    tab.wait_for_selector("#search-results li a")
    tab.locator("#search-results li a").first.click()
    tab.locator("article h1").first.wait_for(state="visible")
    context.close()
