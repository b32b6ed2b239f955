"""What moving a control costs: milliseconds until the new picture is there, for every `explore`
of every chapter, and those that the processor worked for it (the same on an idle machine).

The cells of a chapter run in a process of their own, in the test profile or in that of
`TFBENCH_BENCH_PROFILE`, with the parameters of `TFBENCH_BENCH_SEED`; then each control goes
to its ends and its middle, one after the other. `TFBENCH_BENCH_ONLY` names some chapters, as
`in_context/prior_fitted,compression/gptq`.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def clocks() -> tuple:
    return time.perf_counter(), time.process_time()


def moved(box) -> list[tuple]:
    """Milliseconds from the move of a control to the bytes of the new picture, by the clock and
    of the processor."""
    *sliders, picture = box.children
    seconds, begin = [], clocks()
    picture.observe(
        lambda _: seconds.append([1000 * (now - then) for now, then in zip(clocks(), begin)]),
        names="value",
    )
    took = []
    for slider in sliders:
        values = [value for _, value in slider._options_full]
        for value in (values[-1], values[0], values[len(values) // 2]):
            if value == slider.value:
                continue
            seconds.clear()
            begin = clocks()
            slider.value = value
            if seconds:
                took.append(seconds[0])  # a picture may stay as it is
    return took


def measure(path: Path, profile: str, seed: str | None):
    "Run the cells of one notebook and print a line for each of its widgets."
    os.environ |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TFBENCH_PROFILE": profile}
    os.environ.pop("TFBENCH_STATIC", None)
    import tfbench.study.figures as figures
    from tfbench.workbench.chapters import read_chapter
    from tfbench.workbench.records import read_notebook

    chapter, boxes, explore = read_chapter(path), [], figures.explore
    given = {"seed": int(seed)} if seed and "seed" in chapter.parameters else {}

    def kept(draw, *args, **controls):
        with mock.patch("IPython.display.display") as display:
            explore(draw, *args, **controls)
        boxes.append((draw.__name__, display.call_args.args[0]))

    figures.explore = kept
    scope, out = {"__name__": "__main__"}, sys.stdout
    sys.stdout = open(os.devnull, "w")  # what cells print is not wanted here
    for cell in read_notebook(path)["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or "skip-execution" in tags:
            continue
        source = "".join(cell["source"])
        if "parameters" in tags:
            source = "\n".join(f"{n} = {v!r}" for n, v in chapter.resolve(profile, given).items())
        exec(compile(source, cell["id"], "exec"), scope)
    sys.stdout = out
    for name, box in boxes:
        if not (took := moved(box)):
            continue
        wall, busy = zip(*took)
        print(
            f"  {chapter.slug:36} {name:18} median {statistics.median(wall):4.0f}, slowest "
            f"{max(wall):4.0f} of {len(wall)}; "
            f"processor {statistics.median(busy):4.0f}, {max(busy):4.0f}",
            flush=True,
        )


def main():
    from conftest import CHAPTERS, slug

    profile, seed = (
        os.environ.get("TFBENCH_BENCH_PROFILE", "test"),
        os.environ.get("TFBENCH_BENCH_SEED"),
    )
    only = [n for n in os.environ.get("TFBENCH_BENCH_ONLY", "").split(",") if n]
    print(f"\nwidgets, {profile} profile: milliseconds until the new picture is there")
    for path in CHAPTERS:
        if only and slug(path) not in only:
            continue
        done = subprocess.run(
            [sys.executable, __file__, str(path), profile, seed or ""],
            text=True,
            capture_output=True,
        )
        print(done.stdout, end="")
        if done.returncode:
            print(f"  {slug(path)}: {done.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
