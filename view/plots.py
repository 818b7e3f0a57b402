"""Pictures, drawn with matplotlib from data; where the data comes from, show.py and run_directory.py know."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator, EngFormatter, LogLocator

TRAINED, CONTEXT = "#b7e4c7", "#e9ecef"


def save(figure: Figure, out: str | Path, **options: Any) -> None:
    figure.savefig(out, **options)
    plt.close(figure)


# ---------------------------------------------------------------- runs


class Panel(NamedTuple):
    """A metric over steps or tokens."""

    metric: str
    title: str
    x: str = "step"
    scale: str = "linear"
    # Training metrics jump from step to step: drawn faintly, with a running mean on top.
    noisy: bool = True
    # Another metric of the same kind, in the same panel, as a dashed line.
    beside: str = ""


PANELS = (
    Panel("loss", "loss; dashed: eval_loss", scale="log", beside="eval_loss"),
    Panel("loss", "loss over tokens", x="num_tokens", scale="log", beside="eval_loss"),
    Panel("eval_bpb", "eval_bpb (held-out bits per byte)", noisy=False),
    Panel("eval_bpb", "eval_bpb over tokens", x="num_tokens", noisy=False),
    Panel("learning_rate", "learning_rate", noisy=False),
    Panel("grad_norm", "grad_norm", scale="log"),
    Panel("expert_load", "expert_load: busiest expert over mean (1: balanced)"),
    Panel("tokens_per_second", "tokens_per_second"),
)


def plot_runs(runs: dict[str, list[dict[str, Any]]], out: str | Path, metrics: Sequence[str] = ()) -> None:
    """One panel a metric, one colour a run. runs: the lines of metrics.jsonl by the run's name. metrics: only these."""
    panels = [panel for panel in PANELS if not metrics or panel.metric in metrics]
    columns = 4 if len(panels) > 4 else min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (4.25 * columns, 3.5 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, lines in enumerate(runs.values()):
            draw_metric(axis, panel, lines, f"C{number % 10}")
        axis.set_title(panel.title, fontsize=10)
        axis.set(xlabel={"step": "step", "num_tokens": "tokens"}[panel.x], yscale=panel.scale)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if panel.scale == "log":  # 2, 3 and 5 instead of 2 x 10^0 and the like; within a decade as on any axis
            low, high = axis.get_ylim()
            axis.yaxis.set_major_locator(AutoLocator() if high < 10 * low else LogLocator(subs=(1, 2, 3, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
        axis.set_visible(len(axis.lines) > 0)  # a run may have had no evaluation
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], color=f"C{number % 10}") for number in range(len(runs))]
    figure.legend(handles, list(runs), loc="outside lower center", ncols=4)
    save(figure, out, dpi=100)


def draw_metric(axis: Axes, panel: Panel, lines: list[dict[str, Any]], colour: str) -> None:
    x, values = points(lines, panel.metric, panel.x)
    if len(values) == 0:
        return
    smooth = panel.noisy and len(values) >= 50
    axis.plot(x, values, colour, alpha=0.25 if smooth else 1, lw=1, marker="." * (len(values) < 30))
    if smooth:
        axis.plot(x, running_mean(values, len(values) // 50), colour, lw=1.5)
    if panel.beside:
        axis.plot(*points(lines, panel.beside, panel.x), colour, ls="--", marker=".")


def points(lines: list[dict[str, Any]], metric: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Where and how large a metric was. Evaluations have no num_tokens; they have those of their step."""
    training = [line for line in lines if "num_tokens" in line]
    steps, tokens = ([line[name] for line in training] for name in ("step", "num_tokens"))
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    at, values = np.array(found, dtype=float).reshape(-1, 2).T  # None, which stands for what is not finite, to NaN
    return (np.interp(at, steps, tokens) if x == "num_tokens" and steps else at), values


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over the neighbours, up to `half` on either side, as far as they are there and finite."""
    finite = np.isfinite(values)
    window = np.ones(2 * half + 1)
    sums, counts = (np.convolve(each, window, "same") for each in (np.where(finite, values, 0.0), finite.astype(float)))
    return sums / np.maximum(counts, 1)


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


def draw_histograms(values: dict[str, np.ndarray], out: str | Path) -> None:
    """How the numbers under each name are distributed."""
    figure, axes = plt.subplots(1, len(values), figsize=(5 * len(values), 3.2), layout="constrained", squeeze=False)
    for axis, (name, numbers) in zip(axes.flat, values.items(), strict=True):
        axis.hist(numbers, bins=min(40, int(numbers.max(initial=1)) + 1), color="#52b788")
        axis.set(title=f"{name}: median {np.median(numbers):,.0f}, most {numbers.max(initial=0):,}", ylabel="pieces")
        axis.grid(alpha=0.3)
    save(figure, out, dpi=110)


def draw_levels(numbers: np.ndarray, levels: Sequence[float], shares: np.ndarray, name: str, out: str | Path) -> None:
    """A weight's numbers in [-1, 1], the levels that they are rounded to, and the share of numbers at each level."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", sharex=True)
    top.hist(numbers, bins=201, range=(-1, 1), color=CONTEXT, edgecolor="#adb5bd", linewidth=0.3)
    for level in levels:
        top.axvline(level, color="#52b788", linewidth=1)
    over = "numbers over the largest of their block of 64, which itself sits at ±1; green: the 16 levels"
    top.set_title(f"{name}\n{over}", fontsize=11)
    top.set(yticks=[])
    edges = (np.array(levels[1:]) + np.array(levels[:-1])) / 2
    starts, ends = np.array([-1, *edges]), np.array([*edges, 1])
    bottom.bar(starts, shares, width=ends - starts, align="edge", color=TRAINED, edgecolor="white")
    bottom.axhline(1 / len(levels), color="#52b788", linewidth=1, linestyle="--")
    bottom.set_title("share of numbers that go to each level; dashed: equally many", fontsize=11)
    bottom.set(xlabel="number / absmax")
    bottom.yaxis.set_major_formatter("{x:.0%}")
    save(figure, out, dpi=110)


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
