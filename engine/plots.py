"""Pictures, drawn with matplotlib from data; where the data comes from, show.py and run_directory.py know."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

TRAINED, CONTEXT = "#b7e4c7", "#e9ecef"


def save(figure: Figure, out: str | Path, **options: Any) -> None:
    figure.savefig(out, **options)
    plt.close(figure)


# ---------------------------------------------------------------- runs

# What the panels show, with the scale of the y axis.
PANELS = {
    "loss": "log",
    "eval_bpb": "linear",
    "learning_rate": "linear",
    "grad_norm": "log",
    "expert_load": "linear",
    "tokens_per_second": "linear",
}


def plot_runs(runs: dict[str, list[dict[str, Any]]], out: str | Path) -> None:
    """One panel a metric, one line a run, over the steps. runs: the lines of metrics.jsonl under the run's name."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for run, lines in runs.items():
        for axis, (name, scale) in zip(axes.flat, PANELS.items(), strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            steps, values = zip(*points, strict=True) if points else ([], [])
            axis.plot(steps, values, label=run, marker="." * (len(points) < 30))
            axis.set(title=name, xlabel="step", yscale=scale)
            axis.grid(alpha=0.3)
    axes.flat[0].legend()
    save(figure, out, dpi=110)


# ---------------------------------------------------------------- tokens and rows


def draw_tokens(tokens: Sequence[str], mask: Sequence[int], out: str | Path, width: int = 88) -> None:
    """A conversation as its tokens, coloured by what is trained on (mask 1); lines of `width` characters."""
    figure, axis = plt.subplots(figsize=(9, 1.7))
    x, line = 0.0, 0
    for token, trained in zip(tokens, mask, strict=True):
        if x + len(token) > width:
            x, line = 0.0, line + 1
        box = {"facecolor": TRAINED if trained else CONTEXT, "edgecolor": "white", "boxstyle": "square,pad=0.25"}
        axis.text(x, -line, token.replace(" ", "·"), family="monospace", fontsize=9, bbox=box)
        x += len(token) + 1.2
    axis.set(xlim=(0, width), ylim=(-line - 0.5, 1))
    axis.set_title("green: trained on; grey: given", fontsize=9, loc="left")
    axis.axis("off")
    save(figure, out, dpi=150, bbox_inches="tight")


def draw_packing(sequence_ids: np.ndarray, labels: np.ndarray, out: str | Path) -> None:
    """A packed row, and which token attends to which; both arrays (T,), as in a Batch."""
    same = (sequence_ids[:, None] == sequence_ids[None, :]) & (sequence_ids[:, None] > 0)
    attended = np.tril(same)  # (T, T): query, key
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.5, 6), height_ratios=(1, 10), layout="constrained", sharex=True
    )
    shades = ListedColormap([CONTEXT, "#adb5bd", TRAINED, "#52b788", "white"])
    kinds = np.where(sequence_ids > 0, sequence_ids % 2 + 2 * (labels >= 0), 4)
    top.imshow(kinds[None], aspect="auto", cmap=shades, vmin=0, vmax=4, interpolation="nearest")
    top.set(yticks=[], title="a row of conversations; green: trained on")
    bottom.imshow(attended, aspect="auto", cmap="Greens", interpolation="nearest")
    bottom.set(title="who attends to whom", xlabel="key position", ylabel="query position")
    save(figure, out, dpi=110)
