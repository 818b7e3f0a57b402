"""Pictures of runs: their metrics over steps."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

matplotlib.rcParams["text.parse_math"] = False  # names of runs may contain $
Metrics = list[dict[str, Any]]  # the lines of a run's metrics.jsonl


# Metric to the title of its panel.
PANELS = {
    "loss": "loss; dashed: eval_loss",
    "eval_bpb": "eval_bpb (held-out bits per byte)",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "expert_load": "expert_load: busiest expert over mean (1: balanced)",
    "tokens_per_second": "tokens_per_second",
}


def plot_runs(runs: dict[str, Metrics], out: str | Path) -> None:
    """Draw one panel per metric, over steps, with one colour per run. runs: by name."""
    figure, axes = plt.subplots(2, 3, figsize=(12.75, 7), layout="constrained")
    for axis, (metric, title) in zip(axes.flat, PANELS.items(), strict=True):
        for number, lines in enumerate(runs.values()):
            draw_metric(axis, lines, metric, f"C{number % 10}")
            if metric == "loss":
                draw_metric(axis, lines, "eval_loss", f"C{number % 10}", "--")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.set_visible(len(axis.lines) > 0)  # a run may have no evaluations
    handles = [Line2D([], [], color=f"C{number % 10}") for number in range(len(runs))]
    # matplotlib leaves out names that start with an underscore.
    figure.legend(handles, [f" {name}" for name in runs], loc="outside lower center", ncols=4)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def draw_metric(axis: Axes, lines: Metrics, metric: str, colour: str, style: str = "-") -> None:
    """Draw a metric's running mean, and faintly what jumps from step to step; few values and the schedule as they
    are."""
    places, values = points(lines, metric)
    if not np.isfinite(values).any():
        return
    if len(values) >= 50 and metric != "learning_rate":
        # An artist does not count for the axis' range, so that single spikes cannot hide the curve.
        axis.add_artist(Line2D(places, values, color=colour, alpha=0.2, linewidth=0.8))
        values = running_mean(values, len(values) // 50)
    axis.plot(places, values, colour, ls=style, lw=1.5, marker="." if len(values) < 30 else "")


def points(lines: Metrics, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values of a metric; null is NaN."""
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps, values


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Return the mean of each value and its finite neighbours, up to `half` on either side."""
    return pd.Series(values).rolling(2 * half + 1, center=True, min_periods=1).mean().to_numpy()
