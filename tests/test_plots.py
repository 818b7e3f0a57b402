"""What a figure of runs holds, looked up in it before it is saved. Oracle: the lines of metrics that it was made of."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from view import plots

STEPS, TOKENS = 60, 100  # of a run, and in a step


def metrics(low: float, high: float) -> list[dict[str, Any]]:
    """Of a run whose losses fall from `high` to `low`, with an evaluation every 20 steps."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = high + (low - high) * (step - 1) / (STEPS - 1)
        lines.append({"step": step, "num_tokens": step * TOKENS, "loss": loss, "grad_norm": loss, "expert_load": 1.5})
        if step % 20 == 0:
            lines.append({"step": step, "eval_loss": loss, "eval_bpb": loss / 2})
    return lines


def figure_of(lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Axes]:
    """The panels of loss.png by their titles; only those of the metrics that are named, if any are."""
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, *_, **__: drawn.append(figure))
    plots.plot_runs({"run": lines}, Path("loss.png"), names)
    (figure,) = drawn
    figure.canvas.draw()
    return {axis.get_title(): axis for axis in figure.axes}


def test_only_the_metrics_that_are_named_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = [panel.title for panel in plots.PANELS if panel.metric in ("loss", "grad_norm")]
    panels = figure_of(metrics(1.0, 2.0), monkeypatch, "loss", "grad_norm")
    assert [title for title, axis in panels.items() if axis.get_visible()] == titles


@pytest.mark.parametrize("span", [(0.95, 1.35), (0.9, 1.9), (0.85, 1.1), (1.2, 1.3), (0.8, 9.5), (0.5, 60.0)])
def test_a_log_panel_has_labels_to_read_values_by(span: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    panels = figure_of(metrics(*span), monkeypatch)
    logarithmic = [axis for axis in panels.values() if axis.get_yscale() == "log"]
    assert len(logarithmic) == 3
    for axis in logarithmic:
        low, high = axis.get_ylim()
        ticks = [tick for tick in axis.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        assert 3 <= len({tick.label1.get_text() for tick in ticks} - {""}) <= 12


def test_evaluations_are_dashed_and_tokens_end_where_the_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = metrics(1.0, 3.0)
    panels = figure_of(lines, monkeypatch)
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    for title, unit in (("loss; dashed: eval_loss", 1), ("loss over tokens", TOKENS)):
        (dashed,) = [line for line in panels[title].lines if line.get_linestyle() == "--"]
        assert list(dashed.get_ydata()) == evaluations
        assert list(dashed.get_xdata()) == [20 * unit, 40 * unit, 60 * unit]
    for title in ("loss over tokens", "eval_bpb over tokens"):
        assert {line.get_xdata()[-1] for line in panels[title].lines} == {STEPS * TOKENS}
    assert any("1: balanced" in title for title in panels)


def test_the_running_mean_is_a_loop_over_neighbours() -> None:
    """As far as they are there and finite."""
    values = np.array([4.0, 1.0, math.nan, 3.0, math.inf, 8.0, 2.0])
    for half in (0, 1, 2):
        near = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
        expected = [window[np.isfinite(window)].sum() / max(np.isfinite(window).sum(), 1) for window in near]
        assert plots.running_mean(values, half) == pytest.approx(expected)
