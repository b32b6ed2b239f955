"""The static site: a page for every notebook, a reference of every module, search. `make docs`
builds it into _docs/html, without a network.

The notebooks are staged under _docs/source, so that the site's extra pages never lie among
them.
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = (
    "in_context",
    "pretraining",
    "language",
    "modalities",
    "architectures",
    "adaptation",
    "compression",
    "analysis",
    "surveys",
)


def stage(source: Path):
    "Notebooks and pictures where they stand in the project, and the pages that lead through them."
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(
        ROOT / "nbs", source / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "*.py")
    )
    shutil.copytree(ROOT / "images", source / "images")
    families = [f for f in FAMILIES if (ROOT / "nbs" / f).is_dir()]
    for path in (source / "nbs").rglob("index.ipynb"):
        path.write_text(
            json.dumps(shown(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8"
        )
    front = source / "nbs" / "index.ipynb"
    notebook = json.loads(front.read_text(encoding="utf-8"))
    notebook["cells"].append(
        {
            "id": "site",
            "cell_type": "markdown",
            "metadata": {},
            "source": "\n\n".join(
                [*map(toctree, families), toctree_of(["../api/index"], "Reference")]
            ),
        }
    )
    front.write_text(json.dumps(notebook), encoding="utf-8")
    reference(source / "api")


def shown(notebook: dict) -> dict:
    """A front page as a reader sees it: in place of a hidden cell stands what it prints as
    Markdown, so that its links and pictures are the site's own."""

    def one(cell):
        if cell["cell_type"] == "markdown" or not "".join(cell["source"]).startswith("#| hide"):
            return [cell]
        texts = [
            "".join(o["data"]["text/markdown"])
            for o in cell["outputs"]
            if "text/markdown" in o.get("data", {})
        ]
        return (
            [
                {
                    "id": cell["id"],
                    "cell_type": "markdown",
                    "metadata": {},
                    "source": "\n\n".join(texts),
                }
            ]
            if texts
            else []
        )

    return notebook | {"cells": [c for cell in notebook["cells"] for c in one(cell)]}


def toctree(family: str) -> str:
    pages = sorted(p for p in (ROOT / "nbs" / family).glob("*.ipynb"))
    pages.sort(key=lambda p: p.stem != "index")
    return toctree_of([f"{family}/{p.stem}" for p in pages], family.replace("_", " ").capitalize())


def toctree_of(pages: list, caption: str) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def reference(folder: Path):
    "A page for every module, from its docstrings and the comments in its signatures."
    folder.mkdir()
    modules = sorted(
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in (ROOT / "tfbench").rglob("*.py")
        if p.name not in ("__init__.py", "_modidx.py")
    )
    for module in modules:
        (folder / f"{module}.md").write_text(
            f"# {module.removeprefix('tfbench.')}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   "
            ":members:\n```\n",
            encoding="utf-8",
        )
    (folder / "index.md").write_text(
        "# Reference\n\nEvery public function and class of the library, by module.\n\n"
        + "\n".join(["```{toctree}", ":maxdepth: 1", "", *modules, "```"])
        + "\n",
        encoding="utf-8",
    )


def build(site: Path) -> int:
    "Build the site into a folder; a warning is an error."
    from sphinx.cmd.build import main

    stage(site / "source")
    status = main(
        [
            "-q",
            "-W",
            "--keep-going",
            "-b",
            "html",
            "-c",
            str(ROOT / "docs"),
            "-d",
            str(site / "doctrees"),
            str(site / "source"),
            str(site / "html"),
        ]
    )
    if status == 0:
        print(f"the site begins at {site / 'html' / 'nbs' / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs"))
