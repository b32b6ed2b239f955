"""The contract of a notebook, checked without running it. The rules stand in
`tfbench.workbench.check`; a breach names the cell and the rule.
"""

import ast
import configparser
import json
import math
import re
import shutil
import subprocess
import tomllib
import warnings

import pytest
from conftest import CHAPTERS, INDEXES, NOTEBOOKS, ROOMED, ROOT, command, slug

from tfbench.core import WITHOUT_REQUIREMENTS
from tfbench.study.searches import depends_on, read_searches, searches_file, searches_text
from tfbench.workbench.chapters import changed_below, find, notebook_code, read_chapter
from tfbench.workbench.check import (
    chapter_breaches,
    export_breaches,
    kept_breaches,
    notebook_breaches,
    output_breaches,
)
from tfbench.workbench.records import read_notebook
from tfbench.workbench.runs import stale_cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=slug)
def test_contract(path):
    assert notebook_breaches(path) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=slug)
def test_chapter_contract(path):
    assert chapter_breaches(path) + kept_breaches(path) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=slug)
def test_committed_outputs(path):
    chapter = read_chapter(path)
    if changed := changed_below(chapter):
        warnings.warn(
            f"{chapter.slug}: older than the library, {', '.join(changed)} changed since: tfbench "
            "refresh",
            stacklevel=1,
        )
    assert output_breaches(path) == []


SEARCHED = [p for p in CHAPTERS if "Searches(claims, search)" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SEARCHED, ids=slug)
def test_committed_searches(path):
    """What a chapter reads of its searches was made by the code and with the parameters that
    stand in it."""
    notebook, chapter, kept = read_notebook(path), read_chapter(path), read_searches(path)
    titles = set(re.findall(r'\bsearches\(\s*"([^"]+)"', notebook_code(notebook)))
    assert titles and set(kept) == titles, "tfbench refresh --search"
    assert searches_file(path).read_text(encoding="utf-8") == searches_text(
        json.loads(searches_file(path).read_text(encoding="utf-8"))
    )
    for title, entry in kept.items():
        needs = depends_on(notebook, title, chapter.resolve())
        assert (
            entry["parameters"] == needs["parameters"] and entry["code"][""] == needs["code"][""]
        ), f"{title}: made otherwise: tfbench refresh --search"
        below = [m for m, digest in needs["code"].items() if entry["code"].get(m) != digest]
        if below:
            warnings.warn(
                f"{chapter.slug}: the search {title!r} is older than the library, "
                f"{', '.join(below)} changed since",
                stacklevel=1,
            )
        for kind, settings in entry["settings"].items():
            assert (
                len(settings) == len(entry["losses"][kind]) > 1
                and min(entry["losses"][kind]) < math.inf
            )


def test_every_searches_file_is_read():
    assert {searches_file(p) for p in SEARCHED} == set((ROOT / "nbs").rglob("*.searches.json"))


@pytest.mark.parametrize("path", ROOMED, ids=slug)
def test_room_has_outputs(path):
    assert any(c.get("outputs") for c in read_notebook(path)["cells"]), (
        "no outputs: tfbench refresh"
    )


def test_one_notebook_one_module():
    targets = [
        m[1]
        for p in NOTEBOOKS
        for c in read_notebook(p)["cells"]
        if (m := re.match(r"#\| default_exp (\S+)", "".join(c["source"])))
    ]
    assert len(targets) == len(set(targets)), "two notebooks export the same module"
    modules = {
        ".".join(p.relative_to(ROOT / "tfbench").with_suffix("").parts)
        for p in (ROOT / "tfbench").rglob("*.py")
        if p.name != "_modidx.py" and (p.name != "__init__.py" or "%% auto" in p.read_text())
    }
    assert modules == set(targets), "a module without a notebook, or a notebook without its module"


def test_export_is_in_step():
    assert export_breaches() == []
    assert [slug(p) for p in NOTEBOOKS if stale_cells(find(slug(p)))] == []


def test_nbdev_clean_changes_nothing(tmp_path):
    for name in ("nbs", "tfbench"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    shutil.copy(ROOT / "settings.ini", tmp_path)
    assert command("nbdev_clean", cwd=tmp_path).returncode == 0
    changed = [
        p.name
        for p in NOTEBOOKS
        if json.loads((tmp_path / p.relative_to(ROOT)).read_text()) != json.loads(p.read_text())
    ]
    assert changed == []


def test_settings_agree():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    ini, toml = ini["DEFAULT"], tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ini["requirements"].split() == toml["dependencies"]
    for extra, packages in toml["optional-dependencies"].items():
        assert ini[f"{extra}_requirements"].split() == packages
    assert (
        ini["lib_name"] == toml["name"]
        and ini["description"] == toml["description"]
        and f">={ini['min_python']}" == toml["requires-python"]
    )
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert pins["torch"] == "2.13.0" and "torch>=2.6" in toml["dependencies"]
    bare = dict(
        line.split("==")
        for line in (ROOT / "requirements-data.txt").read_text().splitlines()
        if "==" in line
    )
    assert bare == WITHOUT_REQUIREMENTS


@pytest.mark.parametrize("path", INDEXES, ids=slug)
def test_index_is_in_step(path, monkeypatch):
    "The tables of a front page are what the chapters' records say now."
    import IPython.display

    monkeypatch.setenv("TFBENCH_STATIC", "1")
    shown, scope = [], {"display": lambda *_: None}
    for cell in read_notebook(path)["cells"]:
        if cell["cell_type"] != "code":
            continue
        *rest, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(rest, []), cell["id"], "exec"), scope)
        value = (
            eval(compile(ast.Expression(last.value), cell["id"], "eval"), scope)
            if isinstance(last, ast.Expr)
            else exec(compile(ast.Module([last], []), cell["id"], "exec"), scope)
        )
        if isinstance(value, IPython.display.Markdown):
            shown.append(
                (
                    cell["id"],
                    value.data,
                    "".join(cell["outputs"][0]["data"]["text/markdown"]) if cell["outputs"] else "",
                )
            )
    assert shown and [i for i, now, then in shown if now != then] == [], (
        f"run tfbench refresh {slug(path)} and tfbench readme"
    )


def test_readme_is_in_step(tfbench):
    done = tfbench("readme", "--check")
    assert done.returncode == 0, done.stderr


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)
    assert targets and [t for t in targets if not (ROOT / t).exists()] == []


def test_no_machine_in_the_project():
    "No path of a machine stands in what is committed."
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    texts = [
        ROOT / f
        for f in files
        if f.endswith((".ipynb", ".py", ".md", ".ini", ".toml", ".txt"))
        and not f.startswith("tests/")
    ]
    assert [
        p.name
        for p in texts
        if re.search(
            r"/(work|root|home|Users)/\w",
            re.sub(r'"image/png": "[^"]*"', "", p.read_text(encoding="utf-8")),
        )
    ] == []
