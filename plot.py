"""Compare runs: python plot.py RUN [RUN ...] [--out PATH]"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from engine.cli import one_line_errors
from engine.run_directory import read_metrics

# What the panels show, with the scale of the y axis.
PANELS = {
    "loss": "log",
    "eval_bpb": "linear",
    "learning_rate": "linear",
    "grad_norm": "log",
    "expert_load": "linear",
    "tokens_per_second": "linear",
}


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> None:
    """One panel a metric, one line a run, over the steps. Raises UserError for a directory that is no run."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for run in runs:
        lines = read_metrics(run)
        for axis, (name, scale) in zip(axes.flat, PANELS.items(), strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(
                *zip(*points, strict=True) if points else ([], []), label=str(run), marker="." * (len(points) < 30)
            )
            axis.set(title=name, xlabel="step", yscale=scale)
            axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", default="runs.png", help="picture to write (default: runs.png)")
    arguments = parser.parse_args()
    plot_runs(arguments.runs, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
