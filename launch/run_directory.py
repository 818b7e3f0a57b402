"""A run's directory: its configuration, metrics.jsonl, loss.png; and its progress, on the terminal and in a tracker."""

import functools
import importlib
import json
import math
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from config import ModelConfig, RopeScaling, TrainConfig, UserError, check
from files import disk_errors, printing_to_nobody, read_json, replace_file

CONFIG, METRICS, TRACKER_ID = "config.json", "metrics.jsonl", "tracker_id"
AGENTS = ".job"  # what started the job that the run belongs to, a line each
# What a resumed run cannot change: its weights and its place in the data would no longer fit.
FIXED_FIELDS = (
    *(
        "model",
        "tokenizer",
        "chat_template",
        "add_control_tokens",
        "dataset",
        "train_split",
        "max_seq_len",
        "packing",
        "shuffle",
    ),
    *("long_conversations", "eval_fraction", "skip_bad_rows", "seed", "optimizer", "init_from"),
    *("lora_rank", "lora_alpha", "lora_target_modules", "quantize"),
)

# What runs did before these fields were there.
FIRST_VALUES: dict[str, Any] = {"long_conversations": "truncate", "eval_fraction": 0.0, "add_control_tokens": False}


# ---------------------------------------------------------------- its configuration


def saved_configuration(run: str | Path) -> TrainConfig:
    """The configuration that a run has kept. Raises UserError where there is no run, or another program's."""
    path = Path(run, CONFIG)
    there = f"{run} holds no run to resume: there is no {path}. Without --resume a new run begins"
    check(path.is_file(), there)
    saved = read_configuration(path)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
    unknown = [name for name in flatten(values) if name.split(".")[0] not in TrainConfig().flat()]
    check(not unknown, f"{path} is no run's configuration: {', '.join(unknown[:5])} is unknown here")
    try:
        model = values.pop("model", {})
        scaling = model.get("rope_scaling")
        model |= {"rope_scaling": RopeScaling(**scaling) if scaling else None}
        return TrainConfig().changed(**values, model=ModelConfig(**model))
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path} is no run's configuration: {error}") from error


def read_configuration(path: Path) -> dict[str, Any]:
    """A run's config.json, an earlier version's in today's terms. Raises UserError for what is no JSON."""
    values: dict[str, Any] = FIRST_VALUES | read_json(path)
    if isinstance(values.get("dataset"), str):  # a run had one source
        values["dataset"] = [values["dataset"]]
    if "min_learning_rate" in values:
        values["min_learning_rate_ratio"] = values.pop("min_learning_rate") / values["learning_rate"]
    return values


def check_changes(config: TrainConfig) -> None:
    """Say what is new in the configuration of a run that is to be resumed. Raises UserError where it had another shape
    or other data."""
    path = Path(config.checkpoint.output_dir, CONFIG)
    if not path.exists():  # torchrun has restarted a job that died before it made the directory
        return
    old, new = flatten(read_configuration(path)), flatten(json.loads(json.dumps(config.flat())))
    changes = {
        name: f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in old | new
        if old.get(name) != new.get(name) and name not in ("resume", "debug") and not name.startswith("dry_run")
    }
    fixed = [change for name, change in changes.items() if name.partition(".")[0] in FIXED_FIELDS]
    check(not fixed, f"{path.parent} cannot be resumed with another configuration: {', '.join(fixed)}")
    news = f"changes: {', '.join(changes.values())}" if changes else "its own configuration"
    print(f"resuming {path.parent} with {news}")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"hidden_size": 64}} to {"model.hidden_size": 64}"""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# ---------------------------------------------------------------- a tracker


class Tracker(NamedTuple):
    """Where metrics go beside metrics.jsonl: a function that takes a line of them, and one that ends it."""

    track: Callable[[dict[str, float]], Any]
    close: Callable[[], Any]
    number: str = ""  # that the run is known by there


NO_TRACKER = Tracker(lambda metrics: None, lambda: None)


def import_tracker(name: str) -> Any:
    """The module of a tracker. Raises UserError where it's missing."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise UserError(f"report_to {name} is not installed: pip install {name}") from error


def start_tracker(config: TrainConfig, step: int) -> Tracker:
    """The one that `report_to` names, before anything changes on disk. A run that goes on after `step` goes on there,
    too. Raises UserError where the tracker is missing or cannot start."""
    name, run = config.watch.report_to, Path(config.checkpoint.output_dir)
    if name == "none":
        return NO_TRACKER
    tracker = import_tracker(name)
    if name == "tensorboard":

        @functools.cache
        def writer() -> Any:
            """Made when it's needed: it lies in the run's directory, and no longer shows what came after `step`."""
            return tracker.SummaryWriter(run, purge_step=step + 1)

        def write(metrics: dict[str, float]) -> None:
            for key in metrics.keys() - {"step"}:
                writer().add_scalar(key, metrics[key], metrics["step"])

        return Tracker(write, lambda: writer().close())
    known = config.checkpoint.resume and (run / TRACKER_ID).exists()
    number = (run / TRACKER_ID).read_text() if known else secrets.token_hex(4)
    names = {"id": number, "name": run.name} if name == "wandb" else {"name": f"{run.name}-{number}"}
    try:
        tracker.init(project="sft-from-scratch", config=config.flat(), resume="allow", **names)
    except Exception as error:  # no key, no network, a full disk: each tracker has errors of its own
        raise UserError(f"report_to {name} cannot start: {' '.join(str(error).split())}") from error
    return Tracker(lambda metrics: tracker.log(metrics, step=metrics["step"]), tracker.finish, number)


# ---------------------------------------------------------------- its directory


def holds_a_run(directory: Path) -> bool:
    """Or what is left of one that somebody has tidied."""
    return (directory / CONFIG).exists() or (directory / "checkpoints").exists()


def check_start(config: TrainConfig) -> None:
    """What has to be right before anything changes on disk. Raises UserError where a tracker is missing, or where the
    earlier run that `open_run` would move aside holds what this one starts from."""
    if config.watch.report_to != "none":
        import_tracker(config.watch.report_to)
    directory = Path(config.checkpoint.output_dir)
    if config.checkpoint.resume or not holds_a_run(directory):
        return
    needed = (config.checkpoint.init_from, config.data.tokenizer, *config.data.dataset)
    inside = [place for place in needed if place and Path(place).resolve().is_relative_to(directory.resolve())]
    check(not inside, f"output_dir {directory} holds {', '.join(inside)}, which this run starts from: choose another")


def open_run(config: TrainConfig, agents: Iterable[str] = (), tracker: Tracker = NO_TRACKER) -> None:
    """Make the run directory, and write into it the configuration, the job's agents (launch/job.py) and the tracker's
    number. A run that is there and is not resumed moves aside: nothing is overwritten."""
    directory = Path(config.checkpoint.output_dir)
    if holds_a_run(directory) and not config.checkpoint.resume:
        number = next(n for n in range(1, sys.maxsize) if not Path(f"{directory}.{n}").exists())
        directory.rename(f"{directory}.{number}")
        print(f"{directory} held an earlier run, which is now {directory}.{number} (--resume would have continued it)")
    replace_file(directory / AGENTS, "".join(f"{agent}\n" for agent in agents))
    if tracker.number:
        replace_file(directory / TRACKER_ID, tracker.number)
    replace_file(directory / CONFIG, json.dumps(config.flat(), indent=2) + "\n")


# ---------------------------------------------------------------- its progress


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; half a line, which a crash may have left at the end, is no line."""
    path = Path(run, METRICS)
    if not path.is_file():
        raise UserError(f"{run} is no run: it has no {METRICS}")
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


# The best evaluation of a run that has had none.
NO_EVALUATION: dict[str, float] = {"step": 0, "eval_loss": math.inf, "evaluations_since": 0}


def lowest(best: dict[str, float], evaluation: dict[str, float]) -> dict[str, float]:
    """The one with the lower eval_loss, and how many evaluations have passed since."""
    if evaluation["eval_loss"] < best["eval_loss"]:
        return evaluation | {"evaluations_since": 0}
    return best | {"evaluations_since": best["evaluations_since"] + 1}


class RunLog:
    """What a run shows: a progress bar, and metrics.jsonl after what the run being resumed wrote up to `step`.

    Made on every rank, but only on the first one (`shown`) it shows and writes anything.
    """

    def __init__(self, run: Path, step: int, total_steps: int, shown: bool, tracker: Tracker = NO_TRACKER) -> None:
        self.run, self.shown, self.tracker = run, shown, tracker
        self.path = self.run / METRICS
        if shown:
            kept = [line for line in read_metrics(self.run) if line["step"] <= step] if self.path.exists() else []
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        # Drawn at each step, but not yet (hence the delay): tqdm ends the line of a bar only if a step has drawn it.
        how = {"dynamic_ncols": True, "unit": "step", "delay": 0.01, "mininterval": 0, "miniters": 1}
        self.bar = tqdm(total=total_steps, initial=step, disable=not shown, **how)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Draw loss.png, unless the run ended before its last step."""
        with printing_to_nobody():
            self.bar.close()
        if self.shown:
            self.tracker.close()
        if self.shown and error is None:
            from view.plots import plot_runs  # matplotlib takes a while to import

            plot_runs({str(self.run): read_metrics(self.run)}, self.run / "loss.png")

    def advance(self, metrics: dict[str, float]) -> None:
        """Move the bar by one step."""
        with printing_to_nobody():
            self.bar.set_postfix_str(
                f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
                f"{metrics['peak_share']:.0%} of peak, expert load {metrics['expert_load']:.1f}",
                refresh=False,
            )
            self.bar.update()

    def print(self, text: str) -> None:
        """A line above the bar."""
        if self.shown:
            with printing_to_nobody():
                self.bar.write(text)

    def finish(self, checkpoint: Path | None, best: dict[str, float], stopped: bool) -> None:
        """The last lines: what was saved, how to talk to it, and how a run that was stopped goes on."""
        if not self.shown:
            return
        goes_on = "; the same command with --resume goes on from there" * stopped
        lines = [f"saved {checkpoint}{goes_on}", f"talk to it: python chat.py {self.run}"]
        since, steps = best["evaluations_since"], f"{self.bar.n} of {self.bar.total} steps"
        if self.bar.n < self.bar.total and not stopped:
            lines += [f"ended after {steps}: {since} evaluations without a lower eval_loss"]
        if since:
            place = self.run / f"checkpoints/step-{best['step']:06d}"
            kept = f"{place} has it" if place.exists() else "--save-best would have kept that checkpoint"
            lines += [f"eval_loss was lowest after step {best['step']}, {best['eval_loss']:.4f}: {kept}"]
        with printing_to_nobody():
            self.bar.close()
            print(*lines, sep="\n")

    def write(self, metrics: dict[str, float]) -> None:
        """A line of metrics.jsonl. Raises UserError where the disk refuses."""
        if self.shown:
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
            with disk_errors(self.path), self.path.open("a") as file:
                file.write(json.dumps(finite) + "\n")
            self.tracker.track(metrics)
