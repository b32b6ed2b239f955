"""The rooms of the library: who may import whom, how the code is written, and what its public
functions say about themselves.
"""

import ast
import functools
import graphlib
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, command

ORDER = ("core", "nn", "data", "train", "study", "interp", "icl")  # each may use those before it
LEAVES = {f"workbench.{name}" for name in ("records", "parameters", "chapters", "reach")}
LIBRARY = ROOT / "tfbench"


@functools.cache
def modules(package: Path) -> dict:
    "Module name -> syntax tree; names as inside the package, a room's face by the room's name."
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").removesuffix(".")
        if name not in ("", "_modidx"):
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(package: Path) -> dict:
    "Module name -> the modules of the package that it imports, inside its functions too."
    trees = modules(package)
    faces = {p.parent.name for p in package.rglob("__init__.py")}
    found = {}
    for name, tree in trees.items():
        room = name if name in faces else name.rpartition(".")[0]
        asked = {a for node in ast.walk(tree) for a in _asked(node, package.name, room)}
        found[name] = {_known(a, trees) for a in asked} - {"", name}
    return found


def _asked(node: ast.AST, package: str, room: str) -> list:
    "What an import asks of the package, with the names that it takes: `nn.attention.rotate`."
    if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = [package, *room.split(".")]
        base = base[: len(base) + 1 - node.level] if node.level else []
        names = [".".join([*base, node.module or "", a.name]) for a in node.names]
    else:
        return []
    names = [n.replace("..", ".") for n in names]
    return [n.removeprefix(f"{package}.") for n in names if n.startswith(f"{package}.")]


def _known(asked: str, trees: dict) -> str:
    "The module in which a dotted name ends; nothing for the package itself."
    while asked and asked not in trees:
        asked = asked.rpartition(".")[0]
    return asked


def backwards(package: Path) -> list:
    "Every import that runs against the order of the rooms."
    found = [(a, b) for a, targets in imports(package).items() for b in sorted(targets)]
    return [f"{a} -> {b}" for a, b in found if not _allowed(a, b)]


def _allowed(a: str, b: str) -> bool:
    here, there = a.partition(".")[0], b.partition(".")[0]
    if a in LEAVES:
        return b == "core" or b in LEAVES
    if here == "workbench":
        return there == here or there in ORDER
    if there == "workbench":
        return b in LEAVES and here in ORDER[ORDER.index("study") :]
    if here in ORDER:
        return there == here or there in ORDER[: ORDER.index(here)]
    shared = b.partition(".")[2] in ("bed", "core")  # what the chapters of one family share
    return there in ORDER or there == here or not shared


@pytest.fixture
def planted(tmp_path):
    "`planted({module: text})`: a package of that name with these modules."

    def plant(texts: dict) -> Path:
        for name, text in texts.items():
            path = tmp_path / "tfbench" / (name.replace(".", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        return tmp_path / "tfbench"

    return plant


def test_arrows_of_the_rooms():
    assert backwards(LIBRARY) == []


@pytest.mark.parametrize(
    "where, text",
    [
        ("nn.a", "def f():\n    from tfbench.icl.b import x"),
        ("train.a", "from ..icl.b import x"),
        ("icl.a", "import tfbench.language.ul2"),
        ("nn.a", "from tfbench import icl"),
        ("study.a", "from ..workbench.runs import run"),
        ("nn.a", "from ..workbench.records import x"),
        ("workbench.records", "from ..study.b import x"),
        ("language.a", "from ..compression.bed import x"),
    ],
)
def test_arrows_that_run_back_are_seen(planted, where, text):
    names = ("icl.b", "study.b", "language.ul2", "workbench.runs", "compression.bed")
    others = dict.fromkeys((*names, "workbench.records"), "")
    assert len(backwards(planted(others | {where: text}))) == 1


def test_no_module_imports_itself_by_a_circle():
    order = graphlib.TopologicalSorter(imports(LIBRARY))
    assert list(order.static_order())  # CycleError names the circle


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")])
def test_ruff(arguments):
    done = command("ruff", *arguments, "--no-cache", "nbs", "tests", "docs", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def untyped(tree: ast.AST) -> list:
    "Every public function that lacks an annotation, and of what."
    found = []
    for name, node in _public(tree.body):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        asked = {a.arg: a.annotation for a in arguments if a.arg not in ("self", "cls", "_")}
        if node.name != "__init__":
            asked["return"] = node.returns
        if missing := [n for n, given in asked.items() if given is None]:
            found.append(f"{name}: {', '.join(missing)}")
    return found


def _public(body: list, within: str = ""):
    "Functions and methods that one may call, also those with which an object is made or called."
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public(node.body, f"{node.name}.")
        if isinstance(node, ast.FunctionDef):
            if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
                yield within + node.name, node


def test_public_functions_are_annotated():
    rooms = {*ORDER, "workbench"}
    found = {n: untyped(t) for n, t in modules(LIBRARY).items() if n.partition(".")[0] in rooms}
    assert {n: what for n, what in found.items() if what} == {}


def test_a_missing_annotation_is_seen():
    source = "class A:\n    def f(self, x: int, *rest, y=1):\n        def g(z): ...\n"
    assert untyped(ast.parse(source)) == ["A.f: y, return"]


def test_types_ship():
    "The marker is there, and a wheel takes it along."
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert (LIBRARY / "py.typed").exists()
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["tfbench"]
