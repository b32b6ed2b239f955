"""The static site: a page for every notebook, a reference of every module, search. `make docs`
builds it into _docs/html, without a network.

The notebooks are staged under _docs/source, as a reader should see them: no directives, no cell
that only names a module, front matter as a line, links to the chapters before and after, and
set-up and checks folded.
"""

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
FAMILIES = list(tomllib.loads((NBS / "papers.toml").read_text(encoding="utf-8")))
LIBRARY = {
    "nn": "Parts of models",
    "data": "Data",
    "train": "Training",
    "study": "How something is found out",
    "interp": "Inside a model",
    "icl": "In-context learners, measured",
    "workbench": "The tool around the notebooks",
}
FOLDED = {"parameters", "profiles", "checks", "hide-input"}  # tags whose code a reader unfolds


def stage(source: Path):
    "Notebooks and pictures where they stand in the project, and the pages that lead through them."
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "images", source / "images")
    for name in ("CHANGELOG.md", "LOG.md"):
        shutil.copy(ROOT / name, source / name)
    for path in sorted(NBS.rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            staged = source / path.relative_to(ROOT)
            staged.parent.mkdir(parents=True, exist_ok=True)
            staged.write_text(json.dumps(page(path)), encoding="utf-8")
    library(source / "library")
    reference(source / "api")


def page(path: Path) -> dict:
    "A notebook as a reader of the site sees it."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells, checks = [], False
    for cell in notebook["cells"]:
        if heading := re.search(r"^## (.+)", "".join(cell["source"]), re.M):
            checks = heading[1].startswith("Exact checks")
        cells += shown(cell, checks)
    if path.parent.name in FAMILIES and re.match(r"\d", path.stem):
        cells[0] = head(path, "".join(cells[0]["source"]))
    if path == NBS / "index.ipynb":
        cells.append(markdown("contents", front_contents()))
    elif path.stem == "index":
        cells.append(markdown("contents", toctree(neighbors(path.parent))))
    return notebook | {"cells": cells}


def shown(cell: dict, checks: bool = False) -> list:
    """The cell without directives, folded where a reader seldom looks; what only makes a table is
    replaced by the table."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [cell]
    directives = re.findall(r"^#\| *(\w+)", source, re.M)
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    if not code:
        return []
    data = [output.get("data", {}) for output in cell["outputs"]]
    if "hide" in directives:
        tables = ["".join(d["text/markdown"]) for d in data if "text/markdown" in d]
        return [markdown(cell["id"], "\n\n".join(tables))] if tables else []
    tags = set(cell["metadata"].get("tags", []))
    folded = checks or tags & FOLDED or is_setup(cell["id"], code)
    tags |= {"hide-input"} if folded else set()
    return [cell | {"source": code, "metadata": {"tags": sorted(tags)} | described(cell)}]


def described(cell: dict) -> dict:
    "The text of a cell's picture, where MyST-NB looks for it."
    about = [output.get("metadata", {}).get("image/png", {}) for output in cell["outputs"]]
    texts = [a["alt"] for a in about if a.get("alt")]
    return {"mystnb": {"image": {"alt": texts[0]}}} if texts else {}


def is_setup(name: str, code: str) -> bool:
    "Imports alone, or the cell that a chapter calls its set-up."
    statement = re.compile(r"(from|import|\)|    |#|$)")
    return name == "set-up" or all(statement.match(line) for line in code.splitlines())


def head(path: Path, source: str) -> dict:
    "A chapter's first cell: its front matter in a line, and the chapters before and after."
    front = dict(re.findall(r"^- (\w+): (.+)$", source, re.M))
    text = re.sub(r"^- \w+: .+\n?", "", source, flags=re.M).rstrip()
    text, heading, rest = text.partition("\n## ")  # what follows a heading stays below it
    below = f"## {rest}" if heading else ""
    lines = [text.rstrip(), front_line(front), before_and_after(path), below]
    return markdown("title", "\n\n".join(line for line in lines if line))


def front_line(front: dict) -> str:
    "Paper, year, arXiv and what a run needs; empty for a bed, which has no paper."
    if "paper" not in front:
        return ""
    arxiv = f"[arXiv:{front['arxiv']}](https://arxiv.org/abs/{front['arxiv']})"
    said = [f"*{front['paper']}*, {front['year']}, {arxiv}"]
    said += [f"{key.capitalize()}: {front[key]}" for key in ("data", "needs") if key in front]
    return ". ".join(said) + "."


def before_and_after(path: Path) -> str:
    pages = neighbors(path.parent)
    place = pages.index(path.stem)
    up = f"[{title(path.parent / 'index')}](index.ipynb)"
    before = [f"← [{title(path.parent / pages[place - 1])}]({pages[place - 1]}.ipynb)"]
    after = [f"[{title(path.parent / name)}]({name}.ipynb) →" for name in pages[place + 1 :][:1]]
    return " · ".join([*(before if place else []), up, *after])


def title(path: Path) -> str:
    notebook = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    return re.search(r"^# (.+)$", "".join(notebook["cells"][0]["source"]), re.M)[1]


def neighbors(folder: Path) -> list:
    "The other notebooks of a folder, in reading order."
    return sorted(p.stem for p in folder.glob("*.ipynb") if p.stem != "index")


def markdown(name: str, text: str) -> dict:
    return {"id": name, "cell_type": "markdown", "metadata": {}, "source": text}


def toctree(pages: list, caption: str = "", hidden: bool = True) -> str:
    options = [":hidden:"] * hidden + [f":caption: {caption}"] * bool(caption)
    return "\n".join(["```{toctree}", ":maxdepth: 1", *options, "", *pages, "```"])


def front_contents() -> str:
    "What the sidebar shows: families first, the library last."
    families = [f"{name}/index" for name in FAMILIES if (NBS / name).is_dir()]
    parts = [
        toctree(["claims"], "Results"),
        toctree(families, "Families"),
        toctree(["../CHANGELOG", "../LOG"], "Project"),
        toctree(["../library/index", "../api/index"], "Library"),
    ]
    return "\n\n".join(parts)


def library(folder: Path):
    "A page for the rooms, and one for each room that has no face of its own."
    folder.mkdir()
    pages = []
    for room, name in LIBRARY.items():
        if (NBS / room / "index.ipynb").exists():
            pages.append(f"{name} <../nbs/{room}/index>")
            continue
        inside = [f"../nbs/{room}/{stem}" for stem in neighbors(NBS / room)]
        pages.append(room)
        text = f"# {name}\n\n`tfbench.{room}`\n\n" + toctree(inside, hidden=False)
        (folder / f"{room}.md").write_text(text + "\n", encoding="utf-8")
    text = "# Notebooks of the library\n\nWhat chapters have in common, built and checked once.\n\n"
    pages = ["../nbs/core", *pages]
    (folder / "index.md").write_text(text + toctree(pages, hidden=False) + "\n", encoding="utf-8")


def reference(folder: Path):
    "A page for every module, from its docstrings and the comments in its signatures."
    folder.mkdir()
    modules = sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "tfbench").rglob("*.py")
        if p.name not in ("__init__.py", "_modidx.py")
    )
    for module in modules:
        name = module.removeprefix("tfbench.")
        text = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n```\n"
        (folder / f"{module}.md").write_text(text, encoding="utf-8")
    text = "# Reference\n\nEvery public function and class of the library, by module.\n\n"
    (folder / "index.md").write_text(text + toctree(modules, hidden=False) + "\n", encoding="utf-8")


def build(site: Path) -> int:
    "Build the site into a folder; a warning is an error."
    from sphinx.cmd.build import main

    stage(site / "source")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(ROOT / "docs")]
    folders = ["-d", str(site / "doctrees"), str(site / "source"), str(site / "html")]
    status = main([*options, *folders])
    if status == 0:
        print(f"the site begins at {site / 'html' / 'nbs' / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs"))
