"""A run's directory: its configuration, metrics.jsonl, loss.png; and its progress, on the terminal and in a tracker."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import TrainConfig, UserError, check
from engine.files import disk_errors, read_json, replace_file

CONFIG, METRICS = "config.json", "metrics.jsonl"
# What a resumed run cannot change: its weights and its place in the data would no longer fit.
FIXED_FIELDS = (
    *("model", "tokenizer", "chat_template", "dataset", "train_split", "max_seq_len", "packing", "shuffle"),
    *("skip_bad_rows", "seed", "optimizer", "init_from", "lora_rank", "lora_alpha", "lora_target_modules", "quantize"),
)


def check_changes(config: TrainConfig) -> None:
    """Say what is new in the configuration of a run that is to be resumed. Raises UserError where it had another shape
    or other data."""
    path = Path(config.checkpoint.output_dir, CONFIG)
    if not path.exists():
        return
    old, new = flatten(read_configuration(path)), flatten(json.loads(json.dumps(config.flat())))
    changes = {
        name: f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in old | new
        if old.get(name) != new.get(name) and name != "resume"
    }
    fixed = [change for name, change in changes.items() if name.partition(".")[0] in FIXED_FIELDS]
    check(not fixed, f"{path.parent} cannot be resumed with another configuration: {', '.join(fixed)}")
    if changes:
        print(f"resuming with changes: {', '.join(changes.values())}")


def read_configuration(path: Path) -> dict[str, Any]:
    """A run's config.json. Raises UserError for what is no JSON."""
    values = read_json(path)
    if isinstance(values.get("dataset"), str):  # as it was written when a run had one source
        values["dataset"] = [values["dataset"]]
    return values


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"hidden_size": 64}} to {"model.hidden_size": 64}"""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def open_run(config: TrainConfig) -> None:
    """Make the run directory and write the configuration into it. A run that is there and is not resumed moves aside:
    nothing is overwritten."""
    directory = Path(config.checkpoint.output_dir)
    if (directory / CONFIG).exists() and not config.checkpoint.resume:
        number = next(n for n in range(1, sys.maxsize) if not Path(f"{directory}.{n}").exists())
        directory.rename(f"{directory}.{number}")
        print(f"{directory} held an earlier run, which is now {directory}.{number} (--resume would have continued it)")
    replace_file(directory / CONFIG, json.dumps(config.flat(), indent=2) + "\n")


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; half a line, which a crash may have left at the end, is no line."""
    path = Path(run, METRICS)
    if not path.is_file():
        raise UserError(f"{run} is no run: it has no {METRICS}")
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class RunLog:
    """What a run shows: a progress bar, and metrics.jsonl after what the run being resumed wrote up to `step`.

    Made on every rank, but only on the first one (`shown`) it shows and writes anything.
    """

    def __init__(self, config: TrainConfig, step: int, total_steps: int, shown: bool) -> None:
        self.run, self.shown = Path(config.checkpoint.output_dir), shown
        self.path = self.run / METRICS
        if shown:
            kept = [line for line in read_metrics(self.run) if line["step"] <= step] if self.path.exists() else []
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.tracker = open_tracker(config)
        self.bar = tqdm(total=total_steps, initial=step, disable=not shown, dynamic_ncols=True, unit="step")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Draw loss.png, unless the run ended before its last step."""
        self.bar.close()
        if self.shown and error is None:
            from engine.plots import plot_runs  # matplotlib takes a while to import

            plot_runs({str(self.run): read_metrics(self.run)}, self.run / "loss.png")

    def advance(self, metrics: dict[str, float]) -> None:
        """Move the bar by one step."""
        self.bar.update()
        self.bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"{metrics['peak_share']:.0%} of peak, expert load {metrics['expert_load']:.1f}"
        )

    def print(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            self.bar.write(text)

    def write(self, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl. Raises UserError where the disk refuses."""
        if self.shown:
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
            with disk_errors(self.path), self.path.open("a") as file:
                file.write(json.dumps(finite) + "\n")
            self.tracker(metrics)


def open_tracker(config: TrainConfig) -> Callable[[dict[str, float]], Any]:
    """A function that hands metrics to the tracker that `report_to` names. Raises UserError where it's missing."""
    name, directory = config.watch.report_to, config.checkpoint.output_dir
    if name == "none":
        return lambda metrics: None
    try:
        tracker = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UserError(f"report_to {name} is not installed: pip install {name}") from error
    if name == "tensorboard":
        writer = tracker.SummaryWriter(directory)
        return lambda metrics: [writer.add_scalar(key, value, metrics["step"]) for key, value in metrics.items()]
    tracker.init(project="sft-from-scratch", name=Path(directory).name, config=config.flat())
    return lambda metrics: tracker.log(metrics, step=metrics["step"])
