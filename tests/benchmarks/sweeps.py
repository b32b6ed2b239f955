"""What a run costs beyond its cells, what a second worker brings, how long ten thousand runs
take to list.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
WORK = (
    "import time, torch, matplotlib.pyplot as plt, pandas\nfrom tfbench.study.claims import "
    "Claims\nend = time.process_time() + {seconds}\nwhile time.process_time() < end: "
    "torch.randn(64, 64) @ torch.randn(64, 64)"
)


def overhead(n=5):
    """Seconds of a run whose cell computes nothing, warm (forked kernel), cold (new process),
    and plain papermill as a command, in turn."""
    from conftest import command
    from test_cli import toy

    from tfbench.workbench.chapters import read_chapter
    from tfbench.workbench.kernels import KernelServer, warm_manager
    from tfbench.workbench.runs import Job, code_hash, run_in

    with tempfile.TemporaryDirectory() as folder, KernelServer() as server:
        path = toy(Path(folder), act=WORK.format(seconds=0)) / "toys" / "01_toy.ipynb"
        chapter, warm = read_chapter(path), warm_manager(server)
        job = Job(chapter, "laptop", chapter.resolve(), "cpu", code_hash(chapter))
        found = {"warm": [], "cold": [], "papermill": []}
        for i in range(n + 1):
            for kind in found:
                begin = time.perf_counter()
                if kind == "papermill":
                    command("papermill", path, Path(folder) / "out.ipynb", "--no-progress-bar")
                else:
                    place = Path(folder) / f"{kind}{i}"
                    place.mkdir()
                    run_in(place, job, manager=warm if kind == "warm" else None)
                found[kind].append(time.perf_counter() - begin)
    medians = {k: statistics.median(v[1:]) for k, v in found.items()}
    print(
        "a run that only imports torch, pandas and matplotlib: "
        + ", ".join(f"{k} {v:.2f} s" for k, v in medians.items())
    )


def workers(seconds=2.0, runs=8):
    """The same sweep with one worker and with two, cluster start left out (the first run of each
    worker is its warm-up)."""
    from test_cli import toy

    from tfbench.workbench import sweeps

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TFBENCH_NBS"] = str(toy(Path(folder), act=WORK.format(seconds=seconds)))
        took = {}
        for n in (1, 2):
            ends = []
            sweeps.sweep(
                "toy",
                {"ending": [f"{i}" for i in range(runs + 2)]},
                runs=Path(folder) / f"runs{n}",
                workers=n,
                watch=lambda event: (
                    ends.append(time.perf_counter()) if event["kind"] == "end" else None
                ),
            )
            took[n] = ends[-1] - ends[1]  # eight runs after the first two
        del os.environ["TFBENCH_NBS"]
    print(
        f"{runs} runs of {seconds:g} s: one worker {took[1]:.1f} s, two {took[2]:.1f} s, "
        f"{took[1] / took[2]:.2f} times as fast"
    )


def listing(n=10_000):
    "`results()` over ten thousand runs: first time, and from the index."
    from tfbench.workbench.records import MIME
    from tfbench.workbench.results import results

    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        record = {
            "measurements": {f"m{i}": i / 7 for i in range(12)},
            "claims": [
                {"id": f"c{i}", "measured": {"estimate": 0.5}, "verdict": "holds"}
                for i in range(10)
            ],
        }
        for i in range(n):
            place = runs / "toys" / "toy" / f"20260101-000000-{i:012x}"
            place.mkdir(parents=True)
            (place / "notebook.ipynb").write_text(
                json.dumps({"cells": [{"outputs": [{"data": {MIME: record}}]}]})
            )
            (place / "run.json").write_text(
                json.dumps(
                    dict(
                        chapter="toys/toy",
                        profile="test",
                        device="cpu",
                        parameters={"seed": i, "n": 3},
                        status="ok",
                        seconds=1.0,
                        started="2026-01-01T00:00:00+00:00",
                        identity=f"{i:064x}",
                        cell=None,
                        error=None,
                        record=record,
                    )
                )
            )
        took = []
        for _ in range(3):
            begin = time.perf_counter()
            assert len(results(runs=runs)) == n
            took.append(time.perf_counter() - begin)
    print(
        f"{n:,} runs listed: {took[0]:.1f} s when first read, {min(took[1:]):.2f} s from the index"
    )


def main():
    overhead()
    workers()
    listing()


if __name__ == "__main__":
    main()
