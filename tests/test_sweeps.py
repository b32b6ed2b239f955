"""Sweeps under fire: real processes are killed, interrupted, starved of disk. No finished run is
lost, none is done twice, nothing is called a success that was not.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DEADLINE, command, start, until
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from test_cli import toy

from tfbench.workbench.records import read_notebook
from tfbench.workbench.results import results, run_rows
from tfbench.workbench.runs import Job
from tfbench.workbench.sweeps import _answer

# What a toy run does, by the text it is given. The log gets a line for every run that begins.
# Of the runs that wait, the first ends at once and the others when they are let go.
ACT = """
import os, pathlib, signal, time
log = pathlib.Path(os.environ['TFBENCH_TOY_LOG'])
with log.open('a') as file: file.write(f'{ending} {n}\\n')
if ending == 'waits':
    while n > 1 and not log.with_suffix('.go').exists(): time.sleep(0.05)
if ending == 'raises': raise ValueError('no')
if ending == 'loops':
    while True: pass
if ending == 'prints':
    for _ in range(5000): print('x' * 9_999)
if ending == 'dies' and not log.with_suffix('.spare').exists(): os.kill(os.getpid(), signal.SIGKILL)
print(repr(ending))
"""


@pytest.fixture
def bench(tmp_path):
    "A notebook folder with one toy chapter, and the command line on it."

    class Bench:
        log, runs = tmp_path / "log", tmp_path / "runs"
        nbs = toy(tmp_path, act=ACT)
        environment = dict(TFBENCH_NBS=str(nbs), TFBENCH_RUNS=str(runs), TFBENCH_TOY_LOG=str(log))

        def __call__(self, *arguments, **more):
            return command("tfbench", *arguments, cwd=tmp_path, **self.environment | more)

        def start(self, *arguments):
            return start("tfbench", *arguments, cwd=tmp_path, **self.environment)

        def sweep(self, *arguments):
            return self("sweep", "toy", *arguments, "--workers", "1")

        def waiting(self, *arguments):
            "Start a sweep of four runs that wait; it is back when one is kept and two run."
            process = self.start(
                "sweep", "toy", "-p", "n", "1..4", "-p", "ending=waits", *arguments
            )
            until(lambda: process.poll() is not None or self.states() and len(self.begun()) >= 3)
            assert process.poll() is None, said(process)
            return process

        def let_go(self):
            self.log.with_suffix(".go").touch()

        def begun(self):
            return self.log.read_text().splitlines() if self.log.exists() else []

        def table(self):
            return results(runs=self.runs)

        def states(self):
            return sorted((r["n"], r["status"]) for r in run_rows(self.runs).values() if "n" in r)

    return Bench()


def descendants(pid: int) -> dict:
    "Living processes below `pid`: pid -> command line."
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found, level = {}, {pid}
    while level:
        level = {p for p, parent in parents.items() if parent in level}
        for p in level:
            try:
                found[p] = Path(f"/proc/{p}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                pass
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_of(pid: int) -> list:
    "Dask's worker processes: the parents of the fork servers."
    below = descendants(pid)
    return [p for p in below if any("forkserver" in c for q, c in descendants(p).items() if q != p)]


def said(process) -> str:
    "What a process says until it ends."
    return "".join(process.communicate(timeout=DEADLINE))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["-p", "n", "1..12"], "12 does not fit"),
        (["-p", "n", "3..1"], "is empty"),
        (["-p", "n", "1,x"], "must be a whole number"),
        (["-p", "m", "1"], "no parameter 'm'"),
        ([], "nothing to vary"),
        (["-p", "n", "1,2", "-p", "ending", "ok", "--zip"], "as many values"),
        (["-p", "n", "1,2", "--random", "3"], "1 to 2"),
        (["-p", "n", "1", "--profile", "papre"], "no profile"),
        (["-p", "n", "1", "--name", "../../etc/x"], "does not fit"),
        (["-p", "n", "__import__('os').getpid()"], "must be a whole number"),
        (["-p", "n", "1", "--scheduler", "tcp://127.0.0.1:9"], "nobody answers"),
        (["-p", "n", "1", "--scheduler", "nonsense://x"], "expected an address"),
        (
            ["-p", "n", "1", "--scheduler", "tcp://127.0.0.1:9", "--workers", "2"],
            "--scheduler has its own",
        ),
        (["-p", "n"], "expected a name and a value"),
        (["-p", "ending", "a", "-p", "n", "1..9", "--random", "-1"], "1 to 9"),
        (["-p", "big", "0..1000000000", "--dry-run"], "1,000,000,001 runs, allowed are 100,000"),
        (["-p", "n", "1", "--device", "gpu"], "cpu, cuda, mps, auto"),
        (["-p", "n", "1", "--device", "mps"], "no mps"),
        (["-p", "n", "1", "--runs", sys.executable], "expected a folder"),
        (["-p", "n", "1", "--runs", sys.executable + "/inside"], "expected a folder"),
    ],
)
def test_bad_input_is_one_line(bench, inside, arguments, says):
    done = inside("sweep", "toy", *arguments, **bench.environment)
    assert (
        done.returncode == 2
        and says in done.stderr
        and re.search(r"^tfbench: [^\n]+\n\Z", done.stderr, re.M)
        and "Traceback" not in done.stderr
    )
    assert not bench.begun(), "nothing may start"


def test_results_bad_input(bench, inside):
    def said(*arguments):
        return inside(*arguments, **bench.environment)

    for arguments, says in (
        (["results"], "no folder"),
        (["results", "--sweep", "../x"], "no folder"),
        (["results", "tyo"], "no folder"),
    ):
        done = said(*arguments)
        assert (
            done.returncode == 2
            and re.fullmatch(r"tfbench: [^\n]+\n", done.stderr)
            and says in done.stderr
        )
    bench.runs.mkdir()
    assert (
        "does not fit" in said("results", "--sweep", "../x").stderr
        and "did you mean" in said("results", "tyo").stderr
        and said("results").returncode == 0
    )


def test_plan_run_again_and_more(bench):
    plan = bench.sweep("-p", "n", "1..3", "--dry-run", "--name", "mine")
    assert (
        plan.returncode == 0
        and "3 runs; 3 to do" in plan.stdout
        and "n=2  to do" in plan.stdout
        and not bench.begun()
    )
    assert bench("run", "toy", "-p", "n", "2").returncode == 0  # a single run counts
    done = bench.sweep("-p", "n", "1..3", "--name", "mine")
    assert done.returncode == 0 and "1 finished already; 2 to do" in done.stdout, done.stderr
    assert sorted(bench.begun()) == ["ok 1", "ok 2", "ok 3"] and bench.states() == [
        (n, "ok") for n in (1, 2, 3)
    ]
    again = bench.sweep("-p", "n", "1..4", "--name", "more", "--dry-run")
    assert "3 finished already; 1 to do; about" in again.stdout
    path = bench.nbs / "toys" / "01_toy.ipynb"
    path.write_text(
        path.read_text().replace("print(repr(ending))", "print(repr(ending), 'changed')")
    )
    changed = bench.sweep("-p", "n", "1..3", "--dry-run")
    assert "3 finished ones were made by other code and do not count; 3 to do" in changed.stdout
    table = bench("results", "toy", "--sweep", "mine")
    assert table.returncode == 0 and table.stdout.count(" ok ") == 3
    for kind in ("csv", "parquet"):
        assert bench("results", "--" + kind, f"out.{kind}").returncode == 0
    import pandas as pd

    assert (
        sorted(pd.read_csv(bench.runs.parent / "out.csv")["n"])
        == sorted(pd.read_parquet(bench.runs.parent / "out.parquet")["n"])
        == [1, 2, 3]
    )


def test_endings(bench):
    """A run that raises, dies, loops, prints 50 MB: each is what it is, and its neighbors are
    not harmed."""
    assert bench.sweep("-p", "ending", "loops", "--timeout", "3").returncode == 1
    done = bench.sweep("-p", "ending", "ok,raises,dies,prints")
    status = dict(zip(bench.table()["ending"], bench.table()["status"]))
    assert done.returncode == 1 and status == {
        "ok": "ok",
        "raises": "failed",
        "dies": "died",
        "loops": "timed out",
        "prints": "ok",
    }, done.stdout + done.stderr
    notebooks = [Path(folder) / "notebook.ipynb" for folder in bench.table()["folder"]]
    assert all(path.stat().st_size < 2_000_000 for path in notebooks)
    plan = bench.sweep("-p", "ending", "ok,raises,dies,prints", "--dry-run").stdout
    assert "4 runs" in plan
    assert "2 ended badly before (--resume runs them again); 0 to do" in plan
    bench.log.with_suffix(".spare").touch()
    done = bench.sweep("-p", "ending", "ok,dies", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([line for line in bench.begun() if not line.startswith("loops")]) == 5


def test_values_are_data(bench):
    """Quotes, newlines and code arrive as the text they are; nothing is executed and nothing
    written elsewhere."""
    nasty = "'); __import__('os').system('touch owned') #\n\"\"\" {x} $(touch owned) ../.."
    done = bench.sweep("-p", f"ending={nasty}")
    assert done.returncode == 0, done.stdout + done.stderr
    notebook = read_notebook(Path(bench.table()["folder"][0]) / "notebook.ipynb")
    printed = "".join(
        "".join(o["text"]) for c in notebook["cells"] if c["id"] == "act" for o in c["outputs"]
    )
    assert printed.strip() == repr(nasty) and not list(bench.runs.parent.rglob("owned"))


FOUR = [(n, "ok") for n in (1, 2, 3, 4)]
WAITING = ("sweep", "toy", "-p", "n", "1..4", "-p", "ending=waits")


def test_worker_killed(bench):
    "The killed worker's run is taken over, and none counts twice."
    running = bench.waiting("--workers", "2")
    os.kill(workers_of(running.pid)[0], signal.SIGKILL)
    bench.let_go()
    text = said(running)
    assert running.returncode == 0, text
    assert bench.states() == FOUR


def test_interrupted_and_resumed(bench):
    running = bench.waiting("--workers", "2")
    below = list(descendants(running.pid))
    running.send_signal(signal.SIGINT)
    text = said(running)
    assert running.returncode == 130 and "interrupted; what is finished is kept" in text, text
    assert "Traceback" not in text
    assert {s for _, s in bench.states()} == {"ok", "cancelled"}
    until(lambda: not any(map(alive, below)))
    bench.let_go()
    done = bench(*WAITING, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [run for run in bench.states() if run[1] == "ok"] == FOUR


def test_client_killed_and_resumed(bench):
    running = bench.waiting("--workers", "2")
    below = list(descendants(running.pid))
    running.kill()
    running.communicate()
    until(lambda: not any(map(alive, below)))  # workers and kernels follow their client
    assert bench.states() == [(1, "ok")]
    bench.let_go()
    done = bench(*WAITING)
    assert done.returncode == 0 and "1 finished already" in done.stdout, done.stdout + done.stderr
    assert bench.states() == FOUR


def test_two_clients(bench):
    "Two sweeps over the same runs at once: each run is done once, and both see it."
    both = [bench.start(*WAITING, "--workers", "1") for _ in range(2)]
    until(lambda: len(bench.begun()) >= 3)
    bench.let_go()
    texts = [said(b) for b in both]
    assert [b.returncode for b in both] == [0, 0], texts
    assert sorted(bench.begun()) == [f"waits {n}" for n in (1, 2, 3, 4)]
    assert bench.states() == FOUR


class Cluster:
    """A scheduler and workers as a cluster would have them; with `hidden`, workers see an empty
    folder in its place."""

    def __init__(self, folder: Path, environment: dict, workers=2, hidden=()):
        folder.mkdir()
        self.address, self.environment = (
            folder / "address",
            {**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        dask = [sys.executable, "-m", "dask"]
        self.scheduler = self._start(
            [
                *dask,
                "scheduler",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--no-dashboard",
                "--scheduler-file",
                str(self.address),
            ]
        )
        until(self.address.exists)
        self.url = json.loads(self.address.read_text())["address"]
        hide = " && ".join([f"mount -t tmpfs none '{h}'" for h in hidden] + ['exec "$@"'])
        wrap = ["unshare", "-m", "sh", "-c", hide, "sh"] if hidden else []
        worker = [
            *wrap,
            *dask,
            "worker",
            self.url,
            "--nthreads",
            "1",
            "--no-dashboard",
            "--host",
            "127.0.0.1",
            "--death-timeout",
            str(DEADLINE),
            "--local-directory",
        ]
        self.workers = [self._start([*worker, str(folder / f"worker{i}")]) for i in range(workers)]

    def _start(self, arguments):
        return subprocess.Popen(
            arguments,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for p in (*self.workers, self.scheduler):
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
            p.wait()


def may_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(
            ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True
        ).returncode
        == 0
    )


def test_workers_share_no_folder(bench, tmp_path):
    """The notebook travels with the task and the executed one comes back: workers see neither
    the notebooks nor the runs of the client."""
    if not may_mount():
        pytest.skip("needs the right to mount, to hide the client's folders from the workers")
    bench.runs.mkdir()
    log = tmp_path / "seen"
    log.mkdir()
    with Cluster(
        tmp_path / "cluster", {"TFBENCH_TOY_LOG": str(log / "log")}, hidden=(bench.nbs, bench.runs)
    ) as cluster:
        done = bench("sweep", "toy", "-p", "n", "1..4", "--scheduler", cluster.url)
    assert done.returncode == 0 and bench.states() == FOUR, done.stdout + done.stderr


@pytest.mark.parametrize(
    "status, problem, lost",
    [
        ("finished", CommClosedError("the scheduler is gone"), True),
        ("cancelled", FutureCancelledError("k", "gone"), True),
        ("finished", TimeoutError(), True),
        ("error", OSError("the run's own"), False),
        ("error", ValueError("no"), False),
        ("finished", ValueError("no"), False),
    ],
)
def test_an_answer_lost_on_the_way_is_no_failed_run(status, problem, lost):
    "What a run raised is its record; what the way to the client raised is none."

    class Future:
        def result(self):
            raise problem

    Future.status = status
    chapter = SimpleNamespace(slug="toys/toy")
    answer = _answer(Job(chapter, "laptop", {"n": 1}, "cpu", "0" * 64), Future())
    assert (
        (answer is None)
        if lost
        else (
            answer["run"]["status"] == "failed" and type(problem).__name__ in answer["run"]["error"]
        )
    )


def test_scheduler_killed_and_resumed(bench, tmp_path):
    with Cluster(tmp_path / "first", bench.environment) as cluster:
        running = bench.waiting("--scheduler", cluster.url)
        os.killpg(cluster.scheduler.pid, signal.SIGKILL)
        text = said(running)
    assert running.returncode == 2 and "the scheduler is gone" in text, text
    assert "Traceback" not in text and bench.states() == [(1, "ok")]
    bench.let_go()
    with Cluster(tmp_path / "second", bench.environment) as cluster:
        done = bench(*WAITING, "--scheduler", cluster.url, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert bench.states() == FOUR


def test_disk_full_and_resumed(bench):
    """A full disk stops the sweep with one line; what was kept is whole, and the rest is done
    when there is room."""
    bench.runs.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2500k", "none", str(bench.runs)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        done = bench("sweep", "toy", "-p", "n", "1..4", "-p", "ending", "prints", "--workers", "1")
        assert (
            done.returncode == 2
            and "No space left" in done.stderr
            and "Traceback" not in done.stderr
        ), done.stdout + done.stderr
        kept = [n for n, s in bench.states()]
        assert (
            1 <= len(kept) < 4
            and {s for _, s in bench.states()} == {"ok"}
            and not list(bench.runs.rglob(".half-*"))
        )
        subprocess.run(["mount", "-o", "remount,size=50m", str(bench.runs)], check=True)
        done = bench("sweep", "toy", "-p", "n", "1..4", "-p", "ending", "prints")
        assert (
            done.returncode == 0
            and f"{len(kept)} finished already" in done.stdout
            and bench.states() == FOUR
        )
    finally:
        subprocess.run(["umount", str(bench.runs)], check=True)


def test_damaged_files(bench):
    """A corrupted notebook and a half-written folder are listed as what they are; the sweep does
    the damaged run again when resumed."""
    assert bench.sweep("-p", "n", "1,2").returncode == 0
    folder = Path(bench.table().query("n == 1")["folder"].iloc[0])
    (folder / "notebook.ipynb").write_text((folder / "notebook.ipynb").read_text()[:200])
    half = bench.runs / "toys" / "toy" / "20260101-000000-abc"
    half.mkdir()
    (half / "partial.ipynb").write_text("{")
    listed = bench("results", "toy")
    assert (
        listed.returncode == 0
        and "damaged" in listed.stdout
        and "unfinished" in listed.stdout
        and listed.stdout.count(" ok ") == 1
    )
    assert (
        "1 finished already; 1 ended badly before"
        in bench.sweep("-p", "n", "1,2", "--dry-run").stdout
    )
    assert bench.sweep("-p", "n", "1,2", "--resume").returncode == 0
    assert sorted(n for n, s in bench.states() if s == "ok") == [1, 2]
