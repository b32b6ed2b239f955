"""The picture of the front page: what a transformer says about eight points after each of its
layers.

The network is a real one, a layer of linear attention applied again and again. Its weights are
written down so that each layer takes one step of gradient descent. `python docs/picture.py` makes
the picture anew.
"""

import io
import sys
from pathlib import Path

import torch
from PIL import Image

from tfbench.core import write_whole
from tfbench.in_context.gradient_descent import LSATransformer, gd_steps, make_tokens
from tfbench.study.figures import PALETTE, figure, use_style

PICTURE = Path(__file__).resolve().parents[1] / "images" / "front.gif"
LAYERS, RATE = 8, 0.9


def points(n: int = 8, seed: int = 3) -> tuple:  # inputs 1 N 2, targets 1 N 1
    "Noisy points on a line; an input is a place and a one."
    generator = torch.Generator().manual_seed(seed)
    place = torch.linspace(-0.95, 0.95, n) + 0.1 * torch.randn(n, generator=generator)
    x = torch.stack([place, torch.ones(n)], -1)
    y = x @ torch.tensor([[1.3], [-0.5]]) + 0.25 * torch.randn(n, 1, generator=generator)
    return x[None], y[None]


def answers(x, y, queries) -> tuple:  # each layer x query
    "What the network says at each query after each layer, and what gradient descent says."
    model = LSATransformer.from_gd(2, 1, x.shape[1], RATE, LAYERS)
    x, y = (t.expand(len(queries), -1, -1) for t in (x, y))
    with torch.no_grad():
        layers = [model.read(h)[:, 0] for h in model.states(make_tokens(x, y, queries))]
    steps = gd_steps(x, y, queries, RATE, LAYERS)[..., 0]
    return torch.stack(layers), torch.stack(list(steps))


def frames() -> list:
    "One image for each layer, the input first."
    x, y = points()
    grid = torch.linspace(-1.2, 1.2, 25)
    queries = torch.stack([grid, torch.ones_like(grid)], -1)
    network, descent = answers(x, y, queries)
    best = queries @ torch.linalg.lstsq(x[0], y[0]).solution
    gaps = [(said - best[:, 0]).pow(2).mean(-1).sqrt() for said in (network, descent)]
    return [
        _frame(layer, (x[0, :, 0], y[0, :, 0]), (grid, best, network), gaps)
        for layer in range(LAYERS + 1)
    ]


def _frame(layer: int, dots: tuple, lines: tuple, gaps: list) -> Image.Image:
    import matplotlib.pyplot as plt

    fig, (left, right) = figure(1, 2, height=2.9, width=7.6)
    grid, best, network = lines
    left.plot(grid, best, color="0.8", linewidth=6)
    left.annotate("thick: least squares", (0.2, -1.4), color="0.5")
    for past in range(layer):
        left.plot(grid, network[past], color=PALETTE[0], alpha=0.2, linewidth=1)
    left.plot(grid, network[layer], color=PALETTE[0], linewidth=2.5)
    left.scatter(*dots, color="black", s=30, zorder=3)
    where = f"after layer {layer}" if layer else "before its first layer"
    left.set(title=f"what the network says {where}", xlabel="x", ylabel="y")
    left.set(xlim=(-1.2, 1.2), ylim=(-2.4, 1.4))
    right.plot(gaps[0][: layer + 1], "o-", color=PALETTE[0], label="network, layer by layer")
    right.plot(gaps[1][: layer + 1], "o", color=PALETTE[1], label="gradient descent, step by step",
               markersize=11, fillstyle="none")  # fmt: skip
    right.set(title="distance to least squares", xlabel="layer, or step")
    right.set(xlim=(-0.3, LAYERS + 0.3), ylim=(0, 1.15 * gaps[0].max().item()))
    right.legend(loc="upper right")
    file = io.BytesIO()
    fig.savefig(file, dpi=100)
    plt.close(fig)
    return Image.open(file).convert("RGB")


def picture() -> bytes:
    "The animation as a GIF."
    use_style()
    images = [
        i.quantize(48, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE) for i in frames()
    ]
    durations = [1200, *[700] * (len(images) - 2), 3000]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return file.getvalue()


if __name__ == "__main__":
    write_whole(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE, picture())
