"Every notebook runs: chapters in their test profile, rooms as they are. One thread each."

import json
import os

import pytest
from conftest import CHAPTERS, INDEXES, ROOMED, command, elsewhere, slug

from tfbench.workbench.chapters import read_chapter
from tfbench.workbench.check import form_of
from tfbench.workbench.kernels import KernelServer, warm_manager
from tfbench.workbench.records import MIME, claims_record, read_notebook
from tfbench.workbench.runs import prepare, run_in

ONE_A_FAMILY = list({p.parent.name: p for p in reversed(CHAPTERS)}.values())  # its first chapter
OTHERS = [p for p in CHAPTERS if p not in ONE_A_FAMILY]


@pytest.fixture(scope="session")
def kernels():
    """A class of managers whose kernels are forks of one process that has imported torch: the
    runner's own, as in sweeps. The entry points are tested in test_cli and below."""
    if not hasattr(os, "fork"):
        yield None
        return
    with KernelServer() as server:
        yield warm_manager(server)


def exact_claims_hold(path, record):
    exact = [c for c in record["claims"] if c["kind"] == "exact"]
    assert exact or form_of(read_chapter(path)) == 2, (
        "an old chapter has exact claims, a new one has checks"
    )
    assert all(c["verdict"] == "holds" for c in exact)


@pytest.mark.parametrize("path", OTHERS, ids=slug)
def test_chapter_in_the_test_profile(path, tmp_path, kernels):
    "Through our runner. Its models train on a second device. The first ones of families: below."
    there, job = elsewhere(tmp_path), prepare(slug(path), "test")
    (tmp_path / "run").mkdir()
    result = run_in(tmp_path / "run", job, manager=kernels, environment=there)
    assert result.status == "ok", f"{result.cell}: {result.error}"
    assert "TFBENCH_DEVICE" in there or next(tmp_path.rglob("travels"))
    record = claims_record(read_notebook(tmp_path / "run" / "notebook.ipynb"))
    assert result.record == record and record["profile"] == "test"
    assert record["parameters"] == read_chapter(path).resolve("test")
    exact_claims_hold(path, record)


@pytest.mark.parametrize("path", [*INDEXES, *ROOMED], ids=slug)
def test_room(path, tmp_path, kernels):
    result = run_in(tmp_path, prepare(slug(path)), manager=kernels)
    assert result.status == "ok", f"{result.cell}: {result.error}"


def plain(*arguments, **environment):
    """A plain tool that starts a kernel. A kernel can die before its first word when another
    one, started at the same time, has drawn the same free port; no cell has run then, so the tool
    is called once more, and a second death fails the test."""
    done = command(*arguments, **environment)
    if "Kernel died before replying to kernel_info" in done.stderr:
        done = command(*arguments, **environment)
    return done


@pytest.mark.parametrize("path", ONE_A_FAMILY, ids=slug)
def test_plain_papermill(path, tmp_path):
    """papermill alone, without our runner: parameters from a file, another seed. Models train on
    a second device."""
    there, values = elsewhere(tmp_path), read_chapter(path).resolve("test", {"seed": 1})
    (tmp_path / "values.json").write_text(json.dumps(values))
    done = plain(
        "papermill",
        path,
        tmp_path / "out.ipynb",
        "--no-progress-bar",
        "-f",
        tmp_path / "values.json",
        **there,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TFBENCH_DEVICE" in there or next(tmp_path.rglob("travels"))
    record = claims_record(read_notebook(tmp_path / "out.ipynb"))
    assert record["parameters"] == values
    exact_claims_hold(path, record)


@pytest.mark.parametrize("path", ONE_A_FAMILY, ids=slug)
def test_plain_nbconvert(path, tmp_path):
    """jupyter nbconvert --execute, which has no parameters: the test profile's values stand in
    the parameters cell."""
    notebook, values = read_notebook(path), read_chapter(path).resolve("test")
    for cell in notebook["cells"]:
        cell.get("outputs", []).clear()
        if "parameters" in cell["metadata"].get("tags", []):
            cell["source"] = "".join(f"{n} = {v!r}\n" for n, v in values.items())
    (tmp_path / "in.ipynb").write_text(json.dumps(notebook))
    done = plain(
        "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--output",
        "out.ipynb",
        tmp_path / "in.ipynb",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert MIME in (tmp_path / "out.ipynb").read_text()
