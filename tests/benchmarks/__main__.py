"""What is measured and never asserted: `make bench`, or `python tests/benchmarks NAME...` for
some of them.

Two things are always measured in turn (A B A B ...), so that a machine that slows down slows
both; medians are printed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
D, PAIRS, BATCH = 20, 41, 64  # dimensions, (x, y) pairs, sequences a step
SIZES = ((64, 3, 2), (128, 6, 4), (256, 12, 8))  # width, layers, heads


def models(width, layers, heads):
    """The in-context regression model: ours with one token a pair, Hugging Face's GPT2Model with
    x and y interleaved."""
    import torch
    from torch import nn
    from transformers import GPT2Config, GPT2Model, logging

    from tfbench.nn.transformer import Transformer, TransformerConfig

    logging.set_verbosity_error()

    class Fused(nn.Module):
        "Token i is [x_i, y_(i-1)]: K tokens for K pairs."

        def __init__(self):
            super().__init__()
            self.read, self.write = nn.Linear(D + 1, width), nn.Linear(width, 1)
            self.net = Transformer(TransformerConfig(width, layers, heads, max_len=PAIRS))

        def forward(self, x, y):
            before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
            return self.write(self.net(self.read(torch.cat([x, before[..., None]], -1))))[..., 0]

    class Interleaved(nn.Module):
        "Tokens x_1, y_1, x_2, y_2, ...: 2 K tokens for K pairs; the prediction is read at every x."

        def __init__(self):
            super().__init__()
            self.read, self.write = nn.Linear(D, width), nn.Linear(width, 1)
            self.net = GPT2Model(
                GPT2Config(
                    n_embd=width,
                    n_layer=layers,
                    n_head=heads,
                    n_positions=2 * PAIRS,
                    vocab_size=1,
                    bos_token_id=0,
                    eos_token_id=0,
                    resid_pdrop=0,
                    embd_pdrop=0,
                    attn_pdrop=0,
                    use_cache=False,
                )
            )

        def forward(self, x, y):
            labels = torch.cat([y[..., None], torch.zeros_like(x[..., 1:])], -1)
            tokens = torch.stack([x, labels], 2).flatten(1, 2)
            return self.write(self.net(inputs_embeds=self.read(tokens)).last_hidden_state)[
                :, ::2, 0
            ]

    return {"ours": Fused(), "GPT2Model": Interleaved()}


def tasks(step, active=D):
    """Linear regression without noise; only `active` coordinates are used (a curriculum's first
    stage)."""
    import torch

    g = torch.Generator().manual_seed(step)
    x, w = torch.randn(BATCH, PAIRS, D, generator=g), torch.randn(BATCH, D, 1, generator=g)
    x[..., active:] = 0
    return x, (x @ w)[..., 0]


def squared(model, batch):
    return (model(*batch) - batch[1]).square().mean()


def speed(steps=12):
    "Training steps a second: forward, backward, AdamW, alternating."
    import torch

    print(
        f"\nin-context regression, {D} dimensions, {PAIRS} pairs, batch {BATCH}, "
        f"{torch.get_num_threads()} threads: median of {steps} steps"
    )
    for width, layers, heads in SIZES:
        nets = models(width, layers, heads)
        optimizers = {
            n: torch.optim.AdamW(m.parameters(), 1e-3, fused=True) for n, m in nets.items()
        }
        seconds = {n: [] for n in nets}
        for step in range(steps + 2):
            for name, net in nets.items():
                batch, begin = tasks(step), time.perf_counter()
                optimizers[name].zero_grad()
                squared(net, batch).backward()
                optimizers[name].step()
                seconds[name].append(time.perf_counter() - begin)
        median = {n: statistics.median(s[2:]) for n, s in seconds.items()}
        rates = ", ".join(f"{n} {BATCH / m:7.1f} sequences/s" for n, m in median.items())
        print(
            f"  {width:3} x {layers:2}: {rates}, ratio {median['GPT2Model'] / median['ours']:.2f}",
            flush=True,
        )


def loss(steps=700, active=2, seeds=2):
    "The loss that both reach in the same number of steps, with the same optimiser and schedule."
    import torch

    from tfbench.train.loop import TrainConfig, fit

    print(
        f"\n64 x 3, {active} of {D} coordinates active, {steps} steps: squared error per active "
        "coordinate, mean of the last 100 steps"
    )
    config = TrainConfig(steps=steps, lr=1e-3, warmup=100, schedule="linear", decay_from=0.5)
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, net in models(*SIZES[0]).items():
            history = fit(
                net, lambda s: tasks(s + seed * 10**6, active), squared, config, label=name
            )
            print(
                f"  seed {seed}, {name:9} {statistics.mean(history.losses[-100:]) / active:.4f}, "
                f"{history.steps_per_second:.1f} steps/s",
                flush=True,
            )


def panel(times=3):
    "The linear panel of in-context baselines on 1280 prompts, all prefixes."
    import torch

    from tfbench.icl.baselines import linear_panel, predict_all
    from tfbench.icl.tasks import get_task

    members, prompts = linear_panel(), get_task("linear", d=D).sample(1280, PAIRS, 0)
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        predict_all(members, prompts.x, prompts.y)
        seconds.append(time.perf_counter() - begin)
    print(
        f"\n{len(members)} baselines, 1280 prompts x {PAIRS} prefixes x {D} dimensions, "
        f"{torch.get_num_threads()} threads: {statistics.median(seconds):.1f} s",
        flush=True,
    )


def run():
    "What `tfbench run` costs beyond the cells of the notebook."
    print("\ntfbench run nn/attention: wall time, and what its cells took")
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            subprocess.run(
                [
                    str(Path(sys.executable).with_name("tfbench")),
                    "run",
                    "attention",
                    "--runs",
                    folder,
                ],
                check=True,
                capture_output=True,
            )
            wall = time.perf_counter() - begin
            cells = json.loads(next(Path(folder).glob("*/*/*/notebook.ipynb")).read_text())["cells"]
        inside = sum(c["metadata"].get("papermill", {}).get("duration") or 0 for c in cells)
        print(f"  {wall:.1f} s, cells {inside:.1f} s, overhead {wall - inside:.1f} s", flush=True)


def imports(times=9):
    "Import times in fresh processes, alternating with the bare one."
    pairs = {
        "import tfbench": ("pass", "import tfbench"),
        "import tfbench.compression.gptq": (
            "import torch",
            "import torch, tfbench.compression.gptq",
        ),
    }
    print(f"\nimport times beyond Python's start (beyond torch's for gptq), median of {times}")
    for label, statements in pairs.items():
        seconds = [[], []]
        for _ in range(times):
            for kept, statement in zip(seconds, statements):
                begin = time.perf_counter()
                subprocess.run([sys.executable, "-c", statement], check=True)
                kept.append(time.perf_counter() - begin)
        bare, full = map(statistics.median, seconds)
        print(f"  {label}: {full - bare:+.3f} s ({full:.3f} against {bare:.3f})", flush=True)


def capturing(T=1024, layers=12, heads=12, times=5):
    """A forward pass with every pattern captured, against the same pass without and against the
    explicit (eager) form, alternating; memory above the model."""
    import resource

    import torch

    from tfbench.interp.capture import capture
    from tfbench.nn.attention import watch_attention
    from tfbench.nn.transformer import Transformer, TransformerConfig

    net, ids, seconds = (
        Transformer(TransformerConfig(192, layers, heads, vocab=100, max_len=T)).eval(),
        torch.randint(100, (1, T)),
        {},
    )

    def plain():
        return net(ids)

    def eager():
        with watch_attention(net):
            return net(ids)

    with torch.no_grad():
        plain(), capture(net, ids[:, :16])  # whatever loads at first use is no part of it
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = capture(net, ids)
        above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        del record
        for _ in range(times):
            for name, work in (
                ("plain", plain),
                ("eager", eager),
                ("captured", lambda: capture(net, ids)),
            ):
                begin = time.perf_counter()
                work()
                seconds.setdefault(name, []).append(time.perf_counter() - begin)
    median = {n: statistics.median(v) for n, v in seconds.items()}
    print(
        f"\ncapture of {layers} layers x {heads} heads x {T} tokens: {above:.0f} MB above the "
        "model; "
        + ", ".join(f"{n} {v:.2f} s" for n, v in median.items())
        + f"; captured over eager {median['captured'] / median['eager']:.2f}",
        flush=True,
    )


def sweeps():
    import sweeps

    sweeps.main()


def explorer():
    import explorer

    explorer.main()


def widgets():
    import widgets

    widgets.main()


if __name__ == "__main__":
    known = {
        f.__name__: f
        for f in (speed, loss, panel, run, imports, capturing, sweeps, explorer, widgets)
    }
    chosen = sys.argv[1:] or list(known)
    if unknown := set(chosen) - set(known):
        sys.exit(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    for name in chosen:
        known[name]()
