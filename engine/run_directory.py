"""A run's directory: its configuration, metrics.jsonl, loss.png, and a tracker if one is wanted."""

import importlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, check
from engine.files import disk_errors, read_json, replace_file

CONFIG, METRICS = "config.json", "metrics.jsonl"
# What a resumed run cannot change: its weights and its place in the data would no longer fit.
FIXED_FIELDS = (
    *("model", "tokenizer", "chat_template", "dataset", "train_split", "max_seq_len", "packing", "shuffle"),
    *("skip_bad_rows", "seed", "optimizer", "init_from", "lora_rank", "lora_alpha", "lora_target_modules"),
)


def check_changes(config: TrainConfig) -> None:
    """Say what is new in the configuration of a run that is to be resumed. Raises UserError where it had another shape
    or other data."""
    path = Path(config.output_dir, CONFIG)
    if not path.exists():
        return
    old, new = flatten(read_json(path)), flatten(json.loads(json.dumps(asdict(config))))
    changes = {
        name: f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in old | new
        if old.get(name) != new.get(name) and name != "resume"
    }
    fixed = [change for name, change in changes.items() if name.partition(".")[0] in FIXED_FIELDS]
    check(not fixed, f"{path.parent} cannot be resumed with another configuration: {', '.join(fixed)}")
    if changes:
        print(f"resuming with changes: {', '.join(changes.values())}")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"hidden_size": 64}} to {"model.hidden_size": 64}"""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def open_run(config: TrainConfig) -> None:
    """Make the run directory and write the configuration into it. A run that is there and is not resumed moves aside:
    nothing is overwritten."""
    directory = Path(config.output_dir)
    if (directory / CONFIG).exists() and not config.resume:
        number = next(n for n in range(1, sys.maxsize) if not Path(f"{directory}.{n}").exists())
        directory.rename(f"{directory}.{number}")
        print(f"{directory} held an earlier run, which is now {directory}.{number} (--resume would have continued it)")
    replace_file(directory / CONFIG, json.dumps(asdict(config), indent=2) + "\n")


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
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.tracker = open_tracker(config)

    def write(self, metrics: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        self.tracker(metrics)

    def close(self) -> None:
        from engine.plots import plot_runs  # matplotlib takes a while to import

        plot_runs({str(self.run): read_metrics(self.run)}, self.run / "loss.png")


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
