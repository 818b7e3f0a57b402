"""Where a run's numbers go: metrics.jsonl, loss.png, and a tracker if one is wanted."""

import importlib
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoint import disk_errors
from config import TrainConfig, UserError

METRICS = "metrics.jsonl"


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; half a line, which a crash may have left at the end, is no line."""
    path = Path(run, METRICS)
    if not path.is_file():
        raise UserError(f"{run} is no run: it has no {METRICS}")
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class MetricsLog:
    """Appends to metrics.jsonl, after what the run being resumed wrote up to `step`."""

    def __init__(self, config: TrainConfig, step: int) -> None:
        self.run = Path(config.output_dir)
        self.path = self.run / METRICS
        kept = [line for line in read_metrics(self.run) if line["step"] <= step] if self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        with disk_errors(self.path):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)
        self.tracker = open_tracker(config)

    def write(self, metrics: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        self.tracker(metrics)

    def close(self) -> None:
        from plot import plot_runs  # matplotlib takes a while to import

        plot_runs([self.run], self.run / "loss.png")


def open_tracker(config: TrainConfig) -> Any:
    """A function that hands metrics to the tracker that `report_to` names. Raises UserError where it's missing."""
    if config.report_to == "none":
        return lambda metrics: None
    module = "torch.utils.tensorboard" if config.report_to == "tensorboard" else config.report_to
    try:
        tracker = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"report_to {config.report_to} is not installed: pip install {config.report_to}") from error
    if config.report_to == "tensorboard":
        writer = tracker.SummaryWriter(config.output_dir)
        return lambda metrics: [writer.add_scalar(name, value, metrics["step"]) for name, value in metrics.items()]
    tracker.init(project="sft-from-scratch", name=Path(config.output_dir).name, config=asdict(config))
    return lambda metrics: tracker.log(metrics, step=metrics["step"])


def measure_peak(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of a large matrix product: the most that this machine could do."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        began = time.perf_counter()
        (a @ b).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
