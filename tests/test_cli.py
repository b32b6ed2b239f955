"The command line through its real entry point: what it shows, and one line for every bad input."

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEADLINE, ROOT, command, start, until

from tfbench.workbench.chapters import find, find_chapters
from tfbench.workbench.front import claims_of
from tfbench.workbench.records import read_notebook
from tfbench.workbench.runs import notebook_text

CHAPTER = "in_context/gradient_descent"


def toy(folder: Path, act="print(ending)", front="", exported="", title="Toy") -> Path:
    "A small notebook folder: one chapter `toys/toy`."

    def cell(id, source, kind="code", tags=()):
        code = {"outputs": [], "execution_count": None} if kind == "code" else {}
        return {
            "id": id,
            "cell_type": kind,
            "source": source,
            "metadata": {"tags": list(tags)} if tags else {},
        } | code

    cells = [
        cell("title", f"# {title}\n> A toy.\n\n{front}", "markdown"),
        cell("target", exported or "pass"),
        cell(
            "parameters",
            "ending: str = 'ok'  # any text\nn: int = 3  # a number [1..9]\nbig: int = 1  # any",
            tags=["parameters"],
        ),
        cell("profiles", "profiles = {'test': {'n': 2}}", tags=["profiles"]),
        cell("act", act),
    ]
    (folder / "nbs" / "toys").mkdir(parents=True)
    (folder / "nbs" / "toys" / "01_toy.ipynb").write_text(
        notebook_text({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    return folder / "nbs"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["run", "in_context/gradient_decent"], "did you mean"),
        (["show", "no_such_thing_at_all"], "no chapter"),
        (["refresh", "no_such_thing_at_all"], "no chapter"),
        (["lab", "no_such_thing_at_all"], "no chapter"),
        (["list", "--family", "in_contxt"], "no family"),
        (["run", CHAPTER, "--profile", "papre"], "it has laptop, test, quick, paper"),
        (["run", CHAPTER, "-p", "sed", "1"], "did you mean seed?"),
        (["run", CHAPTER, "-p", "seed", "one"], "must be a whole number"),
        (["run", CHAPTER, "-p", "seed", "1.5"], "must be a whole number"),
        (["run", CHAPTER, "-p", "seed", "-1"], "-1 does not fit; it must be a whole number from 0"),
        (["run", CHAPTER, "-p", "seed", "__import__('os').getpid()"], "must be a whole number"),
        (["run", CHAPTER, "-p", "seed"], "expected a name and a value"),
    ],
)
def test_bad_input_is_one_line(inside, tmp_path, arguments, says):
    done = inside(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"tfbench: [^\n]+\n", done.stderr) and says in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing may start"


def test_missing_package_is_one_line(inside, tmp_path):
    nbs = toy(tmp_path, front="- needs: gguf, no-such-package-xyz")
    done = inside("run", "toy", TFBENCH_NBS=str(nbs))
    assert done.returncode == 2 and re.fullmatch(
        r"tfbench: toys/toy needs no-such-package-xyz: pip install [^\n]+\n", done.stderr
    )


def test_lagging_export_is_one_line(inside, tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    path = tmp_path / "nbs" / "nn" / "01_attention.ipynb"
    path.write_text(path.read_text().replace("k.shape[-2]", "k.shape[-3]"))
    done = inside("run", "attention", TFBENCH_NBS=str(tmp_path / "nbs"))
    assert done.returncode == 2 and re.fullmatch(
        r"tfbench: [^\n]*lags behind[^\n]*nbdev_export\n", done.stderr
    )


WITHOUT_ID = {"cell_type": "code", "source": "1", "metadata": {}}


@pytest.mark.parametrize(
    "file, says",
    [
        ("{half", "cannot be read as a notebook"),
        (json.dumps({"cells": [WITHOUT_ID]}), "cell 1 has no id"),
        (json.dumps({"cells": [{"cell_type": "code"}]}), "cells[0] lacks metadata"),
        ("n: int = 10**3", "parameter n: expected a literal value, such as 1000, got `10 ** 3`"),
        ("status: str = ''", "parameter status: every run has a status of its own"),
        ("seconds: float = 1.0", "parameter seconds: every run has a seconds of its own"),
    ],
)
def test_one_bad_notebook_hides_no_other(inside, tmp_path, file, says):
    nbs, path = toy(tmp_path), tmp_path / "nbs" / "toys" / "02_bad.ipynb"
    if ": " in file and not file.startswith("{"):
        notebook = read_notebook(nbs / "toys" / "01_toy.ipynb")
        notebook["cells"][2]["source"], notebook["cells"][3]["source"] = file, "profiles = {}"
        file = notebook_text(notebook)
    path.write_text(file)
    for arguments in (["list"], ["claims"], ["run", "bad"], ["doctor"]):
        done = inside(*arguments, TFBENCH_NBS=str(nbs))
        line = next(x for x in (done.stdout + done.stderr).splitlines() if says in x)
        assert str(path) in line and "Traceback" not in done.stderr
        assert done.returncode == {"run": 2, "doctor": 0}.get(arguments[0], 1)
        assert arguments != ["list"] or "toys/toy" in done.stdout
    assert find("toy").title == "Toy", "its neighbors still run"


@pytest.mark.parametrize(
    "options, says",
    [
        (["--device", "gpu"], "device: expected one of cpu, cuda, mps, auto, got 'gpu'"),
        (["--device", "mps"], "device: expected cpu or auto, since no mps is here"),
        (["--runs", sys.executable], "runs: expected a folder"),
        (["--runs", sys.executable + "/inside"], "runs: expected a folder"),
        (["--profile", "quick"], "no profile 'quick'; it has laptop, test"),
    ],
)
def test_run_refuses_in_one_line(inside, tmp_path, options, says):
    if "mps" in options and sys.platform == "darwin":
        pytest.skip("this machine may have it")
    done = inside("run", "toy", *options, TFBENCH_NBS=str(toy(tmp_path)))
    assert done.returncode == 2 and re.fullmatch(r"tfbench: [^\n]+\n", done.stderr), done.stderr
    assert says in done.stderr and not list(tmp_path.glob("runs/toys/toy/*"))


def test_the_kernel_is_told_its_device(tfbench, tmp_path):
    nbs = toy(tmp_path, act="import os; print(os.environ['TFBENCH_DEVICE'])")
    for n, options in enumerate(([], ["--device", "auto"]), 1):
        assert tfbench("run", "toy", "-p", "n", n, *options, TFBENCH_NBS=str(nbs)).returncode == 0
    told = {}
    for path in tmp_path.glob("runs/toys/toy/*/run.json"):
        run, notebook = (
            json.loads(path.read_text()),
            read_notebook(path.with_name("notebook.ipynb")),
        )
        told[run["parameters"]["n"]] = run["device"]
        assert notebook["cells"][-1]["outputs"][0]["text"] == [run["device"] + "\n"]
    assert told == {1: "cpu", 2: "auto"}


@pytest.mark.parametrize(
    "act, says",
    [
        ("import sys; sys.exit(0)", "failed in cell act: SystemExit"),
        ("%nosuchmagic", "failed in cell act: UsageError: Line magic function `%nosuchmagic`"),
    ],
)
def test_no_bad_end_is_taken_for_a_good_one(tfbench, tmp_path, act, says):
    done = tfbench("run", "toy", TFBENCH_NBS=str(toy(tmp_path, act=act)))
    assert done.returncode == 1 and says in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["list"], ["show"], ["run"], ["refresh"], ["claims"], ["lab"], ["readme"], ["doctor"]],
    ids=" ".join,
)
def test_help(tfbench, arguments):
    done = tfbench(*arguments, "-h")
    assert done.returncode == 0 and "Usage" in done.stdout and "-h, --help" in done.stdout


def test_list_and_show(inside):
    listed = inside("list")
    assert listed.returncode == 0
    for chapter in find_chapters():
        assert chapter.slug in listed.stdout
        shown = inside("show", chapter.slug).stdout
        assert all(name in shown for name in chapter.parameters) and chapter.front["arxiv"] in shown


def test_claims_are_those_of_the_notebooks(tfbench):
    rows = json.loads(tfbench("claims", "--json").stdout)
    assert {(r["chapter"], r["id"], r["verdict"]) for r in rows} == {
        (c.slug, k["id"], k["verdict"]) for c in find_chapters() for k in claims_of(c)
    }
    assert {r["survives"] for r in rows} == {True, False, None}
    lines = re.findall(r"^\| (?!chapter |---)", tfbench("claims", "--markdown").stdout, re.M)
    assert len(lines) == len(rows)
    assert tfbench("claims").returncode == 0


def test_run_keeps_what_failed(tfbench, tmp_path):
    nbs = toy(tmp_path, act="print('so far')\nraise RuntimeError('no further')")
    done = tfbench("run", "toy", "-p", "n", "4", TFBENCH_NBS=str(nbs))
    assert done.returncode == 1 and "failed in cell act: RuntimeError: no further" in done.stdout
    folder = next((tmp_path / "runs").glob("toys/toy/*"))
    result = json.loads((folder / "run.json").read_text())
    assert result["status"] == "failed" and result["parameters"] == {
        "ending": "ok",
        "n": 4,
        "big": 1,
    }
    assert "so far" in (folder / "notebook.ipynb").read_text() and sorted(
        p.name for p in folder.iterdir()
    ) == ["notebook.ipynb", "run.json"]


def test_values_are_never_code(tfbench, tmp_path):
    nbs = toy(tmp_path, act="print(repr(ending))")
    nasty = "'); import os; os._exit(3)\n\"\"\"#{x}\\ =$(id) __import__('os')"
    assert tfbench("run", "toy", "-p", "ending", nasty, TFBENCH_NBS=str(nbs)).returncode == 0
    assert (
        json.loads(next(tmp_path.glob("runs/toys/toy/*/run.json")).read_text())["parameters"][
            "ending"
        ]
        == nasty
    )
    cells = {
        c["id"]: c
        for c in read_notebook(next(tmp_path.glob("runs/toys/toy/*/notebook.ipynb")))["cells"]
    }
    assert "".join(cells["act"]["outputs"][0]["text"]).strip() == repr(nasty)


def test_interrupt_is_cancelled(tmp_path):
    (began := tmp_path / "began").unlink(missing_ok=True)
    nbs = toy(tmp_path, act=f"open({str(began)!r}, 'w').close()\nimport time; time.sleep(9999)")
    process = start("tfbench", "run", "toy", "--runs", tmp_path / "runs", TFBENCH_NBS=str(nbs))
    until(lambda: began.exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert process.returncode not in (0, None)
    result = json.loads(next(tmp_path.glob("runs/toys/toy/*/run.json")).read_text())
    assert result["status"] == "cancelled"


def test_refresh_writes_only_outputs(tfbench, tmp_path):
    nbs = toy(tmp_path)
    before = read_notebook(nbs / "toys" / "01_toy.ipynb")
    assert tfbench("refresh", "toy", TFBENCH_NBS=str(nbs)).returncode == 0
    after = read_notebook(nbs / "toys" / "01_toy.ipynb")
    assert [c["source"] for c in after["cells"]] == [
        c["source"] for c in before["cells"]
    ] and after["cells"][-1]["outputs"][0]["text"] == ["ok\n"]


def test_refresh_refuses_a_failing_notebook(tfbench, tmp_path):
    nbs = toy(tmp_path, act="raise ValueError('no')")
    before = (nbs / "toys" / "01_toy.ipynb").read_bytes()
    assert tfbench("refresh", "toy", TFBENCH_NBS=str(nbs)).returncode == 1
    assert (nbs / "toys" / "01_toy.ipynb").read_bytes() == before


def test_doctor(tfbench):
    done = tfbench("doctor")
    assert done.returncode == 0 and "torch" in done.stdout and "cores" in done.stdout


def test_make_names_a_wrong_python(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "requirements-data.txt",
        "requirements-peers.txt",
    ):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "run", "PYTHON=/no/such/python"], cwd=tmp_path, capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert (
        done.returncode != 0
        and len(ours) == 1
        and ours[0].startswith("tfbench needs Python 3.11 or newer")
    )


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root is asked")
@pytest.mark.parametrize("arguments", [[], ["--no-browser"], [CHAPTER, "--no-browser"]])
def test_lab_as_root_is_one_line(tfbench, arguments):
    done = tfbench("lab", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    again = " ".join(["tfbench lab", *arguments, "--allow-root"])
    says = f"tfbench: JupyterLab starts as root only when asked to: {again}"
    assert done.stderr.splitlines() == [says]


def test_lab_starts_on_this_machine_alone(tmp_path):
    process = start("tfbench", "lab", CHAPTER, "--no-browser", "--ServerApp.port=0", "--allow-root")
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+(\S*)\?token=(\w+)", line):
                break
        assert (
            found
            and found[1] == "/lab/tree/nbs/in_context/02_gradient_descent.ipynb"
            and len(found[2]) > 20
        ), "".join(lines)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_command_line_starts_without_torch():
    code = "import sys, tfbench.workbench.cli; sys.exit('torch' in sys.modules)"
    assert command("python", "-c", code).returncode == 0
