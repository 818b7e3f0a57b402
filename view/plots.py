"""Pictures of runs: their metrics over steps."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

matplotlib.rcParams["text.parse_math"] = False  # names of runs may contain $
Metrics = list[dict[str, Any]]  # the lines of a run's metrics.jsonl


class Panel(NamedTuple):
    """A metric and how it is drawn."""

    metric: str
    title: str
    # Training metrics jump from step to step: drawn faintly, with a running mean on top.
    noisy: bool = False
    # Another metric of the same kind, drawn as a dashed line.
    dashed: str = ""


PANELS = (
    Panel("loss", "loss; dashed: eval_loss", noisy=True, dashed="eval_loss"),
    Panel("eval_bpb", "eval_bpb (held-out bits per byte)"),
    Panel("learning_rate", "learning_rate"),
    Panel("grad_norm", "grad_norm", noisy=True),
    Panel("expert_load", "expert_load: busiest expert over mean (1: balanced)", noisy=True),
    Panel("tokens_per_second", "tokens_per_second", noisy=True),
)


def plot_runs(runs: dict[str, Metrics], out: str | Path) -> None:
    """Draw one panel per metric, over steps, with one colour per run. runs: by name."""
    figure, axes = plt.subplots(2, 3, figsize=(12.75, 7), layout="constrained")
    for axis, panel in zip(axes.flat, PANELS, strict=True):
        for number, lines in enumerate(runs.values()):
            draw_metric(axis, panel, lines, f"C{number % 10}")
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes.flat:
        axis.set_visible(len(axis.lines) > 0)  # a run may have no evaluations
    handles = [Line2D([], [], color=f"C{number % 10}") for number in range(len(runs))]
    # matplotlib leaves out names that start with an underscore.
    figure.legend(handles, [f" {name}" for name in runs], loc="outside lower center", ncols=4)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def draw_metric(axis: Axes, panel: Panel, lines: Metrics, colour: str) -> None:
    places, values = points(lines, panel.metric)
    if not np.isfinite(values).any():
        return
    if panel.noisy and len(values) >= 50:
        # An artist does not count for the axis' range, so that single spikes cannot hide the curve.
        axis.add_artist(Line2D(places, values, color=colour, alpha=0.2, linewidth=0.8))
        values = running_mean(values, len(values) // 50)
    axis.plot(places, values, colour, lw=1.5, marker="." if len(values) < 30 else "")
    if panel.dashed:
        axis.plot(*points(lines, panel.dashed), colour, ls="--", marker=".")


def points(lines: Metrics, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of a metric; null is NaN."""
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps, values


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Return the mean of each value and its finite neighbours, up to `half` on either side."""
    return pd.Series(values).rolling(2 * half + 1, center=True, min_periods=1).mean().to_numpy()
