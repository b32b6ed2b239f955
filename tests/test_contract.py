"""The contract of a notebook, checked without running it. A breach names the file, the cell and
the rule.
"""

import ast
import configparser
import json
import math
import re
import shutil
import subprocess
import symtable
import tomllib
import warnings
from pathlib import Path

import pytest
from conftest import CHAPTERS, INDEXES, NOTEBOOKS, ROOMED, ROOT, command, module, slug

from tfbench.core import WITHOUT_REQUIREMENTS
from tfbench.study.searches import depends_on, read_searches, searches_file, searches_text
from tfbench.workbench.chapters import changed_below, find, notebook_code, read_chapter
from tfbench.workbench.reach import _globals_of
from tfbench.workbench.records import read_notebook
from tfbench.workbench.runs import notebook_text, output_problems, stale_cells

HEADINGS = (
    "At a glance",
    "Exact checks",
    "Claims",
    "Use it on your own model",
    "Limits",
    "Exercises",
    "References",
)


def breaches(path: Path) -> list:
    "Every rule that the notebook breaks: `cell: rule`."
    notebook, found = read_notebook(path), []
    cells = notebook["cells"]
    ids = [c.get("id") for c in cells]
    found += [f"{i}: the id is used twice" for i in {i for i in ids if ids.count(i) > 1}]
    if path.read_text(encoding="utf-8") != notebook_text(notebook):
        found.append("file: not in canonical form (tfbench refresh writes it)")
    if cells[0]["cell_type"] != "markdown" or not re.match(
        r"# .+\n> .+", "".join(cells[0]["source"])
    ):
        found.append(f"{ids[0]}: no `# Title` and `> line`")
    if (
        path not in INDEXES
        and "".join(cells[1]["source"]).strip() != f"#| default_exp {module(path)}"
    ):
        found.append(f"{ids[1]}: expected `#| default_exp {module(path)}` alone")
    for cell in cells:
        found += [f"{cell['id']}: {rule}" for rule in _cell_breaches(cell)]
    found += _widget_breaches([c for c in cells if c["cell_type"] == "code"])
    return found + output_problems(notebook)


def _cell_breaches(cell: dict):
    source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
    if set(cell["metadata"]) - {"tags"}:
        yield f"metadata {sorted(cell['metadata'])}, only tags are allowed"
    if set(tags) - {"parameters", "profiles", "skip-execution"}:
        yield f"tags {tags}"
    if cell["cell_type"] != "code":
        return
    if cell.get("execution_count") is not None:
        yield "has an execution count"
    if len(source.splitlines()) > 120:
        yield f"{len(source.splitlines())} lines, at most 120"
    if "nbdev_export(" in source:
        yield "calls nbdev_export"
    if bool(re.search(r"^#\|\s*eval:\s*false", source, re.M)) != ("skip-execution" in tags):
        yield "`eval: false` and the tag skip-execution go together"
    outputs = json.dumps(cell.get("outputs", []))
    for what, pattern in (
        ("an absolute path", r"/(home|root|tmp|work|Users|opt)/\w"),
        ("a memory address", r"0x[0-9a-f]{8,}"),
    ):
        if found := re.search(pattern, re.sub(r'"image/png": "[^"]*"', "", outputs)):
            yield f"{what} in its outputs: {found[0]}"
    if re.search(r"^#\|\s*exporti?\b", source, re.M):
        yield from _export_breaches(source)


def _widget_breaches(cells: list):
    """A control may be moved when the whole notebook has run: what its picture is made of must
    not have got another meaning by then."""
    sources = ["".join(c["source"]) for c in cells]
    tables = [symtable.symtable(s, c["id"], "exec") for s, c in zip(sources, cells)]
    imported = [
        {
            a.asname or a.name: f"{n.module}.{a.name}"
            for n in ast.parse(s).body
            if isinstance(n, ast.ImportFrom)
            for a in n.names
        }
        for s in sources
    ]
    for i, cell in enumerate(cells):
        drawn = [
            n.args[0]
            for n in ast.walk(ast.parse(sources[i]))
            if isinstance(n, ast.Call) and ast.unparse(n.func) == "explore" and n.args
        ]
        if not drawn or "def explore(" in sources[i]:
            continue
        known = {
            child.get_name(): child for table in tables[: i + 1] for child in table.get_children()
        }
        used, todo = set(), [n.id for d in drawn for n in ast.walk(d) if isinstance(n, ast.Name)]
        while todo:
            name = todo.pop()
            if name in used:
                continue
            used.add(name)
            if name in known:
                todo += _globals_of(known[name])
        for j in range(i + 1, len(cells)):
            for symbol in tables[j].get_symbols():
                name = symbol.get_name()
                same = name in imported[j] and imported[j][name] in {
                    m.get(name) for m in imported[: i + 1]
                }
                if (
                    name in used
                    and (symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace())
                    and not same
                ):
                    yield (
                        f"{cell['id']}: its widget reads {name}, which the cell "
                        f"{cells[j]['id']} "
                        "sets anew"
                    )


def _export_breaches(source: str):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            yield "star import in exported code"
        if isinstance(node, ast.Assert):
            yield "assert in exported code: raise a ValueError"
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in (
            "torch.manual_seed",
            "np.random.seed",
            "random.seed",
            "torch.set_default_dtype",
            "nbdev_export",
        ) or called.endswith(".cuda"):
            yield f"{called}() in exported code"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=slug)
def test_contract(path):
    assert breaches(path) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=slug)
def test_chapter_contract(path):
    notebook, chapter = read_notebook(path), read_chapter(path)
    tags = [t for c in notebook["cells"] for t in c["metadata"].get("tags", [])]
    assert tags.count("parameters") == tags.count("profiles") == 1
    assert chapter.front["family"] == path.parent.name and {"paper", "year", "arxiv"} <= set(
        chapter.front
    )
    assert {"test", "paper"} <= set(chapter.profiles) and "seed" in chapter.parameters
    assert all(p.help for p in chapter.parameters.values()), "every parameter has a comment"
    text = "\n".join(
        "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"
    )
    places = [
        text.find(m.group()) if (m := re.search(rf"^## .*{h}", text, re.M)) else -1
        for h in HEADINGS
    ]
    assert -1 not in places and places == sorted(places), (
        f"headings {HEADINGS} in this order: {places}"
    )


@pytest.mark.parametrize("path", CHAPTERS, ids=slug)
def test_committed_outputs(path):
    """Outputs come from a laptop run of the code that stands in the notebook, and no expected
    claim failed."""
    chapter = read_chapter(path)
    assert chapter.record is not None, "no claims record: tfbench refresh"
    assert not chapter.stale, "made from other code: tfbench refresh"
    if changed := changed_below(chapter):
        warnings.warn(
            f"{chapter.slug}: older than the library, {', '.join(changed)} changed since: tfbench "
            "refresh",
            stacklevel=1,
        )
    assert (
        chapter.record["profile"] == "laptop" and chapter.record["parameters"] == chapter.resolve()
    )
    assert chapter.record["seconds"] <= 300, "hard limit of the laptop profile"
    keys = [
        "chapter",
        "profile",
        "parameters",
        "code_sha256",
        "library",
        "seconds",
        "versions",
        "measurements",
        "claims",
    ]
    assert sorted(chapter.record) == sorted(keys) and chapter.record["chapter"] == chapter.slug
    for claim in chapter.record["claims"]:
        assert sorted(claim) == sorted(
            ["id", "statement", "kind", "paper", "measured", "verdict", "expected", "note"]
        )
        assert claim["verdict"] in ("holds", "fails", "untested") and not (
            claim["expected"] and claim["verdict"] != "holds"
        )
        if claim["kind"] == "statistical" and claim["verdict"] != "untested":
            assert claim["measured"]["n"] >= 2 and claim["measured"]["low"] is not None


SEARCHED = [p for p in CHAPTERS if "Searches(claims, search)" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SEARCHED, ids=slug)
def test_committed_searches(path):
    """What a chapter reads of its searches was made by the code and with the parameters that
    stand in it."""
    notebook, chapter, kept = read_notebook(path), read_chapter(path), read_searches(path)
    titles = set(re.findall(r'\bsearches\("([^"]+)"', notebook_code(notebook)))
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
        if (m := re.search(r"^#\| default_exp (\S+)", "".join(c["source"]), re.M))
    ]
    assert len(targets) == len(set(targets)), "two notebooks export the same module"
    modules = {
        ".".join(p.relative_to(ROOT / "tfbench").with_suffix("").parts)
        for p in (ROOT / "tfbench").rglob("*.py")
        if p.name != "_modidx.py" and (p.name != "__init__.py" or "%% auto" in p.read_text())
    }
    assert modules == set(targets), "a module without a notebook, or a notebook without its module"


def test_export_is_in_step(tmp_path):
    for name in ("nbs", "tfbench"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = command("nbdev_export", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    def listing(top):
        return {p.relative_to(top): p.read_text() for p in (top / "tfbench").rglob("*.py")}

    ours, fresh = listing(ROOT), listing(tmp_path)
    assert sorted(k for k in ours | fresh if ours.get(k) != fresh.get(k)) == [], "run nbdev_export"
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
