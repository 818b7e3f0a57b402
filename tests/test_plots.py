"""What a figure of runs shows. Oracle: the metrics that it was drawn from."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from view import plots

STEPS = 60


def metrics(low: float, high: float) -> list[dict[str, Any]]:
    """Return the lines of a run whose losses fall from `high` to `low`, with an evaluation every 20 steps."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = high + (low - high) * (step - 1) / (STEPS - 1)
        lines.append({"step": step, "loss": loss, "grad_norm": loss, "expert_load": 1.5})
        if step % 20 == 0:
            lines.append({"step": step, "eval_loss": loss, "eval_bpb": loss / 2})
    return lines


def draw(runs: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Draw runs and return the figure."""
    drawn: list[Figure] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plots.plot_runs(runs, out / "loss.png")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    return drawn[0]


def panels_of(figure: Figure) -> dict[str, Axes]:
    return {axis.get_title().split(";")[0].split(":")[0]: axis for axis in figure.axes if axis.get_visible()}


def test_evaluations_are_dashed_and_all_lines_end_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = metrics(1.0, 3.0)
    panels = panels_of(draw({"run": lines}, tmp_path, monkeypatch))
    (dashed,) = [line for line in panels["loss"].lines if line.get_linestyle() == "--"]
    assert list(dashed.get_ydata()) == [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert list(dashed.get_xdata()) == [20, 40, 60]
    assert {line.get_xdata()[-1] for axis in panels.values() for line in axis.lines} == {STEPS}


def test_a_single_spike_does_not_hide_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The range of a noisy panel is that of the running mean."""
    lines = metrics(2.0, 3.0)
    lines[7]["loss"] = 0.001
    low, high = panels_of(draw({"run": lines}, tmp_path, monkeypatch))["loss"].get_ylim()
    assert 1 < low < 2 < 3 <= high < 4


def test_names_are_drawn_as_they_are_and_null_is_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$ starts no formula, and a name may begin with an underscore."""
    lines = metrics(1.0, 2.0)
    lines[3]["loss"] = None
    nothing = [{"step": 1, "loss": None, "grad_norm": None}]
    names = ["runs/a$b^{c$", "_läuft nicht", "$", "plain"]
    figure = draw({**dict.fromkeys(names, lines), "nothing": nothing}, tmp_path, monkeypatch)
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == [*names, "nothing"]
    assert not any(text.get_parse_math() for text in legend.get_texts())
    assert panels_of(draw({"nothing": nothing}, tmp_path, monkeypatch)) == {}


def test_the_running_mean_is_a_loop_over_finite_neighbours() -> None:
    values = np.array([4.0, 1.0, math.nan, 3.0, math.inf, 8.0, 2.0])
    for half in (0, 1, 2):
        windows = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
        near = [window[np.isfinite(window)] for window in windows]
        expected = [window.mean() if len(window) else math.nan for window in near]
        assert plots.running_mean(values, half) == pytest.approx(expected, nan_ok=True)
